"""Several delta rules a token against a float64 numpy loop, with documents, padding and a carried state."""

from __future__ import annotations

import chex
import jax
import numpy as np
import pytest

from seqmodels.operators import delta_product, delta_rule
from seqmodels.typing import Segments

# float32 rounding (6e-8) over 40 steps of corrections that read what was just written.
ROUNDING = 5e-5
B, T, N, G, H, K, V = 2, 13, 3, 1, 2, 4, 5


def _inputs(steps: int = N) -> tuple[np.ndarray, ...]:
    """`query, key, value, beta, log_decay, state`; decays of one token are -inf."""
    random = np.random.default_rng(0)
    shapes = ((B, T, G, K), (B, T, steps, G, K), (B, T, steps, H, V), (B, T, steps, H), (B, T, H), (B, H, K, V))
    query, key, value, beta, decay, state = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    decay = -np.exp(decay)
    decay[:, 7] = -np.inf
    key = key / np.linalg.norm(key, axis=-1, keepdims=True)
    return query, key, value, 2 / (1 + np.exp(-beta)), decay, state


@pytest.mark.parametrize("options", [{"method": "sequential"}, {"method": "chunked", "chunk": 7}], ids=str)
def test_equals_its_recurrence(options: dict) -> None:
    inputs = query, key, value, beta, decay, state = _inputs()
    start, valid = np.zeros((B, T), bool), np.ones((B, T), bool)
    start[0, [0, 1, 6]] = start[1, 9] = True
    valid[0, 4:6] = valid[1, 12] = False
    expected, s = np.zeros((B, T, H, V)), np.asarray(state, np.float64)
    for b, h, t in np.ndindex(B, H, T):
        if start[b, t]:
            s[b, h] = 0
        if valid[b, t]:
            s[b, h] *= np.exp(decay[b, t, h])
            for i in range(N):
                k = key[b, t, i, 0]
                s[b, h] += beta[b, t, i, h] * np.outer(k, value[b, t, i, h] - s[b, h].T @ k)
            expected[b, t, h] = s[b, h].T @ query[b, t, 0]
    poisoned = [np.where(np.expand_dims(valid, tuple(range(2, x.ndim))), x, np.nan) for x in inputs[:-1]]
    run = jax.jit(lambda inputs: delta_product(*inputs, state, segments=Segments(start, valid), **options))
    chex.assert_trees_all_close(run(poisoned), (expected, s), rtol=ROUNDING, atol=ROUNDING)


def test_with_one_step_it_is_the_delta_rule() -> None:
    query, key, value, beta, decay, state = _inputs(steps=1)
    got = jax.jit(delta_product)(query, key, value, beta, decay, state)
    expected = jax.jit(delta_rule)(query, key[:, :, 0], value[:, :, 0], beta[:, :, 0], decay, state)
    chex.assert_trees_all_equal(got, expected)


def test_shapes_that_do_not_fit() -> None:
    query, key, value, beta, decay, state = _inputs()
    for wrong in (
        (query, key[:, :, :2], value, beta),
        (query, key, value, beta[..., :1]),
        (query[:, 1:], key, value, beta),
    ):
        with pytest.raises(ValueError, match=r"key \[B, T, N, G, K\], value \[B, T, N, H, V\]"):
            delta_product(*wrong, decay, state)
