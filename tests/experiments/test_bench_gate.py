"""What the bench of the hot scans lets through is right in every row, head, state and gradient."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import kernels, kernels_cases, kernels_gate, measure
from experiments.bench.case import over_heads
from experiments.bench.kernels_cases import FAMILIES, Shape
from experiments.bench.measure import Quartiles

SHAPE = Shape(2, 24, 3, 4)
MATRICES = [family for family in FAMILIES if family.products]


@pytest.fixture(autouse=True)
def nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "side_by_side", lambda runs, **_: dict.fromkeys(runs, Quartiles(1, 1, 1)))
    monkeypatch.setattr(kernels, "rates", lambda kind: measure.Rates(1, 1))


def rows_of(
    monkeypatch: pytest.MonkeyPatch, functions: dict[str, Any], family: kernels_cases.Family = FAMILIES[0],
    shape: Shape = SHAPE, kind: str = "float32",
) -> dict[str, dict[str, Any]]:  # fmt: skip
    monkeypatch.setattr(kernels, "_functions", lambda *_: functions)
    return {row["implementation"]: row for row in kernels._measured(family, shape, kind, 0, {})}


def xla(family: kernels_cases.Family = FAMILIES[0]) -> Callable[..., Any]:
    return lambda *x: family.ours(*x, method="auto", segments=None)


def bent(at: tuple[Any, ...], what: str, family: kernels_cases.Family = FAMILIES[0]) -> Callable[..., Any]:
    """Wrong at `at` alone, by as much as swapped entries are: in outputs, gradients of values or final states."""

    def function(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        if what == "gradients":  # the same value
            value = value.at[at].set(2 * value[at] - jax.lax.stop_gradient(value[at]))
        out, states = xla(family)(query, key, value, *rest)
        if what == "outputs":
            return out.at[at].set(2 * out[at]), states
        if what == "final states":
            states = jax.tree.map(lambda x: x.at[at].set(2 * x[at]), states)
        return out, states

    return function


@pytest.mark.parametrize(
    ("what", "at"),
    [
        ("outputs", (0, slice(None), 2)),
        ("outputs", (1, slice(None), 0)),
        ("gradients", (0, slice(None), 2)),
        ("gradients", (1, slice(None), 0)),
        ("final states", (0, 0)),
        ("final states", (1, 2)),
    ],
)
@pytest.mark.parametrize("kind", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_one_row_one_head_or_the_state_alone(
    what: str, at: tuple[Any, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop in float64 sees row 0 and head 0 of the outputs and gradients."""
    rows = rows_of(monkeypatch, {"Pallas": bent(at, what), "XLA chunked": xla()}, kind=kind)
    assert rows["XLA chunked"]["ms_forward"] == 1000
    assert rows["Pallas"]["failed"]
    number = " of input 2" if what == "gradients" else ""
    told = rf"AssertionError: .*Pallas, {what}{number} of all rows and heads beside XLA's, is off by .*: not timed"
    assert re.match(told, rows["Pallas"]["note"])


@pytest.mark.slow
@pytest.mark.parametrize("family", MATRICES, ids=lambda family: family.name)
def test_states_of_every_family(family: kernels_cases.Family, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {"a": bent((1, 2), "final states", family), "XLA chunked": xla(family), "b": xla(family)}
    rows = rows_of(monkeypatch, functions, family)
    assert "final states of all rows and heads" in rows["a"]["note"]
    assert rows["b"]["difference"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "float32") for family in FAMILIES] + [(family, "bfloat16") for family in MATRICES],
    ids=lambda value: getattr(value, "name", value),
)
def test_forms_that_are_right_pass(family: kernels_cases.Family, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order of the sums, another chunk, and what is written by hand."""
    shape = kernels_cases.QUICK.get(family.name, (Shape(2, 150, 3, 16),))[0]
    token = lambda *x: family.ours(*x, method="sequential", segments=None)
    other = lambda *x: family.ours(*x, method="chunked", segments=None, chunk=16)
    functions = {"token": token, "other": other, "XLA chunked": xla(family)}
    if family.associative is not None:
        functions["associative"] = lambda *x: (family.associative(*x), None)
    rows = rows_of(monkeypatch, functions, family, shape, kind)
    assert rows["XLA chunked"]["difference"] is None
    for name in functions.keys() - {"XLA chunked"}:
        assert rows[name]["difference"] < kernels_gate.ALIKE[kind] / 2


def test_without_an_xla_form_that_is_right_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A noted row and no failure of its own; the XLA form's is one."""
    wrong = lambda *x: jax.tree.map(lambda y: 2 * y, xla()(*x))
    rows = rows_of(monkeypatch, {"Pallas": xla(), "XLA chunked": wrong})
    assert rows["Pallas"]["note"] == (
        "left out: no XLA form was right here, with which all rows and heads could be compared"
    )
    assert "failed" not in rows["Pallas"]
    assert rows["XLA chunked"]["failed"]


def test_the_reference_is_the_first_form_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda *x: jax.tree.map(lambda y: 2 * y, xla()(*x))
    rows = rows_of(monkeypatch, {"other": xla(), "XLA auto": xla(), "XLA chunked": wrong})
    assert rows["XLA auto"]["difference"] is None
    assert rows["other"]["difference"] == 0
    assert list(rows) == ["other", "XLA auto", "XLA chunked"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_wrong(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def function(*x: Any) -> Any:
        out, state = xla()(*x)
        return out, state.at[1, 1, 0, 0].set(value)

    rows = rows_of(monkeypatch, {"Pallas": function, "XLA chunked": xla()})
    assert "final states of all rows and heads beside XLA's, is off by" in rows["Pallas"]["note"]
    with pytest.raises(AssertionError, match="off by nan"):
        measure.verify("x", [np.ones(2), np.full(2, np.nan)], [np.ones(2), np.ones(2)], 1e-3)


def test_sizes_are_compared() -> None:
    with pytest.raises(AssertionError, match=r"\(2, 1\) where \(2, 3\) is expected"):
        kernels_gate._off(SHAPE, jnp.ones((2, 1)), jnp.ones((2, 3)))


def test_each_head_is_compared_with_its_own_entries() -> None:
    """Head 1 holds a thousandth of head 0, and all of it is wrong."""
    expected = jnp.ones(SHAPE[:4]).at[:, :, 1].set(1e-3)
    assert kernels_gate._off(SHAPE, expected.at[:, :, 1].set(2e-3), expected) == pytest.approx(1)
    state = jnp.ones((2, 3, 4, 4)).at[:, 1].set(1e-3)
    assert kernels_gate._off(SHAPE, state.at[:, 1].set(2e-3), state) == pytest.approx(1)


def test_normalisers_stay_away_from_their_corner() -> None:
    """Where |q . n| is 1 the gradient jumps, and two that are right differ."""
    (family,) = (family for family in FAMILIES if family.name == "exponential")
    query, key, _, log_input, log_forget = family.inputs(np.random.default_rng(0), Shape(2, 512, 4, 64))

    def read(query: Any, key: Any, log_input: Any, log_forget: Any) -> Any:
        body = lambda n, x: ((n := jnp.exp(x[3]) * n + jnp.exp(x[2]) * x[1]), x[0] @ n)
        return jax.lax.scan(body, jnp.zeros(query.shape[-1]), (query, key, log_input, log_forget))[1]

    found = np.abs(over_heads(read)(query, key, log_input, log_forget))
    assert found[:, :, ::2].min() > 1.5
    assert found[:, :, 1::2].max() < 0.8
