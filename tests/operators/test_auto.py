"""`auto` takes a kernel where its table says so, and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest

from seqmodels import compat
from seqmodels.operators import delta_rule, diagonal_scan, gated_linear_attention, kernels, mlstm_scan, selective_scan
from seqmodels.scan import auto
from tests.kernels.common import H100

LENGTH = 8


def matrices(size: int, length: int, dtype: Any) -> list[Any]:
    return [jax.ShapeDtypeStruct((1, length, 2, size), dtype)] * 3


def gates(length: int, size: int | None = None) -> Any:
    return jax.ShapeDtypeStruct((1, length, 2) if size is None else (1, length, 2, size), jnp.float32)


def vectors(size: int, length: int, dtype: Any) -> Any:
    return jax.ShapeDtypeStruct((1, length, size), dtype)


class Asked(Exception):
    """A kernel was to run."""


def ask(*arguments: Any, **options: Any) -> None:
    raise Asked


# By name in the table: the call, its arrays for a size, length and type, and the sizes that the table knows it by.
FAMILIES: dict[str, tuple[Callable[..., Any], Callable[..., list[Any]], Callable[[int], tuple[int, ...]]]] = {
    "outer": (gated_linear_attention, lambda k, n, t: [*matrices(k, n, t), gates(n)], lambda k: (k, k)),
    "outer_keys": (gated_linear_attention, lambda k, n, t: [*matrices(k, n, t), gates(n, k)], lambda k: (k, k)),
    "delta": (delta_rule, lambda k, n, t: [*matrices(k, n, t), gates(n), gates(n)], lambda k: (k, k)),
    "delta_keys": (delta_rule, lambda k, n, t: [*matrices(k, n, t), gates(n), gates(n, k)], lambda k: (k, k)),
    "exponential": (mlstm_scan, lambda k, n, t: [*matrices(k, n, t), gates(n), gates(n)], lambda k: (k, k)),
    "diagonal": (diagonal_scan, lambda k, n, t: [vectors(k, n, t)] * 2, lambda k: (k,)),
    "selective": (
        selective_scan,
        lambda k, n, t: [*[vectors(k, n, t)] * 2, jax.ShapeDtypeStruct((k, 3), jnp.float32), *[vectors(3, n, t)] * 2],
        lambda k: (k, 3),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_the_table_sends_its_calls_to_the_kernel(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That device, those sizes, that type, from that length on; what chooses a chunk, and other families, stay."""
    call, arrays, sizes = FAMILIES[family]
    row = auto.Rule(
        "pallas", device="^cpu$", family=family, sizes=(sizes(16),), dtypes=("bfloat16",), min_length=LENGTH
    )

    def taken(size: int = 16, length: int = LENGTH, dtype: Any = jnp.bfloat16, **options: Any) -> bool:
        try:
            jax.eval_shape(functools.partial(call, **options), *arrays(size, length, dtype))
        except Asked:
            return True
        return False

    monkeypatch.setattr(kernels, "_refuse", ask)

    assert not taken()
    monkeypatch.setattr(auto, "KERNELS", (row,))
    assert taken()
    assert taken(length=2 * LENGTH)
    for others in ({"size": 8}, {"length": LENGTH - 1}, {"dtype": jnp.float32}, {"chunk": 4}, {"method": "chunked"}):
        assert not taken(**others), others
    for changed in (row._replace(device="H100"), row._replace(family="another")):
        monkeypatch.setattr(auto, "KERNELS", (changed,))
        assert not taken(), changed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kernel_that_refuses_leaves_the_call_to_xla(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which there is none for CPUs: what was asked for by name raises still."""
    call, arrays, _ = FAMILIES[family]
    given = arrays(16, LENGTH, jnp.float32)
    run = lambda method: jax.eval_shape(lambda *x: call(*x, method=method), *given)
    expected = run("auto")
    monkeypatch.setattr(auto, "KERNELS", (auto.Rule("pallas"),))
    chex.assert_trees_all_equal_shapes_and_dtypes(run("auto"), expected)
    with pytest.raises(ValueError, match="method='pallas' for the"):
        run("pallas")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["auto", "pallas"])
def test_a_chunk_that_is_no_number_of_steps_is_named(family: str, method: str) -> None:
    call, arrays, _ = FAMILIES[family]
    with pytest.raises(ValueError, match=r"chunk is a number of steps of at least 1, not 64\.5"):
        jax.eval_shape(functools.partial(call, method=method, chunk=64.5), *arrays(16, LENGTH, jnp.float32))


def test_a_bonus_is_a_matter_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "KERNELS", (auto.Rule("pallas", device="cpu", family="outer_keys"),))
    arrays = FAMILIES["outer"][1](16, LENGTH, jnp.float32)
    run = lambda *x: gated_linear_attention(*x, bonus=jnp.ones((2, 16)))
    monkeypatch.setattr(kernels, "_refuse", ask)
    with pytest.raises(Asked):
        jax.eval_shape(run, *arrays)


def test_a_fixed_decay_has_the_length_of_what_drives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = jax.ShapeDtypeStruct((16,), jnp.float32), vectors(16, LENGTH, jnp.float32)
    run = lambda: jax.eval_shape(lambda *x: diagonal_scan(*x), *arrays)  # a function of its own, which no cache knows
    run()
    monkeypatch.setattr(auto, "KERNELS", (auto.Rule("pallas", device="cpu", family="diagonal", min_length=LENGTH),))
    monkeypatch.setattr(kernels, "_refuse", ask)
    with pytest.raises(Asked):
        run()


def test_a_program_is_made_for_the_mesh_or_for_the_default_device() -> None:
    last = jax.devices()[-1]
    assert compat.device() == jax.devices()[0]
    assert compat.on_cpu()
    with jax.default_device(last):
        assert compat.device() == last
    with jax.default_device("cpu"):
        assert compat.device() == jax.devices("cpu")[0]
    with jax.sharding.use_abstract_mesh(H100):
        assert "H100" in compat.device().device_kind
        assert not compat.on_cpu()
        assert auto.choose(matmul_form=False, length=1000) == "chunked"
    assert auto.choose(matmul_form=False, length=1000) == "sequential"
