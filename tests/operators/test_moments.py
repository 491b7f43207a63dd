"""Running moments against numpy's float64 mean and variance of every document's prefix: laws, digits, gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from seqmodels.operators import Moments, moments_recurrence, running_moments
from seqmodels.operators.moments import empty_moments
from seqmodels.testing import check_recurrence
from seqmodels.typing import Segments

# float32 rounding (6e-8) of a sum over some hundred values, relative to their spread.
ROUNDING = 5e-6
B, T, D, G = 2, 70, 12, 3
METHODS = ("sequential", "chunked")
by_method = pytest.mark.parametrize("method", METHODS)


def _segments() -> Segments:
    """Documents of lengths 1 and more, padding before a start and at the end; row 1 goes on from its state."""
    start = np.zeros((B, T), bool)
    start[0, [3, 20, 21, 50]] = True
    start[1, 66] = True
    valid = (np.arange(T)[None] < np.array([[T], [68]])) & (np.arange(T)[None] >= np.array([[3], [0]]))
    return Segments(jnp.asarray(start), jnp.asarray(valid))


@functools.cache
def _compiled(method: str) -> Callable[..., Any]:
    return jax.jit(lambda x, state, segments: running_moments(x, G, state, segments=segments, method=method, chunk=16))


def _prefixes(x: np.ndarray, before: np.ndarray, segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of all that the document has had, `before` [B, N, D] being the carried document's steps."""
    mean, variance = np.zeros((2, B, T, G))
    for b in range(B):
        seen = list(before[b])
        for t in range(T):
            if segments.start[b, t]:
                seen = []
            if segments.valid[b, t]:
                seen.append(x[b, t])
                values = np.asarray(seen, np.float64).reshape(len(seen), G, -1)
                mean[b, t], variance[b, t] = values.mean((0, 2)), values.var((0, 2))
    return mean, variance


def _normal(seed: int, length: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    return (mean + std * np.random.default_rng(seed).standard_normal((B, length, D))).astype(np.float32)


def test_the_laws() -> None:
    """With steps that count nothing, one and more, from a state that has seen some; resets start from nothing."""
    random = np.random.default_rng(0)
    count = np.array([0, 1, 1, 0, 2, 1, 1])
    live = (count > 0)[:, None]
    origin, offset, squares = random.standard_normal((3, 7, G)) * live
    inputs = Moments(count, origin, offset, squares**2)
    check_recurrence(moments_recurrence(), inputs, Moments(np.int32(5), np.ones(G), origin[1], np.ones(G)))


@by_method
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e4, 1e-2), (-1e6, 1.0), (0.0, 1e-15), (1e30, 0.0)], ids=str)
def test_they_equal_numpy(mean: float, std: float, method: str) -> None:
    """With NaN in the padding, after 30 steps of a carried document, or none; digits are relative to the spread."""
    x, before, segments = _normal(1, T, mean, std), _normal(2, 30, mean, std), _segments()
    poisoned = np.where(segments.valid[..., None], x, np.nan)
    every = Segments(jnp.zeros((B, 30), bool), jnp.ones((B, 30), bool))
    *_, carried = _compiled(method)(before, empty_moments(B, G), every)
    for state, history in ((carried, before), (empty_moments(B, G), before[:, :0])):
        got = _compiled(method)(poisoned, state, segments)
        expected = _prefixes(x, history, segments)
        # A mean beside which the spread is small rounds to the nearest float32; the variance keeps its digits.
        chex.assert_trees_all_close(got[0], expected[0], rtol=1e-7, atol=ROUNDING * std)
        chex.assert_trees_all_close(got[1], expected[1], rtol=10 * ROUNDING, atol=0)
        np.testing.assert_array_equal(got[2].steps, [20, 2])
        last = expected[0][0, -1], expected[0][1, 67]
        chex.assert_trees_all_close(got[2].mean, np.stack(last), rtol=1e-7, atol=ROUNDING * std)


def test_counts_are_exact_and_late_steps_still_matter() -> None:
    """After 2^25 steps float32 counts would stand still."""
    state = Moments(jnp.full(B, 2**25), jnp.zeros((B, G)), jnp.ones((B, G)), jnp.full((B, G), 2.0**25))
    for method in METHODS:
        every = Segments(jnp.zeros((B, T), bool), jnp.arange(T)[None] < jnp.full((B, 1), 5))
        mean, variance, after = _compiled(method)(np.full((B, T, D), 2.0**20, np.float32), state, every)
        np.testing.assert_array_equal(after.steps, 2**25 + 5)
        exact = (2**25 + 5 * 2.0**20) / (2**25 + 5)
        np.testing.assert_allclose(mean[:, 4], exact, rtol=ROUNDING)
        squares = (2**25 * 2 + 5 * 2.0**40) / (2**25 + 5) - exact**2
        np.testing.assert_allclose(variance[:, 4], squares, rtol=ROUNDING)


def test_gradients_of_everything_with_segments(x64: None) -> None:
    random = np.random.default_rng(3)
    x = random.standard_normal((1, 7, 4))
    segments = Segments(jnp.arange(7)[None] == 3, jnp.arange(7)[None] < 6)
    own = (random.standard_normal((1, 2)), random.standard_normal((1, 2)), random.standard_normal((1, 2)) ** 2)

    def loss(method: str, count: Any, x: Any, state: Any) -> jax.Array:
        given = Moments(count, *state)
        mean, variance, after = running_moments(x, 2, given, segments=segments, method=method, chunk=3)
        return jnp.sum(jnp.sin(mean)) + jnp.sum(jnp.cos(variance)) + sum(jnp.sum(jnp.sin(leaf)) for leaf in after[1:])

    for method in ("sequential", "chunked"):
        run = jax.jit(functools.partial(loss, method))
        check_grads(functools.partial(run, jnp.array([4])), (x, own), order=1, modes=["rev"])
        from_nothing = functools.partial(run, jnp.array([0]), state=(np.zeros((1, 2)),) * 3)
        check_grads(from_nothing, (x,), order=1, modes=["rev"])


@by_method
def test_gradients_of_nothing_are_finite(method: str) -> None:
    """No step has counted yet, or all values are equal."""
    segments = Segments(jnp.zeros((B, T), bool), jnp.zeros((B, T), bool).at[1].set(True))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def slopes(x: Any, state: Any) -> jax.Array:
        state = empty_moments(B, G)._replace(origin=state)
        mean, variance, after = running_moments(x, G, state, segments=segments, method=method, chunk=16)
        return sum(jnp.sum(leaf) for leaf in (mean, variance, after.mean, after.variance))

    x = jnp.where(segments.valid[..., None], jnp.ones((B, T, D)), jnp.nan)
    in_x, in_state = slopes(x, jnp.zeros((B, G)))
    chex.assert_tree_all_finite((in_x, in_state))
    assert not np.any(in_x[0])


def test_bfloat16_gives_float32_moments_and_wrong_shapes_are_shown() -> None:
    mean, variance, state = running_moments(jnp.ones((B, 3, D), jnp.bfloat16), G)
    assert {a.dtype for a in (mean, variance, *state[1:])} == {jnp.dtype(jnp.float32)}
    with pytest.raises(ValueError, match=r"groups dividing D, not \(2, 3, 12\) and groups=5"):
        running_moments(jnp.ones((B, 3, D)), 5)
    with pytest.raises(ValueError, match=r"steps \[B\] and origin \[B, G\], not \(2,\) and \(2, 4\)"):
        running_moments(jnp.ones((B, 3, D)), 3, empty_moments(B, 4))
