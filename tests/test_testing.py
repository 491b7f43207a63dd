"""`check_recurrence` catches an error of one part in a thousand in whatever a law can see, and names the law."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.operators import Diagonal, Outer, diagonal_recurrence, outer_recurrence
from seqmodels.scan import Recurrence, scan
from seqmodels.testing import check_recurrence

T = 5
RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.normal(size=shape).astype(np.float32)

CASES: dict[str, tuple[Recurrence, Any, Any]] = {
    "diagonal": (diagonal_recurrence(), Diagonal(-np.exp(normal(T, 3)), normal(T, 3)), normal(3)),
    "outer": (outer_recurrence(), Outer(normal(T, 3), normal(T, 3), normal(T, 2), -np.exp(normal(T, 3))), normal(3, 2)),
    # Beside a strong decay the carried state is a thousandth of the whole; its errors must show all the same.
    "faint": (diagonal_recurrence(), Diagonal(np.full((T, 3), -7.0, np.float32), normal(T, 3)), normal(3)),
}


def _off(f: Callable[..., Any], leaf: int) -> Callable[..., Any]:
    """`f` with one leaf of its result wrong by 0.1 %."""

    def wrong(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(f(*args))
        leaves[leaf] = leaves[leaf] * 1.001
        return jax.tree.unflatten(structure, leaves)

    return wrong


@pytest.mark.parametrize("case", CASES)
def test_right_operators_pass_with_and_without_a_state(case: str) -> None:
    recurrence, inputs, state = CASES[case]
    check_recurrence(recurrence, inputs, state, reference=scan(recurrence, inputs, state, method="associative"))
    check_recurrence(recurrence, inputs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("field", "leaf", "law"),
    [
        ("combine", 0, "associativity|identity"),
        ("combine", 1, "associativity|identity"),
        ("act", 0, "action"),
        ("fold", 0, "fold"),
        ("fold", 1, "fold"),
        ("emit", 0, "emit"),
    ],
)
def test_an_error_of_a_thousandth_is_named(case: str, field: str, leaf: int, law: str) -> None:
    recurrence, inputs, state = CASES[case]
    wrong = recurrence._replace(**{field: _off(getattr(recurrence, field), leaf)})
    with pytest.raises(AssertionError, match=f"^({law}):"):
        check_recurrence(wrong, inputs, state)


def test_errors_in_one_term_are_named_by_their_law() -> None:
    recurrence, inputs, state = CASES["diagonal"]
    decay = lambda e: jnp.exp(e.log_decay)
    broken = {
        "associativity": {
            "combine": lambda a, b: Diagonal(a.log_decay + b.log_decay, decay(b) * a.drive * 1.001 + b.drive)
        },
        "identity": {"identity": lambda e: Diagonal(jnp.full_like(e.log_decay, -1e-3), jnp.zeros_like(e.drive))},
        "action": {"act": lambda e, s: decay(e) * s * 1.001 + e.drive},
        "update": {"update": lambda x, s: decay(x) * s + 1.001 * x.drive},
        "neutral": {"neutral": lambda x: Diagonal(jnp.full_like(x.log_decay, -1e-3), jnp.zeros_like(x.drive))},
    }
    for law, fields in broken.items():
        with pytest.raises(AssertionError, match=f"^({law}|identity):"):
            check_recurrence(recurrence._replace(**fields), inputs, state)


def test_resets_that_are_not_honoured_are_named() -> None:
    recurrence, inputs, state = CASES["outer"]
    for field in ("fold", "emit"):
        whole = getattr(recurrence, field)
        deaf = lambda *args, whole=whole: whole(*args[:-1], jnp.zeros_like(args[-1]))
        with pytest.raises(AssertionError, match=rf"^{field}:.*with resets at \["):
            check_recurrence(recurrence._replace(**{field: deaf}), inputs, state)
    elsewhere = recurrence._replace(initial=lambda x: jnp.full((*x.key.shape, *x.value.shape), 1e-2))
    with pytest.raises(AssertionError, match=r"^emit:"):
        check_recurrence(elsewhere, inputs, state)


def test_what_no_law_sees_needs_a_reference() -> None:
    recurrence, inputs, state = CASES["diagonal"]
    reference = scan(recurrence, inputs, state)
    plain = recurrence._replace(fold=None, emit=None)
    for wrong in (
        plain._replace(read=lambda s, x: 1.001 * s),
        plain._replace(elements=lambda x: Diagonal(x.log_decay, 1.001 * x.drive)),
    ):
        check_recurrence(wrong, inputs, state)
        with pytest.raises(AssertionError, match=r"^reference:"):
            check_recurrence(wrong, inputs, state, reference=reference)


def test_an_operator_that_computes_in_float32_is_not_refused_for_its_rounding() -> None:
    narrow = lambda f: lambda *args: jax.tree.map(lambda x: x.astype(jnp.float32), f(*args))
    recurrence, inputs, state = CASES["outer"]
    rounding = recurrence._replace(combine=narrow(recurrence.combine), act=narrow(recurrence.act))
    check_recurrence(rounding, inputs, state)
    with pytest.raises(AssertionError, match=r"^action:"):
        check_recurrence(rounding._replace(act=_off(rounding.act, 0)), inputs, state)


LOG_SUM_EXP = Recurrence(lambda x: x, jnp.logaddexp, lambda e: jnp.full_like(e, -jnp.inf))


@pytest.mark.parametrize(
    ("fields", "law"),
    [
        ({"identity": lambda e: jnp.full_like(e, jnp.inf)}, "identity"),
        ({"identity": lambda e: jnp.full_like(e, 0.0)}, "identity"),
        ({"update": lambda x, s: jnp.full_like(s, jnp.inf)}, "update"),
    ],
)
def test_infinities_are_values_like_others(fields: dict, law: str) -> None:
    check_recurrence(LOG_SUM_EXP, normal(T, 2))
    with pytest.raises(AssertionError, match=rf"^{law}:"):
        check_recurrence(LOG_SUM_EXP._replace(**fields), normal(T, 2))


def test_a_start_in_float32_does_not_loosen_the_laws() -> None:
    recurrence, _, _ = CASES["faint"]
    plain = recurrence._replace(fold=None, emit=None, initial=lambda x: jnp.zeros(3, jnp.float32))
    wrong = plain._replace(update=lambda x, s: 1.001 * jnp.exp(x.log_decay) * s + x.drive)
    check_recurrence(plain, CASES["faint"][1])
    with pytest.raises(AssertionError, match=r"^update:"):
        check_recurrence(wrong, CASES["faint"][1])


def test_float32_inside_jit_is_seen_too() -> None:
    recurrence, inputs, state = CASES["outer"]
    narrow = lambda f: jax.jit(lambda *args: jax.tree.map(lambda x: x.astype(jnp.float32), f(*args)))
    check_recurrence(recurrence._replace(combine=narrow(recurrence.combine), act=narrow(recurrence.act)), inputs, state)


def test_a_non_associative_operator_is_checked_as_a_tree() -> None:
    tree = Recurrence(
        lambda x: x, lambda a, b: jnp.tanh(a - b), jnp.zeros_like, read=lambda p, x: p[0], associative=False
    )
    check_recurrence(tree, normal(T, 2))
    with pytest.raises(AssertionError, match=r"^associativity:"):
        check_recurrence(tree._replace(associative=True, read=lambda s, x: s), normal(T, 2))


def test_too_few_steps_are_refused() -> None:
    recurrence, inputs, _ = CASES["diagonal"]
    with pytest.raises(ValueError, match="at least 4 steps to show, not 3"):
        check_recurrence(recurrence, jax.tree.map(lambda x: x[:3], inputs))
