"""`chunk_outer_keys` for Hopper GPUs with the bonus of RWKV-6: against a loop in float64, lowered without a device."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gpu import common, pairs
from kernels_pallas.gpu import outer_keys as gpu
from kernels_pallas.gpu.outer_keys import chunk_outer_keys, shared_memory
from kernels_pallas.outer_keys import reference
from seqmodels.operators import gated_linear_attention
from tests.kernels import test_gpu_outer_keys
from tests.kernels.common import assert_same, gpu_kernels_of, in_float64, packed, pulled
from tests.kernels.hopper import (
    STRICT,
    assert_it_says_why_not,
    interpreted,
    pretend_hopper,
    shared_memory_of,
)
from tests.kernels.test_gpu_outer import BFLOAT16
from tests.kernels.test_gpu_outer_keys import CASES

NAMES = (*test_gpu_outer_keys.NAMES, "d bonus")
REAL = [(8, 4096, 40, 64), (4, 2048, 16, 128), (8, 2048, 32, 256)]  # RWKV-6 of 3B and wider heads


def inputs(*sizes: int, batch: int = 1, groups: int = 1, heads: int = 1) -> tuple[list[Any], Any]:
    """`([query, key, value, log_decay, state, bonus], segment)`."""
    *arrays, segment = test_gpu_outer_keys.inputs(*sizes, batch=batch, groups=groups, heads=heads)
    return [*arrays, 1 + jax.random.normal(jax.random.key(7), (heads, sizes[1]))], segment


def run(segment: Any, *arrays: Any, save: bool = False, interpret: Any = STRICT) -> Any:
    *given, bonus = arrays
    return chunk_outer_keys(*given, segment, save, interpret, bonus)


def both(arrays: list[Any], segment: Any, save: bool = False) -> tuple[Any, Any]:
    """What the kernel finds, and what is right."""
    found = jax.jit(functools.partial(pulled, functools.partial(run, segment, save=save)))(*arrays)
    return found, in_float64(lambda *a: reference(*a, segment), *arrays, how=pulled)


@interpreted
@pytest.mark.parametrize(("length", "key_size", "value_size", "batch", "groups", "heads", "save"), CASES)
def test_the_kernel_equals_the_recurrence_in_float64(
    length: int, key_size: int, value_size: int, batch: int, groups: int, heads: int, save: bool
) -> None:
    """Outputs, the state, and all gradients, strictly; documents of one step and starts at a chunk's edges."""
    arrays, segment = inputs(length, key_size, value_size, batch=batch, groups=groups, heads=heads)
    found, right = both(arrays, segment, save)
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32, *(x.dtype for x in arrays)]
    if length == 1:  # of two rows the first goes on, the second starts: all that its gate could decay is gone
        assert float(jnp.max(jnp.abs(found[NAMES.index("d log_decay")][1]))) == 0
    assert_same(NAMES, found, right, BFLOAT16)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, -1e4, -jnp.inf], ids=str)
def test_gates_that_are_all_the_same(decay: float) -> None:
    """None, and none but the last two steps are left."""
    arrays, segment = inputs(70, 64, 64)
    arrays[3] = jnp.full_like(arrays[3], decay)
    found, right = both(arrays, segment)
    chex.assert_tree_all_finite(found)
    if decay < common.LOWEST:
        gates = NAMES.index("d log_decay")
        size = np.max(np.abs(right[gates - 1]))  # what is to cancel is as large as the other gradients
        assert np.max(np.abs(found[gates])) <= BFLOAT16 * size
        assert np.max(np.abs(right[gates])) == 0
        names, found, right = ((*x[:gates], *x[gates + 1 :]) for x in (NAMES, found, right))
    else:
        names = NAMES
    assert_same(names, found, right, BFLOAT16)


WRONG = {
    "starts that are not known": (gpu, "START", lambda right: common.LOWEST),
    "queries that decay by their own step": (pairs, "span_of", lambda right: lambda size, lag: right(size, 0)),
    "a twentieth of the bonus is lost": (pairs, "_bonus", lambda right: lambda *a: 0.95 * right(*a)),
}


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "wrong"), WRONG.values(), ids=WRONG)
def test_a_kernel_that_is_wrong_is_found(module: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a control of the tests above."""
    arrays, segment = inputs(66, 64, 64)
    right = jax.jit(reference)(*(x.astype(jnp.float32) for x in arrays), segment)
    found = lambda: jax.jit(functools.partial(run, segment))(*arrays)
    assert_same(NAMES, found(), right, BFLOAT16)
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    with pytest.raises(AssertionError, match="'out'"):
        assert_same(NAMES, found(), right, BFLOAT16)


@interpreted
@pytest.mark.slow
def test_a_gradient_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of log decays by a twentieth, as a control too."""
    right = pairs.write_parts
    monkeypatch.setattr(pairs, "write_parts", lambda near, values: right(near, 0.95 * values))
    with pytest.raises(AssertionError, match="'d log_decay'"):
        assert_same(NAMES, *both(*inputs(70, 64, 64)), BFLOAT16)


def shapes(*sizes: int) -> list[Any]:
    """The segment first, the bonus last."""
    *arrays, segment = test_gpu_outer_keys.shapes(*sizes)
    return [segment, *arrays, jax.ShapeDtypeStruct(sizes[2:], jnp.float32)]


def gradients(save: bool, segment: Any, *arrays: Any) -> Any:
    return pulled(functools.partial(run, segment, save=save, interpret=False), *arrays)


LOWERED = [
    pytest.param(shape, save, marks=[pytest.mark.slow] if save or shape != REAL[0] else [])
    for shape, save in itertools.product(REAL, (False, True))
]


@pytest.mark.parametrize(("shape", "save"), LOWERED, ids=str)
def test_the_kernel_lowers_for_an_h100_at_real_shapes(shape: tuple[int, ...], save: bool) -> None:
    """Two programs for the output and four for the gradients, or three with states kept, each in as much memory as is
    counted."""
    taken = shared_memory_of(functools.partial(gradients, save), *shapes(*shape))
    counted = shared_memory(shape[3], shape[3], bonus=True)
    order = ("weighed", "out", "weighed", *(() if save else ("states",)), "d_value", "gradients")
    assert all(x <= counted[name] for x, name in zip(taken, order, strict=True))


@pytest.mark.parametrize(("key_size", "value_size"), list(itertools.product(common.SIZES, repeat=2)))
def test_programs_fit_into_shared_memory(key_size: int, value_size: int) -> None:
    assert max(shared_memory(key_size, value_size, bonus=True).values()) < common.SHARED


def test_errors_name_the_shapes() -> None:
    *arrays, _ = shapes(1, 64, 2, 64)
    with pytest.raises(ValueError, match=r"chunk_outer_keys_bonus: bonus \(2, 63\), not \(2, 64\)"):
        jax.eval_shape(functools.partial(gradients, False), *arrays, jax.ShapeDtypeStruct((2, 63), jnp.float32))


def called(dtype: Any = jnp.bfloat16, size: int = 64) -> list[Any]:
    """The arguments of a family's call: query, key, value, log_decay, state, bonus."""
    (*wide, state, bonus), _ = inputs(20, 64, 64, batch=2, groups=1, heads=2)
    query, key, value, log_decay = (jnp.swapaxes(x[..., :size], 1, 2) for x in wide)
    return [*(x.astype(dtype) for x in (query, key, value)), log_decay, state[..., :size, :size], bonus[:, :size]]


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["per key", "per head"])
def test_the_family_calls_it_on_a_hopper(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents and padding that is NaN, as a loop over tokens has them, gradients and all."""
    segments, poison = packed()
    *given, state, bonus = called()
    given[3] = given[3] if kind == "per key" else given[3][..., 0]
    arrays = [*map(poison, given), state, bonus]

    def found_by(method: str) -> Any:
        family = functools.partial(gated_linear_attention, segments=segments, method=method)
        return jax.jit(functools.partial(pulled, lambda *a: family(*a[:5], bonus=a[5])))(*arrays)

    right = found_by("sequential")
    pretend_hopper(monkeypatch)
    found = found_by("pallas")
    assert_same(NAMES, found, right, BFLOAT16)
    chex.assert_trees_all_equal(found[0][1, 18:], jnp.zeros_like(found[0][1, 18:]))


@pytest.mark.parametrize("kind", ["per key", *(pytest.param(x, marks=pytest.mark.slow) for x in ("per head", "none"))])
def test_the_family_lowers_to_it(kind: str) -> None:
    decays = {"per key": lambda g: g, "per head": lambda g: g[..., 0], "none": lambda g: None}[kind]

    def call(q: Any, k: Any, v: Any, g: Any, state: Any, bonus: Any) -> Any:
        return gated_linear_attention(q, k, v, decays(g), state, bonus=bonus, method="pallas")

    assert gpu_kernels_of(call, *jax.eval_shape(called)) == 2


def test_the_family_says_why_it_does_not_serve() -> None:
    def call(arrays: Any, **changes: Any) -> Any:
        return gated_linear_attention(*arrays[:5], bonus=arrays[5], method="pallas", **changes)

    assert_it_says_why_not(call, lambda *a: jax.eval_shape(functools.partial(called, *a)))
