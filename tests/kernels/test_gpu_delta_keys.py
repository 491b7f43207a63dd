"""`chunk_delta_keys` for Hopper GPUs: interpreted against a loop in float64, lowered without a device."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import delta as tpu
from kernels_pallas.gpu import common, delta_keys, delta_keys_pairs, delta_program
from kernels_pallas.gpu.delta_keys import chunk_delta_keys, shared_memory
from tests.kernels.common import REAL, assert_same, gpu_kernels_of, in_float64, pulled
from tests.kernels.hopper import (
    STRICT,
    assert_it_says_why_not,
    assert_the_family_calls_it,
    interpreted,
    shared_memory_of,
)
from tests.kernels.test_delta import NAMES, shapes
from tests.kernels.test_delta import inputs as inputs_of
from tests.kernels.test_gpu_delta import STIFF, STIFF_DECAY, family, one_term
from tests.kernels.test_gpu_delta import called as called_of
from tests.kernels.test_gpu_outer import BFLOAT16

called = functools.partial(called_of, per_key=True)


def inputs(*sizes: int, batch: int = 1, heads: int = 1, stiff: bool = False) -> list[Any]:
    """Those of a decay per head, with decays per key; two heads share their keys."""
    query, key, *others, segment = inputs_of(*sizes, batch=batch, dtype=jnp.bfloat16, per_key=True, stiff=stiff)
    return [query, key, *(x[:, :heads] for x in others), segment]


@functools.cache
def pulled_kernel(save: bool) -> Any:
    """Outputs, the state, and all gradients, strictly; compiled once for tests of the same shapes."""
    return jax.jit(lambda *arrays: pulled(lambda *a: chunk_delta_keys(*a, arrays[6], save, STRICT), *arrays[:6]))


def expected(arrays: list[Any]) -> Any:
    return in_float64(lambda *a: tpu.reference(*a, arrays[6]), *arrays[:6], how=pulled)


def compared(arrays: list[Any], save: bool) -> tuple[Any, Any]:
    """Of the kernels, and of the loop in float64."""
    found = pulled_kernel(save)(*arrays)
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32, *(x.dtype for x in arrays[:6])]
    return found, expected(arrays)


CASES = [
    # length, key and value size, batch, heads, whether keys are almost one, whether states are kept
    pytest.param(5, 64, 64, 1, 2, False, True, id="a part of a chunk, heads that share"),
    *(
        pytest.param(*case, id=name, marks=pytest.mark.slow)
        for name, case in {
            "one step": (1, 64, 64, 2, 2, False, True),
            "three chunks, states made again": (130, 64, 64, 1, 1, False, False),
            "wide keys": (66, 256, 64, 1, 1, False, True),
            "wide values": (66, 128, 256, 1, 1, False, True),
            "steps that turn round what was just written": (130, 64, 64, 1, 1, True, False),
        }.items()
    ),
]


@interpreted
@pytest.mark.parametrize(("length", "key_size", "value_size", "batch", "heads", "stiff", "save"), CASES)
def test_the_kernels_equal_the_recurrence_in_float64(
    length: int, key_size: int, value_size: int, batch: int, heads: int, stiff: bool, save: bool
) -> None:
    """Documents go on, and are of one step, at a chunk's edges too."""
    found, right = compared(inputs(length, key_size, value_size, batch=batch, heads=heads, stiff=stiff), save)
    for name, x, y in zip(NAMES, found, right, strict=True):
        cancelled = STIFF_DECAY if name == "d log_decay" else STIFF
        assert_same((name,), [x], [y], cancelled if stiff else BFLOAT16)


@interpreted
@pytest.mark.slow
def test_gates_at_their_ends() -> None:
    """Keys without decay, and keys that forget all in every step, as far as float32 sees, or by exp(-inf)."""
    arrays = inputs(130, 64, 64)
    arrays[4] = jnp.zeros_like(arrays[4]).at[..., :16].set(-jnp.inf).at[..., 16:32].set(-1e4)
    found, right = compared(arrays, False)
    chex.assert_tree_all_finite(found)
    assert_same(NAMES, found, right, BFLOAT16)


def _lost(right: Any) -> Any:
    """A twentieth of the state between chunks."""

    def wrong(*arrays: Any) -> Any:
        high, low, kept = right(*arrays)
        return high, low, 0.95 * kept

    return wrong


WRONG = {
    "a twentieth of the state is lost between chunks": (delta_keys, "gates_of", _lost),
    "halves do not meet": (delta_keys_pairs, "LEVELS", lambda right: right[:-1]),
    "what is left of a write counts whole": (delta_program, "split", lambda right: one_term),
}


@functools.cache
def control() -> tuple[Any, Any]:
    """Arrays in two chunks of one document, and what the recurrence gives; the kernels give that too."""
    arrays = inputs(66, 64, 64)
    arrays[4], arrays[6] = jnp.full_like(arrays[4], -0.001), jnp.zeros_like(arrays[6])
    right = jax.jit(tpu.reference)(*(x.astype(jnp.float32) for x in arrays[:6]), arrays[6])
    assert_same(NAMES, chunk_delta_keys(*arrays, False, STRICT), right, BFLOAT16)
    return arrays, right


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "wrong"), WRONG.values(), ids=WRONG)
def test_a_kernel_that_is_wrong_is_found(module: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a control of the first test."""
    arrays, right = control()
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    with pytest.raises(AssertionError, match="'out'"):
        assert_same(NAMES, chunk_delta_keys(*arrays, False, STRICT), right, BFLOAT16)


@interpreted
@pytest.mark.slow
def test_a_gradient_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of log decays by a twentieth, as a control too."""
    right = delta_keys_pairs.write_parts
    monkeypatch.setattr(delta_keys_pairs, "write_parts", lambda near, values: right(near, 0.95 * values))
    arrays = inputs(5, 64, 64)
    found = pulled_kernel.__wrapped__(True)(*arrays)  # compiled anew
    with pytest.raises(AssertionError, match="'d log_decay'"):
        assert_same(NAMES, found, expected(arrays), BFLOAT16)


def gradients(*arrays: Any, save: bool = False) -> Any:
    run = functools.partial(chunk_delta_keys, save_states=save)
    loss = lambda *a: sum(jnp.sum(x.astype(jnp.float32)) for x in run(*a, arrays[6]))
    return jax.value_and_grad(loss, tuple(range(6)))(*arrays[:6])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [REAL[0], REAL[4]], ids=str)
def test_the_kernels_lower_for_an_h100_at_real_shapes(shape: tuple[int, ...]) -> None:
    """Scores, inverses and a walk forward; backward those again, then inverses, a walk and gradients: each in as much
    memory as is counted."""
    taken = shared_memory_of(gradients, *shapes("per key", *shape, "bfloat16"))
    counted = shared_memory(shape[3], shape[3])
    made = ("weighed", "inverses", "forward")
    order = (*made, *made, "inverses", "backward", "gradients")
    assert all(x <= counted[name] for x, name in zip(taken, order, strict=True))


def test_fewer_kernels_run_where_states_are_kept() -> None:
    """The backward pass has four of its own; and heads that share keys."""
    query, key, *others = shapes("per key", *REAL[3], "bfloat16")
    shared = [jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // 4, *x.shape[2:]), x.dtype) for x in (query, key)]
    assert gpu_kernels_of(functools.partial(gradients, save=True), *shared, *others) == 7


@pytest.mark.parametrize(("key_size", "value_size"), list(itertools.product(common.SIZES, repeat=2)))
def test_programs_fit_into_shared_memory(key_size: int, value_size: int) -> None:
    assert max(shared_memory(key_size, value_size).values()) < common.SHARED


def test_errors_say_what_the_kernel_takes() -> None:
    with pytest.raises(ValueError, match="takes bfloat16 and heads of 64, 128, 256, but query is float32 and key is"):
        jax.eval_shape(chunk_delta_keys, *shapes("per key", 1, 64, 2, 64, "float32"))
    with pytest.raises(ValueError, match="but that of keys is 96 and that of values is 96"):
        jax.eval_shape(chunk_delta_keys, *shapes("per key", 1, 64, 2, 96, "bfloat16"))
    with pytest.raises(ValueError, match=r"log_decay \(1, 2, 64\), not \(1, 2, 64, 64\)"):
        jax.eval_shape(chunk_delta_keys, *shapes("per head", 1, 64, 2, 64, "bfloat16"))


@interpreted
@pytest.mark.slow
def test_the_family_calls_it_on_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents and padding that is NaN, as `sequential` has them."""
    assert_the_family_calls_it(family, called(), BFLOAT16, monkeypatch)


def test_the_family_lowers_to_it_and_says_why_it_does_not_serve() -> None:
    shaped = lambda *a: jax.eval_shape(functools.partial(called, *a))
    run = functools.partial(family, method="pallas")
    assert gpu_kernels_of(run, shaped()) == 3
    assert_it_says_why_not(run, shaped)
