"""The online softmax: attention of one query as a recurrence over keys, and the merge of partial attentions."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqmodels import compat
from seqmodels.operators.decayed import wide
from seqmodels.operators.diagonal import since_last_reset
from seqmodels.operators.family import each_head, run_family
from seqmodels.scan import Recurrence
from seqmodels.typing import Segments


class Scored(NamedTuple):
    """One step's inputs: the `score` [] of a key, finite or -inf (it is not seen), and its `value` [V]."""

    score: Float[Array, ""]
    value: Float[Array, "V"]


class Softmax(NamedTuple):
    """Softmax-weighted values of some keys: `total` and `weighted` are the sums of exp(score - maximum) (times value).

    The state of the recurrence and its element; leading axes (queries) may stand before all three. Means and the log of
    all weights, maximum + log(total), do not depend on which maximum the sums are relative to: gradients take it as a
    constant, and are those of such quantities.
    """

    maximum: Float[Array, "*Q"]
    total: Float[Array, "*Q"]
    weighted: Float[Array, "*Q V"]


def merge_softmax(earlier: Softmax, later: Softmax) -> Softmax:
    """The partial softmax over the keys of both. Every exponent is <= 0; no keys at all is (-inf, 0, 0)."""
    maximum = _base(jnp.maximum(earlier.maximum, later.maximum))
    base = _finite(maximum)
    weights = [jnp.exp(part.maximum - base) for part in (earlier, later)]
    total = weights[0] * earlier.total + weights[1] * later.total
    weighted = weights[0][..., None] * earlier.weighted + weights[1][..., None] * later.weighted
    return Softmax(maximum, total, weighted)


def softmax_mean(state: Softmax) -> Float[Array, "*Q V"]:
    """sum(softmax(scores) * values); zero where no key was seen."""
    return state.weighted / jnp.where(state.total == 0, 1, state.total)[..., None]


def softmax_of(scores: Float[Array, "*Q S"], maximum: Float[Array, "*Q"]) -> tuple[Array, Array]:
    """`(exp(scores - maximum), their sum)`, zero where the maximum is -inf."""
    weights = jnp.exp(scores - _finite(maximum)[..., None])
    return weights, jnp.sum(weights, axis=-1)


def softmax_recurrence() -> Recurrence:
    """out_t = sum over s <= t of softmax(score_1, ..., score_t)_s value_s (Aaren, arXiv 2405.13956).

    Scores may be any finite number or -inf: sums are kept relative to their largest term, so nothing overflows.
    """

    def emit(inputs: Scored, state: Softmax, reset: Bool[Array, "C"]) -> Array:
        score, value = wide(inputs.score), _seen(inputs)
        segment = jnp.cumsum(reset.astype(jnp.int32))
        steps = jnp.arange(score.shape[0])
        seen = (segment[:, None] == segment[None]) & (steps[:, None] >= steps[None])
        scores = jnp.where(seen, score[None], -jnp.inf)
        carried = jnp.where(segment == 0, state.maximum, -jnp.inf)
        maximum = _base(jnp.maximum(jnp.max(scores, axis=1), carried))
        weights, total = softmax_of(scores, maximum)
        rest = jnp.exp(carried - _finite(maximum))
        weighted = compat.wide_einsum("ij,jv->iv", weights.astype(value.dtype), value)
        return softmax_mean(
            Softmax(maximum, total + rest * state.total, weighted + rest[:, None] * state.weighted[None])
        )

    def fold(inputs: Scored, reset: Bool[Array, "C"]) -> Softmax:
        score = jnp.where(since_last_reset(reset), wide(inputs.score), -jnp.inf)
        maximum = _base(jnp.max(score))
        weights, total = softmax_of(score, maximum)
        value = _seen(inputs)
        weighted = compat.wide_einsum("cv,c->v", value, weights.astype(value.dtype))
        return Softmax(maximum, total, weighted)

    return Recurrence(
        elements=_element,
        combine=merge_softmax,
        identity=_nothing,
        read=lambda state, x: softmax_mean(state),
        neutral=lambda x: Scored(jnp.full_like(x.score, -jnp.inf), jnp.zeros_like(x.value)),
        fold=fold,
        emit=emit,
    )


def _base(maximum: Array) -> Array:
    """A gradient through a maximum could be lost: a fused backward pass recomputes operands with other roundings."""
    return jax.lax.stop_gradient(maximum)


def _finite(maximum: Array) -> Array:
    return jnp.where(jnp.isneginf(maximum), 0, maximum)


def _seen(x: Scored) -> Float[Array, "*C V"]:
    """Values, zero where a key is not seen, so that they may hold anything there."""
    return jnp.where(jnp.isneginf(x.score)[..., None], 0, x.value)


def _element(x: Scored) -> Softmax:
    score = wide(x.score)
    return Softmax(score, (~jnp.isneginf(score)).astype(score.dtype), wide(_seen(x)))


def _nothing(like: Softmax) -> Softmax:
    return Softmax(jnp.full_like(like.maximum, -jnp.inf), jnp.zeros_like(like.total), jnp.zeros_like(like.weighted))


def softmax_scan(
    score: Float[Array, "B T H"],
    value: Float[Array, "B T H V"],
    state: Softmax | None = None,
    *,
    segments: Segments | None = None,
    method: str = "auto",
    chunk: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], Softmax]:
    """out_t = the mean of value_1..t under softmax(score_1..t), for a batch of heads: `(out, state)`.

    Attention with one query per head as a recurrence with a state of V + 2 numbers. Scores are finite or -inf. Outputs
    have the type of `value`, the state ([B, H], [B, H], [B, H, V]) is at least float32. `segments` None: one document a
    row, which continues `state`. On CPUs the chunk form of a long row has a gradient of its own, which forward-mode
    differentiation alone does not pass; `sequential` does. Raises ValueError on shapes that do not fit.
    """
    if value.ndim != 4 or score.shape != value.shape[:3]:
        raise ValueError(f"softmax_scan takes score [B, T, H] and value [B, T, H, V], not {score.shape}, {value.shape}")
    batch, _, heads, size = value.shape
    kind = jnp.result_type(score, value, jnp.float32)
    lowest = jnp.full((batch, heads), -jnp.inf, kind)
    empty = Softmax(lowest, jnp.zeros_like(lowest), jnp.zeros((batch, heads, size), kind))
    state = empty if state is None else state
    shapes = [tuple(map(jnp.shape, given)) for given in (state, empty)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the state of value {value.shape} is shaped {shapes[1]}, not {shapes[0]}")

    out, state = run_family(
        "softmax",
        softmax_recurrence(),
        Scored(score, value),
        state,
        segments=segments,
        method=method,
        chunk=chunk,
        sequence_axis=sequence_axis,
        heads=each_head,
    )
    return out.astype(value.dtype), state
