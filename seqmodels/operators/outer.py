"""The outer-product recurrence S' = a S + k v^T, with a scalar decay per head or one per key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqmodels import compat
from seqmodels.operators import kernels
from seqmodels.operators.decayed import decayed_scores, read_decayed, wide, write_decayed
from seqmodels.operators.diagonal import after_each, since_last_reset
from seqmodels.operators.family import run_family
from seqmodels.scan import Recurrence
from seqmodels.typing import Segments


class Outer(NamedTuple):
    """One step's inputs: `query`, `key` [K], `value` [V], `log_decay` [] (per head), [K] (per key) or None (a = 1)."""

    query: Float[Array, "K"]
    key: Float[Array, "K"]
    value: Float[Array, "V"]
    log_decay: Float[Array, "*K"] | None


class OuterElement(NamedTuple):
    """The map S -> exp(log_decay) S + memory of a span; `log_decay` is [1] for a scalar decay, [K] for one per key."""

    log_decay: Float[Array, "*K"]
    memory: Float[Array, "K V"]


def outer_recurrence(*, read_before: bool = False) -> Recurrence:
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, read as q_t^T S_t, or q_t^T S_{t-1} with `read_before`.

    Decays are <= 0 in log, -inf included.
    """

    def emit(inputs: Outer, state: Array, reset: Bool[Array, "C"]) -> Array:
        log_decay = _log_decays(inputs)
        reach = after_each(log_decay[::-1])[::-1] if read_before else jnp.cumsum(log_decay, axis=0)
        scores = decayed_scores(inputs.query, inputs.key, log_decay, inclusive=not read_before)
        segment = jnp.cumsum(reset.astype(jnp.int32))
        scores = jnp.where(segment[:, None] == segment[None], scores, 0)
        carried = read_decayed(inputs.query, reach, state)
        inside = compat.wide_einsum("ij,jv->iv", scores.astype(jnp.result_type(inputs.key, inputs.value)), inputs.value)
        return inside + jnp.where(segment[:, None] == 0, carried, 0)

    return Recurrence(
        elements=lambda x: OuterElement(_log_decay(x), wide(x.key)[:, None] * wide(x.value)[None]),
        combine=lambda a, b: OuterElement(a.log_decay + b.log_decay, _act(b, a.memory)),
        identity=lambda e: jax.tree.map(jnp.zeros_like, e),
        act=_act,
        read=lambda s, x: wide(x.query) @ s,
        read_before=read_before,
        initial=lambda x: jnp.zeros((*x.key.shape, *x.value.shape), jnp.result_type(x.key, x.value, jnp.float32)),
        neutral=_neutral,
        fold=_fold,
        emit=emit,
    )


def _log_decay(inputs: Outer) -> Array:
    if inputs.log_decay is None:
        return jnp.zeros((1,), jnp.result_type(inputs.key, jnp.float32))
    return wide(jnp.atleast_1d(inputs.log_decay))


def _log_decays(inputs: Outer) -> Array:
    return jax.vmap(_log_decay)(inputs)


def _act(element: OuterElement, state: Array) -> Array:
    return jnp.exp(element.log_decay)[:, None] * state + element.memory


def _neutral(inputs: Outer) -> Outer:
    log_decay = None if inputs.log_decay is None else jnp.zeros_like(inputs.log_decay)
    return inputs._replace(key=jnp.zeros_like(inputs.key), log_decay=log_decay)


def _fold(inputs: Outer, reset: Bool[Array, "C"]) -> OuterElement:
    kept = since_last_reset(reset)[:, None]
    log_decay = jnp.where(kept, _log_decays(inputs), 0)
    rest = jnp.where(kept, after_each(log_decay), -jnp.inf)
    return OuterElement(jnp.sum(log_decay, axis=0), write_decayed(inputs.key, inputs.value, rest))


def gated_linear_attention(
    query: Float[Array, "B T G K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H *K"] | None = None,
    state: Float[Array, "B H K V"] | None = None,
    *,
    bonus: Float[Array, "H K"] | None = None,
    segments: Segments | None = None,
    method: str = "auto",
    chunk: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, out_t = q_t^T S_t, for a batch of heads: `(out, state)`.

    `log_decay` [B, T, H] decays a head, [B, T, H, K] a key; None: no decay (linear attention). It must be <= 0, and may
    be -inf. With G groups, head h uses query and key h // (H / G). With `bonus` u (RWKV-6, 2404.05892) the output is
    q_t^T (S_{t-1} + diag(u) k_t v_t^T) instead. Outputs have the type of `value`, states are at least float32.
    `segments` None: one document a row, which continues `state`. The chunk form has gradients of its own, which
    forward-mode differentiation alone does not pass; `sequential` does. Raises ValueError on shapes that do not fit.
    """
    groups, heads = query.shape[2], value.shape[2]
    expected = (*value.shape[:3],)
    decays = (None, expected, (*expected, query.shape[-1]))
    fits = query.shape == key.shape and query.shape[:2] == value.shape[:2] and groups > 0 and heads % groups == 0
    if not fits or getattr(log_decay, "shape", None) not in decays:
        raise ValueError(
            f"query and key [B, T, G, K], value [B, T, H, V] with G dividing H, log_decay [B, T, H], [B, T, H, K] or "
            f"None; not {query.shape}, {key.shape}, {value.shape}, {getattr(log_decay, 'shape', None)}"
        )
    if state is not None and state.shape != (value.shape[0], heads, key.shape[-1], value.shape[-1]):
        raise ValueError(f"the state [B, H, K, V] of key {key.shape} and value {value.shape} is not {state.shape}")
    family = "outer" if bonus is None and getattr(log_decay, "ndim", 3) == 3 else "outer_keys"
    sizes = (key.shape[-1], value.shape[-1])
    where: Any = {"chunk": chunk, "sequence_axis": sequence_axis}
    given = (query, key, value, log_decay, state)
    kernel = lambda: kernels.outer(*given, segments=segments, bonus=bonus, **where)
    served = kernels.serve(method, family, kernel, query, key, value, sizes=sizes, **where)
    if served is not None:
        return served
    share = heads // groups
    split = lambda x: x.reshape(*x.shape[:2], groups, share, *x.shape[3:])
    inputs = Outer(query, key, split(value), None if log_decay is None else split(log_decay))
    if state is None:
        kind = jnp.result_type(key, value, jnp.float32)
        state = jnp.zeros((query.shape[0], heads, key.shape[-1], value.shape[-1]), kind)
    state = state.reshape(state.shape[0], groups, share, *state.shape[2:])

    def over_heads(row: Callable[..., Any]) -> Callable[..., Any]:
        def one_row(inputs: Outer, state: Array, reset: Any, valid: Any) -> Any:
            def head(inputs: Outer, state: Array) -> Any:
                return row(inputs, state, reset, valid)

            shared: Any = Outer(None, None, 1, 1)  # type: ignore[arg-type]  # axes in the place of arrays
            group = jax.vmap(head, in_axes=(shared, 0), out_axes=(1, 0))
            return jax.vmap(group, in_axes=(1, 0), out_axes=(1, 0))(inputs, state)

        return one_row

    out, state = run_family(
        "outer",
        outer_recurrence(read_before=bonus is not None),
        inputs,
        state,
        segments=segments,
        method=method,
        chunk=chunk,
        sequence_axis=sequence_axis,
        heads=over_heads,
    )
    out = out.reshape(value.shape)
    if bonus is not None:
        out = out + _own_steps(query, key, value, bonus, segments)
    return out.astype(value.dtype), state.reshape(state.shape[0], heads, *state.shape[3:])


def normalised_linear_attention(
    query: Float[Array, "B T G K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H *K"] | None = None,
    state: tuple[Float[Array, "B H K V"], Float[Array, "B H K"]] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H 1"], tuple[Float[Array, "B H K V"], Float[Array, "B H K"]]]:
    """`gated_linear_attention` together with the sum of its weights: `(numerator, denominator, state)`.

    z_t = exp(log_decay_t) z_{t-1} + k_t, denominator_t = q_t^T z_t: one more column of values, all ones. The state is
    `(S, z)`. What keeps the quotient finite is the caller's choice. `options` are those of `gated_linear_attention`.
    """
    counted = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
    both = None if state is None else jnp.concatenate([state[0], state[1][..., None]], axis=-1)
    out, both = gated_linear_attention(query, key, counted, log_decay, both, **options)
    return out[..., :-1], out[..., -1:], (both[..., :-1], both[..., -1])


def _own_steps(query: Array, key: Array, value: Array, bonus: Array, segments: Segments | None) -> Array:
    if segments is not None:  # padding may hold anything
        query, key, value = (jnp.where(segments.valid[..., None, None], x, 0) for x in (query, key, value))
    pairs = jnp.repeat(wide(query) * wide(key), value.shape[2] // key.shape[2], axis=2)
    return jnp.einsum("bthk,hk->bth", pairs, bonus)[..., None] * wide(value)
