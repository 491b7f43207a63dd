"""The online softmax against a plain softmax in float64: outputs, states, gradients, and scores of any size."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from seqmodels.operators import Scored, Softmax, merge_softmax, softmax_recurrence, softmax_scan
from seqmodels.testing import check_recurrence
from seqmodels.typing import Segments

# float32 rounding (6e-8) of exponentials of scores up to a few tens, over 70 terms.
ROUNDING = 1e-5
# float64 through some 20 exponentials.
EXACT = 1e-12
B, T, H, V = 2, 70, 3, 4
METHODS = ({"method": "sequential"}, {"method": "chunked", "chunk": 16}, {"method": "associative"})
by_method = pytest.mark.parametrize("options", METHODS, ids=lambda m: m["method"])


def segments() -> Segments:
    start = np.zeros((B, T), bool)
    start[0, [0, 20, 21, 50]] = True
    start[1, 66] = True
    return Segments(jnp.asarray(start), jnp.asarray(np.arange(T)[None] < np.array([[T], [68]])))


def drawn(scale: float) -> tuple[jax.Array, jax.Array, Softmax]:
    """Scores, values, and the softmax of three earlier keys."""
    random = np.random.default_rng(0)
    score = scale * random.standard_normal((B, 3 + T, H))
    value = random.standard_normal((B, 3 + T, H, V))
    early = [Softmax(score[:, t], np.ones((B, H)), value[:, t]) for t in range(3)]
    state = functools.reduce(merge_softmax, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), early))
    as32 = lambda x: jnp.asarray(x[:, 3:], jnp.float32)
    return as32(score), as32(value), state


def plain(score: Any, value: Any, state: Softmax, seg: Segments) -> np.ndarray:
    """A softmax over everything seen so far, row by row, in float64; the state counts as one more weighted key."""
    score, value = np.asarray(score, np.float64), np.asarray(value, np.float64)
    out = np.zeros(value.shape)
    for b in range(B):
        begin, carried = 0, True
        for t in range(T):
            if seg.start[b, t]:
                begin, carried = t, False
            if not seg.valid[b, t]:
                continue
            for h in range(H):
                logits, values = list(score[b, begin : t + 1, h]), list(value[b, begin : t + 1, h])
                if carried:
                    total = float(state.total[b, h])
                    logits.append(float(state.maximum[b, h]) + np.log(total))
                    values.append(np.asarray(state.weighted[b, h], np.float64) / total)
                highest = max(logits)
                if np.isneginf(highest):
                    continue
                weights = np.exp(np.array(logits) - highest)
                out[b, t, h] = weights @ np.array(values) / weights.sum()
    return out


@by_method
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_scan_equals_a_softmax_over_what_was_seen(options: dict, scale: float) -> None:
    """Also where exp(score) itself overflows, where keys are not seen (-inf), and where padding is NaN."""
    score, value, state = drawn(scale)
    score = score.at[:, 5:9].set(-jnp.inf).at[0, 20].set(-jnp.inf)  # a document of one key that nobody sees, too
    seg = segments()
    poisoned = jnp.where(seg.valid[..., None, None] & ~jnp.isneginf(score)[..., None], value, jnp.nan)
    hidden = jnp.where(seg.valid[..., None], score, jnp.nan)
    out, after = jax.jit(functools.partial(softmax_scan, **options))(hidden, poisoned, state, segments=seg)
    chex.assert_trees_all_close(out, plain(score, value, state, seg), rtol=ROUNDING, atol=ROUNDING)
    last = softmax_scan(score, value, state, segments=seg, method="sequential")[1]
    mean = lambda s: s.weighted / s.total[..., None]
    chex.assert_trees_all_close(mean(after), mean(last), rtol=ROUNDING, atol=ROUNDING)
    chex.assert_trees_all_close(
        after.maximum + jnp.log(after.total), last.maximum + jnp.log(last.total), rtol=ROUNDING, atol=ROUNDING
    )


def test_laws(x64: None) -> None:
    random = np.random.default_rng(1)
    score, value = 50 * random.standard_normal(9), random.standard_normal((9, V))
    score[3] = -np.inf
    state = Softmax(np.float64(0.3), np.float64(1.5), random.standard_normal(V))
    check_recurrence(softmax_recurrence(), Scored(score, value), state)
    check_recurrence(softmax_recurrence(), Scored(score, value))


@by_method
def test_gradients(x64: None, options: dict) -> None:
    """Of outputs and of the final state, to scores, values and the state; no NaN where a document sees nothing."""
    random = np.random.default_rng(2)
    score, value = random.standard_normal((1, 6, 1)), random.standard_normal((1, 6, 1, 2))
    state = Softmax(np.full((1, 1), 0.1), np.full((1, 1), 1.2), random.standard_normal((1, 1, 2)))
    weight = random.standard_normal(value.shape)
    start = jnp.zeros((1, 6), bool).at[0, 4].set(True)
    seg = Segments(start, jnp.ones((1, 6), bool))
    options = {**options, "chunk": 4} if options["method"] == "chunked" else options

    def loss(score: Any, value: Any, state: Softmax) -> Any:
        out, after = softmax_scan(score, value, state, segments=seg, **options)
        # what does not depend on the maximum that a state is kept relative to; a document may have seen nothing
        total = jnp.where(after.total == 0, 1, after.total)
        log_total = jnp.where(after.total == 0, 0, after.maximum + jnp.log(total))
        return jnp.sum(weight * out) + jnp.sum(after.weighted / total[..., None]) + jnp.sum(log_total)

    check_grads(jax.jit(loss), (score, value, state), order=1, modes=["rev"], rtol=1e-6, atol=1e-6)
    unseen = jax.jit(jax.grad(loss, (0, 1)))(np.full_like(score, -np.inf), value, state)
    chex.assert_tree_all_finite(unseen)


def test_errors_name_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"softmax_scan takes score .*\(1, 2\), \(1, 2, 3, 4\)"):
        softmax_scan(jnp.zeros((1, 2)), jnp.zeros((1, 2, 3, 4)))
    score, value, state = drawn(1.0)
    with pytest.raises(ValueError, match=r"shaped \(\(1, 3\), \(1, 3\), \(1, 3, 4\)\), not \(\(2, 3\)"):
        softmax_scan(score[:1], value[:1], state)
