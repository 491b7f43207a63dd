"""Chunked forms of matrix families at the head sizes of models, against loops in float64; gradients by single steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.operators import delta_rule, gated_linear_attention, mlstm_scan
from seqmodels.operators.exponential import ExponentialState
from seqmodels.typing import Segments
from tests.kernels.common import assert_same
from tests.operators import test_delta, test_exponential, test_families

# float32 rounding (6e-8) through 70 steps and sums of up to 256 products, relative to the largest entry of an array.
ROUNDING = 2e-6
# Gradients pass the recurrence twice, and those of gates are sums in which terms cancel.
GRADIENT = 1e-5
T, H = 70, 2  # a chunk and a part
SEGMENTS = Segments(jnp.arange(T)[None] == 40, jnp.ones((1, T), bool))  # the second document goes on into the part


def _inputs(family: str, size: int) -> list[np.ndarray]:
    """Arrays of a call and, last, those of its state; what sums over a head is of one size for all sizes."""
    normal = np.random.default_rng(size).standard_normal
    query, key, value = (normal((1, T, H, size)) for _ in range(3))
    log_decay = -np.exp(normal((1, T, H, size) if family.endswith("per key") else (1, T, H)) - 3)
    state = normal((1, H, size, size))
    if family == "exponential":  # queries and keys lean to one side, as in its own test
        query, key = (query + 2) / size, key + 2
        arrays = [query, key, value, 2 * normal((1, T, H)), log_decay, normal((1, H)), 1 + normal((1, H, size)), state]
    elif family.startswith("delta"):
        key = key / np.linalg.norm(key, axis=-1, keepdims=True)
        arrays = [query * size**-0.5, key, value, np.random.default_rng(0).uniform(0, 2, (1, T, H)), log_decay, state]
    else:
        arrays = [query * size**-0.5, key * size**-0.5, value, log_decay, state]
    return [x.astype(np.float32) for x in arrays]


def _outer_loop(*arrays: Any) -> Any:
    return test_families._linear_attention_loop(*arrays, segments=SEGMENTS)


def _delta_loop(*arrays: Any) -> Any:
    return test_delta._loop(test_delta._delta_step, arrays[:5], arrays[5], SEGMENTS)


def _exponential(*arrays: Any, **options: Any) -> Any:
    return mlstm_scan(*arrays[:5], ExponentialState(*arrays[5:]), **options)


def _exponential_loop(*arrays: Any) -> Any:
    return test_exponential._loop(arrays[:5], arrays[5:], SEGMENTS)


FAMILIES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "outer per head": (gated_linear_attention, _outer_loop),
    "outer per key": (gated_linear_attention, _outer_loop),
    "delta per head": (delta_rule, _delta_loop),
    "delta per key": (delta_rule, _delta_loop),
    "exponential": (_exponential, _exponential_loop),
}


def _graded(run: Callable[..., Any], *arrays: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """Outputs and states, and the gradients of a sum that counts every entry of both otherwise."""

    def loss(*arrays: Any) -> Any:
        found = jax.tree.leaves(run(*arrays))
        weights = [jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in found]
        return sum(jnp.sum(w * x) for w, x in zip(weights, found, strict=True)), found

    gradients, found = jax.grad(loss, tuple(range(len(arrays))), has_aux=True)(*arrays)
    return found, gradients


SIZES = (16, 64, 128, 256)
# Both delta rules invert alike: where decays are per key, one size is enough.
CASES = [(family, size) for family in FAMILIES for size in (SIZES[-1:] if family == "delta per key" else SIZES)]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "size"), CASES)
def test_heads_of_models(family: str, size: int) -> None:
    """Outputs, the state, and all gradients, in the chunks that a call has by itself."""
    run, loop = FAMILIES[family]
    arrays = _inputs(family, size)
    by = lambda method: jax.jit(functools.partial(_graded, functools.partial(run, segments=SEGMENTS, method=method)))
    found, gradients = by("chunked")(*arrays)
    expected = jax.tree.leaves(loop(*arrays))
    assert_same([f"part {i} of the results" for i in range(len(expected))], found, expected, ROUNDING)
    with jax.enable_x64(True):
        right = by("sequential")(*(x.astype(np.float64) for x in arrays))[1]
    assert_same([f"d array {i}" for i in range(len(arrays))], gradients, right, GRADIENT)
