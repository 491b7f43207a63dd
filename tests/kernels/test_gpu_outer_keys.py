"""`chunk_outer_keys` for Hopper GPUs: interpreted against a loop in float64, lowered without a device."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import outer as tpu
from kernels_pallas.gpu import common, pairs
from kernels_pallas.gpu import outer_keys as gpu
from kernels_pallas.gpu.outer_keys import chunk_outer_keys, gates_of, shared_memory
from tests.kernels.common import REAL, assert_same, gpu_kernels_of, in_float64, pulled
from tests.kernels.hopper import (
    STRICT,
    assert_it_says_why_not,
    assert_the_family_calls_it,
    interpreted,
    shared_memory_of,
)
from tests.kernels.test_gpu_outer import BFLOAT16, NAMES, family
from tests.kernels.test_gpu_outer import inputs as inputs_per_head
from tests.kernels.test_gpu_outer import shapes as shapes_per_head

# Two bfloat16 have 16 bits, and half of the last is lost.
TWO_BFLOAT16 = 2.0**-17


def inputs(*sizes: int, batch: int, groups: int, heads: int) -> list[Any]:
    """Those of a decay per head, documents and all, with decays per key from none to -inf."""
    arrays = inputs_per_head(*sizes, batch=batch, groups=groups, heads=heads)
    noise = jax.random.normal(jax.random.key(1), (*arrays[2].shape[:3], arrays[0].shape[3]))
    arrays[3] = jnp.where(noise > 1.8, -jnp.inf, -jnp.exp(4 * noise - 3))
    return arrays


CASES = [
    # length, key and value size, batch, groups, heads, whether states are kept
    pytest.param(70, 64, 64, 1, 1, 1, False, id="a chunk and a part"),
    *(
        pytest.param(*case, id=name, marks=pytest.mark.slow)
        for name, case in {
            "one step": (1, 64, 64, 2, 1, 2, False),
            "whole chunks, heads that share": (192, 64, 64, 2, 1, 2, False),
            "two blocks of values, states kept": (200, 64, 128, 1, 2, 2, True),
            "wide keys": (130, 256, 64, 1, 1, 1, False),
            "wide values": (130, 128, 256, 1, 1, 1, True),
        }.items()
    ),
]
# Not with a bonus, whose walk is this one.
WIDE = [
    pytest.param(130, 128, 128, 1, 1, 1, False, id="two blocks of both", marks=pytest.mark.slow),
    pytest.param(130, 256, 256, 1, 1, 1, True, id="the widest", marks=pytest.mark.slow),
]


@interpreted
@pytest.mark.parametrize(("length", "key_size", "value_size", "batch", "groups", "heads", "save"), [*CASES, *WIDE])
def test_the_kernel_equals_the_recurrence_in_float64(
    length: int, key_size: int, value_size: int, batch: int, groups: int, heads: int, save: bool
) -> None:
    """Outputs, the state, and all gradients, strictly."""
    arrays = inputs(length, key_size, value_size, batch=batch, groups=groups, heads=heads)
    run = lambda *a: chunk_outer_keys(*a, arrays[5], save, STRICT)
    found = jax.jit(functools.partial(pulled, run))(*arrays[:5])
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32, *(x.dtype for x in arrays[:5])]
    right = in_float64(lambda *a: tpu.reference(*a, arrays[5]), *arrays[:5], how=pulled)
    assert_same(NAMES, found, right, BFLOAT16)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, -0.3, -1e4, -jnp.inf], ids=str)
def test_gates_that_are_all_the_same(decay: float) -> None:
    """None, and none but the last step is left."""
    arrays = inputs(70, 64, 64, batch=1, groups=1, heads=1)
    arrays[3] = jnp.full_like(arrays[3], decay)
    run = lambda *a: chunk_outer_keys(*a, arrays[5], False, STRICT)
    found = jax.jit(functools.partial(pulled, run))(*arrays[:5])
    right = in_float64(lambda *a: tpu.reference(*a, arrays[5]), *arrays[:5], how=pulled)
    chex.assert_tree_all_finite(found)
    gates = NAMES.index("d log_decay")
    if decay < common.LOWEST:
        size = np.max(np.abs(right[gates - 1]))  # what is to cancel is as large as the other gradients
        assert np.max(np.abs(found[gates])) <= BFLOAT16 * size
        assert np.max(np.abs(found[gates + 1])) == np.max(np.abs(right[gates + 1])) == np.max(np.abs(right[gates])) == 0
        names, found, right = (x[:gates] for x in (NAMES, found, right))
    else:
        names = NAMES
    assert_same(names, found, right, BFLOAT16)


def _lost(gates: Any) -> Any:
    """A twentieth of the state between chunks."""
    high, low, kept = gates
    return high, low, 0.95 * kept


WRONG = [
    pytest.param(gpu, "gates_of", lambda right: lambda *a: _lost(right(*a)), id="a twentieth of the state is lost"),
    pytest.param(pairs, "LEVELS", lambda right: right[:-1], id="halves do not meet", marks=pytest.mark.slow),
    pytest.param(
        pairs,
        "span_of",
        lambda right: lambda size, lag: right(size, lag) & right(2 * size, lag),
        id="sums that are too short",
        marks=pytest.mark.slow,
    ),
]


@interpreted
@pytest.mark.parametrize(("module", "name", "wrong"), WRONG)
def test_a_kernel_that_is_wrong_is_found(module: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a control of the tests above."""
    arrays = inputs(66, 64, 64, batch=1, groups=1, heads=1)
    arrays[3], arrays[5] = jnp.full_like(arrays[3], -0.01), jnp.zeros_like(arrays[5])
    found = jax.jit(tpu.reference)(*(x.astype(jnp.float32) for x in arrays[:5]), arrays[5])
    run = lambda: jax.jit(lambda *a: chunk_outer_keys(*a, False, STRICT))(*arrays)
    assert_same(NAMES, run(), found, BFLOAT16)
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    with pytest.raises(AssertionError, match=r"'(out|state)'"):
        assert_same(NAMES, run(), found, BFLOAT16)


@interpreted
@pytest.mark.slow
def test_a_gradient_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of log decays by a twentieth, as a control too."""
    right = pairs.write_parts
    monkeypatch.setattr(pairs, "write_parts", lambda near, values: right(near, 0.95 * values))
    with pytest.raises(AssertionError, match="'d log_decay'"):
        test_the_kernel_equals_the_recurrence_in_float64(70, 64, 64, batch=1, groups=1, heads=1, save=False)


def test_gates_keep_their_digits_under_jit() -> None:
    """Small decays beside large ones, exp(-inf) and starts, as two bfloat16; and the decay over a chunk."""
    log_decay = -jnp.exp(jax.random.uniform(jax.random.key(1), (2, 128, 1, 8), minval=-14, maxval=5))
    log_decay = log_decay.at[0, ::7].set(-jnp.inf).at[1, :64].multiply(1e-3)
    segment = jnp.zeros((2, 128), jnp.int32).at[1, 100:].set(1)
    high, low, kept = (np.asarray(x, np.float64) for x in jax.jit(gates_of)(log_decay, segment))
    right = np.maximum(np.asarray(log_decay, np.float64), common.LOWEST)
    right[1, 100] = gpu.START
    assert np.all(np.abs(high + low - right) <= TWO_BFLOAT16 * np.abs(right))
    assert np.max(np.abs(low)) > 0
    whole = np.exp(np.sum(right.reshape(2, 2, 64, 1, 8), axis=2)).swapaxes(1, 2)
    np.testing.assert_allclose(kept, whole, rtol=1e-5, atol=1e-30)  # float32, through the exponent


def shapes(*sizes: int, groups: int | None = None, dtype: Any = "bfloat16") -> Any:
    arrays = shapes_per_head(*sizes, groups=groups, dtype=dtype)
    arrays[3] = jax.ShapeDtypeStruct((*arrays[2].shape[:3], arrays[0].shape[3]), jnp.float32)
    return arrays


LOWERED = [
    pytest.param(shape, save, marks=[pytest.mark.slow] if save or shape != REAL[0] else [])
    for shape, save in itertools.product(REAL, (False, True))
]


@pytest.mark.parametrize(("shape", "save"), LOWERED, ids=str)
def test_the_kernel_lowers_for_an_h100_at_real_shapes(shape: tuple[int, ...], save: bool) -> None:
    """Two programs for the output and four for the gradients, or three with states kept; heads share queries."""

    def gradients(*arrays: Any) -> Any:
        loss = lambda *a: sum(jnp.sum(x.astype(jnp.float32)) for x in chunk_outer_keys(*a, arrays[5], save))
        return jax.value_and_grad(loss, (0, 1, 2, 3, 4))(*arrays[:5])

    taken = shared_memory_of(gradients, *shapes(*shape, groups=shape[2] // 4))
    assert len(taken) == (5 if save else 6)
    assert max(taken) <= max(shared_memory(shape[3], shape[3]).values())


@pytest.mark.parametrize(("key_size", "value_size"), list(itertools.product(common.SIZES, repeat=2)))
def test_programs_fit_into_shared_memory(key_size: int, value_size: int) -> None:
    assert max(shared_memory(key_size, value_size).values()) < common.SHARED


def test_errors_say_what_the_kernel_takes() -> None:
    with pytest.raises(ValueError, match="takes bfloat16 and heads of 64, 128, 256, but query is float32 and key is"):
        jax.eval_shape(chunk_outer_keys, *shapes(1, 64, 2, 64, dtype="float32"))
    with pytest.raises(ValueError, match="but that of keys is 96 and that of values is 96"):
        jax.eval_shape(chunk_outer_keys, *shapes(1, 64, 2, 96))
    arrays = shapes(1, 64, 2, 64)
    with pytest.raises(ValueError, match=r"log_decay \(1, 2, 64\), not \(1, 2, 64, 64\)"):
        jax.eval_shape(chunk_outer_keys, *arrays[:3], jax.ShapeDtypeStruct((1, 2, 64), jnp.float32), *arrays[4:])


def called(dtype: Any = jnp.bfloat16, size: int = 64) -> list[Any]:
    """The arguments of the family's call."""
    query, key, value, log_decay, *_ = inputs(20, 64, 64, batch=2, groups=1, heads=2)
    narrow = [x[..., :size].astype(dtype) for x in (query, key, value)]
    return [jnp.swapaxes(x, 1, 2) for x in (*narrow, log_decay[..., :size])]


@interpreted
@pytest.mark.slow
def test_the_family_calls_it_on_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents and padding that is NaN, as `auto` has them."""
    assert_the_family_calls_it(family, called(), BFLOAT16, monkeypatch)


def test_the_family_lowers_to_it_and_says_why_it_does_not_serve() -> None:
    shaped = lambda *a: jax.eval_shape(functools.partial(called, *a))
    run = functools.partial(family, method="pallas")
    assert gpu_kernels_of(run, shaped()) == 2
    assert_it_says_why_not(run, shaped)
