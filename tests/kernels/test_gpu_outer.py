"""`chunk_outer` for Hopper GPUs: interpreted against a loop in float64, lowered without a device."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import outer as tpu
from kernels_pallas.gpu import common, walk
from kernels_pallas.gpu import outer as gpu
from kernels_pallas.gpu.outer import chunk_outer, shared_memory
from seqmodels.operators import gated_linear_attention
from tests.kernels.common import REAL, assert_same, gpu_kernels_of, ids_of, in_float64, pulled
from tests.kernels.hopper import (
    STRICT,
    assert_it_says_why_not,
    assert_the_family_calls_it,
    interpreted,
    shared_memory_of,
)

# bfloat16 keeps 8 bits (4e-3) of scores, weighted values and states in every product, and of the outputs.
BFLOAT16 = 1e-2
# Sums of gates in float32, of which exp is taken: 24 bits, twice.
GATES = 2e-7
NAMES = ("out", "state", "d query", "d key", "d value", "d log_decay", "d state")


def inputs(length: int, key_size: int, value_size: int, *, batch: int, groups: int, heads: int) -> list[Any]:
    """Decays from none to -inf; documents that go on, and of one step, at a chunk's edges too."""
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (batch, groups, length, key_size)
    query, key = (jax.random.normal(k, shape, jnp.bfloat16) * key_size**-0.25 for k in keys[:2])
    value = jax.random.normal(keys[2], (batch, heads, length, value_size), jnp.bfloat16)
    noise = jax.random.normal(keys[3], (batch, heads, length))
    log_decay = jnp.where(noise > 1.8, -jnp.inf, -jnp.exp(4 * noise - 3))
    state = jax.random.normal(keys[4], (batch, heads, key_size, value_size))
    start = np.zeros((batch, length), bool)
    rows = ((3, 4, 63, 64, 65), (0, length - 1)) if batch > 1 else ((3, 4, 68),)  # one goes on over a chunk's edge
    for row, places in enumerate(rows[:batch]):
        start[row, [place for place in places if place < length]] = True
    return [query, key, value, log_decay, state, ids_of(start)]


CASES = [
    # length, key and value size, batch, groups, heads
    pytest.param(70, 64, 64, 1, 1, 1, id="a chunk and a part"),
    *(
        pytest.param(*case, id=name, marks=pytest.mark.slow)
        for name, case in {
            "one step": (1, 64, 64, 2, 1, 2),
            "whole chunks, heads that share": (192, 64, 64, 2, 1, 2),
            "two blocks": (200, 64, 128, 1, 2, 2),
            "wide keys": (130, 256, 64, 1, 1, 1),
            "wide values": (130, 128, 256, 1, 1, 1),
            "two blocks of both": (130, 128, 128, 1, 1, 1),
            "the widest": (130, 256, 256, 1, 1, 1),
        }.items()
    ),
]


@interpreted
@pytest.mark.parametrize(("length", "key_size", "value_size", "batch", "groups", "heads"), CASES)
def test_the_kernel_equals_the_recurrence_in_float64(
    length: int, key_size: int, value_size: int, batch: int, groups: int, heads: int
) -> None:
    """Outputs, the state, and all gradients, strictly."""
    arrays = inputs(length, key_size, value_size, batch=batch, groups=groups, heads=heads)
    run = lambda *a: chunk_outer(*a, arrays[5], STRICT)
    found = jax.jit(functools.partial(pulled, run))(*arrays[:5])
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32, *(x.dtype for x in arrays[:5])]
    right = in_float64(lambda *a: tpu.reference(*a, arrays[5]), *arrays[:5], how=pulled)
    assert_same(NAMES, found, right, BFLOAT16)


WRONG = [
    pytest.param(
        gpu,
        "gates_of",
        lambda right: lambda *a: right(*a).at[..., walk.CARRIED, -1].multiply(0.95),
        id="a twentieth of the state is lost between chunks",
    ),
    pytest.param(
        walk,
        "chunk_decays",
        lambda right: lambda *a: jnp.maximum(right(*a), 0.1),
        id="what comes after a step is seen",
        marks=pytest.mark.slow,
    ),
]


@interpreted
@pytest.mark.parametrize(("module", "name", "wrong"), WRONG)
def test_a_kernel_that_is_wrong_is_found(module: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a control of the test above."""
    arrays = inputs(66, 64, 64, batch=1, groups=1, heads=1)
    arrays[3], arrays[5] = jnp.full_like(arrays[3], -0.001), jnp.zeros_like(arrays[5])
    found = jax.jit(tpu.reference)(*(x.astype(jnp.float32) for x in arrays[:5]), arrays[5])
    run = lambda: jax.jit(lambda *a: chunk_outer(*a, STRICT))(*arrays)
    assert_same(NAMES, run(), found, BFLOAT16)
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    with pytest.raises(AssertionError, match="'out'"):
        assert_same(NAMES, run(), found, BFLOAT16)


@interpreted
@pytest.mark.slow
def test_a_gradient_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the state loses a twentieth between chunks, as a control too; what does not depend on it is right."""
    *arrays, segment = inputs(66, 64, 64, batch=1, groups=1, heads=1)
    arrays[3], segment = jnp.full_like(arrays[3], -0.001), jnp.zeros_like(segment)
    right = gpu.walk

    def wrong(kind: walk.Walk, interpret: Any, *arrays: Any, **others: Any) -> Any:
        if kind.backward:
            lost = arrays[3].at[..., walk.CARRIED, -1].multiply(0.95)
            arrays = (*arrays[:3], lost, *arrays[4:])
        return right(kind, interpret, *arrays, **others)

    monkeypatch.setattr(gpu, "walk", wrong)
    found = jax.jit(functools.partial(pulled, lambda *a: chunk_outer(*a, segment, STRICT)))(*arrays)
    expected = in_float64(lambda *a: tpu.reference(*a, segment), *arrays, how=pulled)
    with pytest.raises(AssertionError, match="'d key'"):
        assert_same(NAMES, found, expected, BFLOAT16)


def test_differences_of_sums_lose_no_digits() -> None:
    """Small decays beside large ones, exp(-inf) and starts: every sum between two steps, against float64."""
    log_decay = -jnp.exp(jax.random.uniform(jax.random.key(1), (3, 128), minval=-14, maxval=5))
    log_decay = log_decay.at[0, ::7].set(-jnp.inf).at[1].set(-100.0).at[2, 1::2].set(-1e-4)
    start = jnp.zeros((3, 128), bool).at[2, jnp.array([0, 5, 64])].set(True)
    high, low = (np.asarray(x) for x in common.sums_of(log_decay, start))
    assert high.dtype == low.dtype == np.float32
    found = (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
    clipped = np.where(start, common.LOWEST, np.maximum(np.asarray(log_decay, np.float64), common.LOWEST))
    wide = np.cumsum(clipped.reshape(3, 2, 64), axis=-1)
    right = np.tril(wide[..., :, None] - wide[..., None, :])
    assert np.all(np.abs(np.tril(found) - right) <= GATES * (1 + np.abs(right)))
    naive = np.cumsum(clipped.reshape(3, 2, 64), axis=-1, dtype=np.float32)
    lost = np.abs(np.tril(naive[..., :, None] - naive[..., None, :]) - right)
    assert np.max(lost) > 100 * GATES


def shapes(
    batch: int, length: int, heads: int, size: int, *, groups: int | None = None, dtype: Any = "bfloat16"
) -> Any:
    of = jax.ShapeDtypeStruct
    keys = [of((batch, groups or heads, length, size), dtype)] * 2
    gates = of((batch, heads, length), jnp.float32), of((batch, heads, size, size), jnp.float32)
    return [*keys, of((batch, heads, length, size), dtype), *gates, of((batch, length), jnp.int32)]


def gradients(*arrays: Any) -> Any:
    loss = lambda *a: sum(jnp.sum(x.astype(jnp.float32)) for x in chunk_outer(*a, arrays[5]))
    return jax.value_and_grad(loss, (0, 1, 2, 3, 4))(*arrays[:5])


@pytest.mark.parametrize("shape", [*REAL[:1], *(pytest.param(x, marks=pytest.mark.slow) for x in REAL[1:])], ids=str)
def test_the_kernel_lowers_for_an_h100_at_real_shapes(shape: tuple[int, ...]) -> None:
    """One program for the output and three for the gradients, on any host, each in as much memory as is counted; with
    heads that share keys too."""
    taken = shared_memory_of(gradients, *shapes(*shape))
    counted = shared_memory(shape[3], shape[3]).values()
    assert all(x <= y for x, y in zip(taken, counted, strict=True))
    assert gpu_kernels_of(chunk_outer, *shapes(*shape, groups=shape[2] // 4)) == 1


@pytest.mark.parametrize(("key_size", "value_size"), list(itertools.product(common.SIZES, repeat=2)))
def test_programs_fit_into_shared_memory(key_size: int, value_size: int) -> None:
    assert max(shared_memory(key_size, value_size).values()) < common.SHARED


def test_errors_say_what_the_kernel_takes() -> None:
    with pytest.raises(ValueError, match="takes bfloat16 and heads of 64, 128, 256, but query is float32 and key is"):
        jax.eval_shape(chunk_outer, *shapes(1, 64, 2, 64, dtype="float32"))
    with pytest.raises(ValueError, match="but that of keys is 96 and that of values is 96"):
        jax.eval_shape(chunk_outer, *shapes(1, 64, 2, 96))
    arrays = shapes(1, 64, 2, 64)
    with pytest.raises(ValueError, match=r"log_decay \(1, 2, 64, 64\), not \(1, 2, 64\)"):
        jax.eval_shape(chunk_outer, *arrays[:3], jax.ShapeDtypeStruct((1, 2, 64, 64), jnp.float32), *arrays[4:])


def called(dtype: Any = jnp.bfloat16, size: int = 64) -> list[Any]:
    """The arguments of the family's call."""
    query, key, value, log_decay, *_ = inputs(20, 64, 64, batch=2, groups=1, heads=2)
    query, key, value = (x[..., :size].astype(dtype) for x in (query, key, value))
    return [jnp.swapaxes(x, 1, 2) for x in (query, key, value, log_decay)]


def family(arrays: Any, **options: Any) -> Any:
    return gated_linear_attention(*arrays, **options)


@interpreted
@pytest.mark.slow
def test_the_family_calls_it_on_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents and padding that is NaN, as `auto` has them."""
    assert_the_family_calls_it(family, called(), BFLOAT16, monkeypatch)


def test_the_family_lowers_to_it_and_says_why_it_does_not_serve() -> None:
    shaped = lambda *a: jax.eval_shape(functools.partial(called, *a))
    run = functools.partial(family, method="pallas")
    assert gpu_kernels_of(run, shaped()) == 1
    assert_it_says_why_not(run, shaped)
