"""The other families against loops over tokens written by hand from their equations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import by_hand
from experiments.bench.case import Row, measured, over_heads
from experiments.bench.measure import Work
from seqmodels.operators import delta_rule, gated_linear_attention, mlstm_scan, running_moments, softmax_scan

HEADS, SIZE = 8, 64


def cases(length: int, seed: int) -> Iterator[Row]:
    """8 heads of 64 x 64 (moments: 256 channels in 32 groups) over `length` tokens."""
    random = np.random.default_rng(seed)
    matrix = lambda: random.standard_normal((1, length, HEADS, SIZE))
    gate = lambda: random.standard_normal((1, length, HEADS))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    query, key, value = matrix() / 8, matrix() / 8, matrix() / 8
    forget = -np.logaddexp(gate(), 0) / 10
    moved = 4.0 * 4 * query.size
    per_token = lambda products: Work(moved, 2.0 * products * length * HEADS * SIZE * SIZE)

    decays = -np.logaddexp(matrix(), 0) / 10
    ours = lambda *x: gated_linear_attention(*x)[0]
    yield from _family("outer, a decay per key", by_hand.outer, ours, (query, key, value, decays), per_token(3), length)

    inputs = (query, unit(key), value, 1 / (1 + np.exp(-gate())), forget)
    yield from _family("delta, gated", by_hand.delta, lambda *x: delta_rule(*x)[0], inputs, per_token(5), length)

    inputs = (query, key, value, gate(), forget)
    ours = lambda *x: mlstm_scan(*x, eps=0.0)[0]
    yield from _family("exponential", by_hand.mlstm, ours, inputs, per_token(3), length)

    inputs = (gate(), value)
    yield from _family("softmax", _softmax, lambda *x: softmax_scan(*x)[0], inputs, Work(moved / 2, 0.0), length)

    x = random.standard_normal((1, length, 256))
    ours = lambda x: jnp.stack(running_moments(x, 32)[:2])
    implementations = {"lax.scan": _moments, "auto": ours}
    yield from measured(f"moments, T={length}", implementations, _moments, (x,), Work(4.0 * 1.25 * x.size, 0.0))


def _family(case: str, head: Any, ours: Any, inputs: tuple[np.ndarray, ...], work: Work, length: int) -> Iterator[Row]:
    loop = over_heads(head)
    yield from measured(f"{case}, T={length}", {"lax.scan": loop, "auto": ours}, loop, inputs, work)


def _softmax(score: Any, value: Any) -> Any:
    """Without a running maximum: scores this small need none."""

    def body(state: Any, x: Any) -> Any:
        weight = jnp.exp(x[0])
        total, weighted = state[0] + weight, state[1] + weight * x[1]
        return (total, weighted), weighted / total

    start = jnp.zeros((), value.dtype), jnp.zeros(SIZE, value.dtype)
    return jax.lax.scan(body, start, (score, value))[1]


def _moments(x: Any) -> Any:
    """Welford's update, a token's group of channels at a time."""
    groups = x.reshape(*x.shape[:2], 32, -1)

    def body(state: Any, values: Any) -> Any:
        count, mean, squares = state
        own = jnp.mean(values, axis=-1)
        own_squares = jnp.sum(jnp.square(values - own[..., None]), axis=-1)
        size = values.shape[-1]
        total, away = count + size, own - mean
        mean = mean + away * size / total
        squares = squares + own_squares + jnp.square(away) * count * size / total
        return (total, mean, squares), jnp.stack([mean, squares / total])

    zeros = jnp.zeros((groups.shape[0], groups.shape[2]), x.dtype)
    start = jnp.zeros((), x.dtype), zeros, zeros
    return jnp.moveaxis(jax.lax.scan(body, start, jnp.moveaxis(groups, 1, 0))[1], (0, 1), (2, 0))
