"""Log-linear attention: a matrix state for every level of a Fenwick tree over positions (arXiv 2506.04761)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from seqmodels import compat
from seqmodels.operators.decayed import decayed_scores, wide
from seqmodels.operators.diagonal import after_each, since_last_reset
from seqmodels.operators.family import run_family
from seqmodels.scan import Recurrence
from seqmodels.typing import Segments


class LogLinear(NamedTuple):
    """One step's inputs. `scale`: the weight of every level, the step's own (level 0) first; it sets their number L.

    `jump`: the level at which the next step finds this one, 1 + the trailing ones of its position; 0 for no step.
    """

    query: Float[Array, "K"]
    key: Float[Array, "K"]
    value: Float[Array, "V"]
    scale: Float[Array, "L"]
    jump: Int[Array, ""]
    log_decay: Float[Array, ""] | None = None


class LogLinearElement(NamedTuple):
    """A span: what it puts into the levels 1 to L - 1 as the step after it sees them, and how they change meanwhile.

    Levels below `jump` are merged into that level, as a binary counter carries: a span's jump is its largest one.
    """

    jump: Int[Array, ""]
    log_decay: Float[Array, ""]
    memory: Float[Array, "N K V"]


def log_linear_recurrence() -> Recurrence:
    """out_t = sum over l of scale_t[l] q_t^T S_t[l], with S_t[l] = sum of exp(decays after s) k_s v_s^T over bucket l.

    Bucket 0 is {t}; for every bit l - 1 of the position t that is set, bucket l holds the 2^(l-1) positions before t
    with this bit and all lower ones cleared: s is in bucket bit_length(t XOR s), which is the largest jump from s to t.
    Spans compose although buckets are aligned to positions, because their elements say how far the counter carried.
    The state [L - 1, K, V] holds the buckets of the step to come; a step reads it before it writes.
    """
    return Recurrence(
        elements=_element,
        combine=lambda a, b: LogLinearElement(
            jnp.maximum(a.jump, b.jump), a.log_decay + b.log_decay, _act(b, a.memory)
        ),
        identity=lambda e: jax.tree.map(jnp.zeros_like, e),
        act=_act,
        read=_read,
        read_before=True,
        initial=lambda x: jnp.zeros((x.scale.shape[0] - 1, *x.key.shape, *x.value.shape), _kind(x)),
        neutral=_neutral,
        fold=_fold,
        emit=_emit,
    )


def _kind(inputs: LogLinear) -> Any:
    return jnp.result_type(inputs.key, inputs.value, jnp.float32)


def _log_decay(inputs: LogLinear) -> Array:
    return jnp.zeros(inputs.jump.shape, _kind(inputs)) if inputs.log_decay is None else wide(inputs.log_decay)


def _place(level: Int[Array, "*N"], first: int, count: int, kind: Any) -> Float[Array, "*N L"]:
    """One-hot rows over the levels from `first` on; a level below them has none."""
    return jax.nn.one_hot(level - first, count, dtype=kind)


def _element(inputs: LogLinear) -> LogLinearElement:
    written = wide(inputs.key)[:, None] * wide(inputs.value)[None]
    place = _place(inputs.jump, 1, inputs.scale.shape[0] - 1, written.dtype)
    return LogLinearElement(inputs.jump, _log_decay(inputs), place[:, None, None] * written[None])


def _act(element: LogLinearElement, state: Array) -> Array:
    level = jnp.arange(1, state.shape[0] + 1)[:, None, None]
    lower = level < element.jump
    carried = jnp.sum(jnp.where(lower, state, 0), axis=0, keepdims=True)
    merged = jnp.where(lower, 0, state) + jnp.where(level == element.jump, carried, 0)
    return jnp.exp(element.log_decay) * merged + element.memory


def _read(state: Array, inputs: LogLinear) -> Array:
    query, scale = wide(inputs.query), wide(inputs.scale)
    earlier = jnp.exp(_log_decay(inputs)) * (scale[1:] @ (query @ state))
    return earlier + scale[0] * jnp.dot(query, wide(inputs.key)) * wide(inputs.value)


def _neutral(inputs: LogLinear) -> LogLinear:
    nothing = jax.tree.map(jnp.zeros_like, inputs)
    return nothing._replace(query=inputs.query, value=inputs.value, scale=inputs.scale)


def _emit(inputs: LogLinear, state: Array, reset: Bool[Array, "C"]) -> Array:
    scale, log_decay, segment = wide(inputs.scale), _log_decay(inputs), jnp.cumsum(reset.astype(jnp.int32))
    length, levels = scale.shape

    # levels[t, s]: the largest jump from s to t, whose weight is the hierarchical mask M^H
    steps = jnp.arange(length)
    last = jnp.concatenate([jnp.zeros_like(inputs.jump[:1]), inputs.jump[:-1]])
    between = lax.cummax(jnp.where(steps[:, None] > steps[None], last[:, None], 0), axis=0)
    mask = _weights(scale, between)
    scores = mask * decayed_scores(inputs.query, inputs.key, log_decay[:, None])
    scores = jnp.where(segment[:, None] == segment[None], scores, 0)
    inside = compat.wide_einsum("ts,sv->tv", scores.astype(jnp.result_type(inputs.key, inputs.value)), inputs.value)

    # what was at level l before the chunk is at the largest of l and the jumps since
    seen = jnp.maximum(jnp.arange(1, levels)[None], lax.cummax(last)[:, None])
    weight = _weights(scale, seen)
    query = wide(inputs.query) * jnp.exp(jnp.cumsum(log_decay))[:, None]
    queries = (weight[:, :, None] * query[:, None]).reshape(length, -1)
    carried = queries @ state.reshape(-1, state.shape[-1])
    return inside + jnp.where(segment[:, None] == 0, carried, 0)


def _weights(scale: Float[Array, "T L"], level: Int[Array, "T S"]) -> Float[Array, "T S"]:
    """scale[t, level[t, s]]."""
    return jnp.einsum("tl,tsl->ts", scale, _place(level, 0, scale.shape[1], scale.dtype))


def _fold(inputs: LogLinear, reset: Bool[Array, "C"]) -> LogLinearElement:
    kept = since_last_reset(reset)
    log_decay = jnp.where(kept, _log_decay(inputs), 0)
    level = lax.cummax(jnp.where(kept, inputs.jump, 0), reverse=True)  # where the step after the chunk finds each
    key = jnp.where(kept[:, None], wide(inputs.key) * jnp.exp(after_each(log_decay))[:, None], 0)
    place = _place(level, 1, inputs.scale.shape[1] - 1, key.dtype)
    keys = (place[:, :, None] * key[:, None]).astype(jnp.result_type(inputs.key, inputs.value))
    memory = compat.wide_einsum("tnk,tv->nkv", keys, inputs.value)
    return LogLinearElement(level[0], jnp.sum(log_decay), memory)


def log_linear_attention(
    query: Float[Array, "B T G K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T H V"],
    scale: Float[Array, "B T H L"],
    log_decay: Float[Array, "B T H"] | None = None,
    state: Float[Array, "B H N K V"] | None = None,
    *,
    position: Int[Array, "B T"],
    segments: Segments | None = None,
    method: str = "auto",
    chunk: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H N K V"]]:
    """O = (Q K^T * M^S * M^H) V for a batch of heads, M^S the decays, M^H the weights of levels: `(out, state)`.

    M^S_ts = exp(sum of log_decay_r over s < r <= t) and M^H_ts = scale_t[bit_length(t XOR s)], t and s being positions
    inside a document: `position` says how many of its tokens came before each. With all weights 1 it is
    `gated_linear_attention`; `log_decay` is <= 0, -inf included, or None for no decay. With G groups, head h uses query
    and key h // (H / G).

    L levels serve documents of 2^(L-1) tokens, beyond which the output is NaN. The state holds the N = L - 1 buckets
    that the next token sees. `state` None: every position counts from this call's first token, or from a start in it.
    Types and `segments` as in `gated_linear_attention`. On CPUs the chunk form of a long row has a gradient of its own,
    which forward-mode differentiation alone does not pass; `sequential` does. Raises ValueError on shapes that do not
    fit.
    """
    batch, length, heads, size = value.shape
    groups, levels = query.shape[2], scale.shape[-1]
    fits = query.shape == key.shape and query.shape[:2] == value.shape[:2] == position.shape
    fits = fits and groups > 0 and heads % groups == 0
    decays = (None, value.shape[:3])
    if not fits or scale.shape[:3] != value.shape[:3] or levels < 2 or getattr(log_decay, "shape", None) not in decays:
        raise ValueError(
            f"query and key [B, T, G, K], value [B, T, H, V] with G dividing H, scale [B, T, H, L] with L of at least "
            f"2, log_decay [B, T, H] or None and position [B, T]; not {query.shape}, {key.shape}, {value.shape}, "
            f"{scale.shape}, {getattr(log_decay, 'shape', None)} and {position.shape}"
        )
    shape = (batch, heads, levels - 1, key.shape[-1], size)
    if state is not None and state.shape != shape:
        raise ValueError(f"the state of {levels} levels [B, H, L - 1, K, V] is {shape}, not {state.shape}")
    used = levels - 1
    if state is None:
        if sequence_axis is None:  # no position reaches T
            used = min(used, length.bit_length())
        state = jnp.zeros((batch, heads, used, *shape[3:]), jnp.result_type(key, value, jnp.float32))

    valid = jnp.ones(position.shape, bool) if segments is None else segments.valid
    jump = jnp.where(valid, jnp.minimum(lax.population_count(position ^ (position + 1)), used), 0)
    split = lambda x: x.reshape(*x.shape[:2], groups, heads // groups, *x.shape[3:])
    inputs = LogLinear(
        query, key, split(value), split(scale[..., : used + 1]), jump, None if log_decay is None else split(log_decay)
    )
    out, state = run_family(
        "log_linear",
        log_linear_recurrence(),
        inputs,
        state.reshape(batch, groups, -1, *state.shape[2:]),
        segments=segments,
        method=method,
        chunk=chunk,
        sequence_axis=sequence_axis,
        heads=_over_heads,
    )
    lost = valid & (position >= 2 ** (levels - 1))
    out = jnp.where(lost[:, :, None, None], jnp.nan, out.reshape(value.shape))
    state = jnp.pad(
        state.reshape(batch, heads, *state.shape[3:]), [(0, 0)] * 2 + [(0, levels - 1 - used)] + [(0, 0)] * 2
    )
    return out.astype(value.dtype), state


def _over_heads(row: Callable[..., Any]) -> Callable[..., Any]:
    """Groups share queries and keys, all heads share jumps."""

    def one_row(inputs: LogLinear, state: Array, reset: Any, valid: Any) -> Any:
        head = lambda inputs, state: row(inputs, state, reset, valid)
        in_group: Any = LogLinear(None, None, 1, 1, None, 1)  # type: ignore[arg-type]  # axes in the place of arrays
        in_row: Any = LogLinear(1, 1, 1, 1, None, 1)  # type: ignore[arg-type]
        group = jax.vmap(head, in_axes=(in_group, 0), out_axes=(1, 0))
        return jax.vmap(group, in_axes=(in_row, 0), out_axes=(1, 0))(inputs, state)

    return one_row
