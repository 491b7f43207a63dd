"""The delta rule's recurrence S' = (Diag(w) + p r^T) S + k v^T: a diagonal decay and a correction of rank one."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqmodels.operators import kernels
from seqmodels.operators.decayed import decayed_scores, read_decayed, wide, write_decayed
from seqmodels.operators.diagonal import after_each, since_last_reset
from seqmodels.operators.family import each_head, run_family
from seqmodels.operators.triangular import inverse_of_unit_lower
from seqmodels.scan import Recurrence
from seqmodels.typing import Segments


class Delta(NamedTuple):
    """One step's inputs: `query`, `key`, `left` (p), `right` (r) [K], `value` [V], `log_decay` [], [K] or None (w = 1).

    `left` None stands for -key, as in a delta rule: the step writes key (value - S^T right)^T, at half the cost.
    """

    query: Float[Array, "K"]
    key: Float[Array, "K"]
    value: Float[Array, "V"]
    right: Float[Array, "K"]
    left: Float[Array, "K"] | None = None
    log_decay: Float[Array, "*K"] | None = None


class DeltaElement(NamedTuple):
    """The map S -> transition S + memory of a span."""

    transition: Float[Array, "K K"]
    memory: Float[Array, "K V"]


def delta_recurrence() -> Recurrence:
    """S_t = (Diag(exp(log_decay_t)) + left_t right_t^T) S_{t-1} + key_t value_t^T, read as query_t^T S_t.

    Decays are <= 0 in log, -inf included. A step costs K V (`update`), its element K^2. Chunks are in WY form: with
    u_t = S_{t-1}^T right_t, what a chunk's steps read before they write, the u of a chunk solve one unit lower
    triangular system, and all the rest is matrix products; no exponent is above 0 and nothing is divided.
    """
    return Recurrence(
        elements=_element,
        combine=lambda a, b: DeltaElement(b.transition @ a.transition, _act(b, a.memory)),
        identity=lambda e: DeltaElement(jnp.eye(e.memory.shape[0], dtype=e.transition.dtype), jnp.zeros_like(e.memory)),
        act=_act,
        read=lambda s, x: wide(x.query) @ s,
        initial=lambda x: jnp.zeros((*x.key.shape, *x.value.shape), _kind(x)),
        update=_update,
        neutral=_neutral,
        fold=_fold,
        emit=lambda xs, s, reset: _sweep(xs, s, reset)[1],
        sweep=_sweep,
    )


def _kind(inputs: Delta) -> Any:
    return jnp.result_type(inputs.key, inputs.value, inputs.right, jnp.float32)


def _left(inputs: Delta) -> Array:
    return -inputs.key if inputs.left is None else inputs.left


def _log_decays(inputs: Delta) -> Float[Array, "... #K"]:
    if inputs.log_decay is None:
        return jnp.zeros((*inputs.key.shape[:-1], 1), _kind(inputs))
    one_per_head = inputs.log_decay.ndim < inputs.key.ndim
    return wide(inputs.log_decay[..., None] if one_per_head else inputs.log_decay)


def _element(inputs: Delta) -> DeltaElement:
    decay = jnp.broadcast_to(jnp.exp(_log_decays(inputs)), inputs.key.shape)
    transition = jnp.diag(decay) + wide(_left(inputs))[:, None] * wide(inputs.right)[None]
    return DeltaElement(transition, wide(inputs.key)[:, None] * wide(inputs.value)[None])


def _act(element: DeltaElement, state: Array) -> Array:
    return element.transition @ state + element.memory


def _update(inputs: Delta, state: Array) -> Array:
    seen = wide(inputs.right) @ state
    written = wide(_left(inputs))[:, None] * seen[None] + wide(inputs.key)[:, None] * wide(inputs.value)[None]
    return jnp.exp(_log_decays(inputs))[:, None] * state + written


def _neutral(inputs: Delta) -> Delta:
    nothing = jax.tree.map(jnp.zeros_like, inputs)
    return nothing._replace(query=inputs.query, value=inputs.value, right=inputs.right)


class _Write(NamedTuple):
    """Writes of a chunk's steps: step t adds column_t (values_t + state^T reads_t)^T, of the chunk's first state."""

    column: Float[Array, "C K"]
    values: Float[Array, "C V"]
    reads: Float[Array, "C K"] | None


def _writes(inputs: Delta, reset: Bool[Array, "C"]) -> list[_Write]:
    """The chunk's corrections and writes, each step's on its own, as if it wrote into a state that only decays.

    u_t = S_{t-1}^T r_t gives u_t = S_0^T r~_t + sum over s < t of (A_ts u_s + B_ts v_s), where A_ts and B_ts are the
    scores of r_t with p_s and k_s, decayed over the steps between. `reads` holds for the segment that begins the chunk
    and for the last one.
    """
    log_decay, kept, segment = _log_decays(inputs), since_last_reset(reset)[:, None], _segments(reset)
    same = segment[:, None] == segment[None]
    before = lambda x: after_each(x[::-1])[::-1]
    reach = jnp.where(kept, before(jnp.where(kept, log_decay, 0)), before(log_decay))
    reads = wide(inputs.right) * jnp.exp(reach)

    def scores(key: Array) -> Array:
        return jnp.where(same, decayed_scores(inputs.right, key, log_decay, inclusive=False), 0)

    solve = inverse_of_unit_lower(-scores(_left(inputs)))
    value = wide(inputs.value)
    if inputs.left is None:  # B = -A, and v - u solves the system by itself
        return [_Write(inputs.key, solve @ value, -(solve @ reads))]
    return [
        _Write(inputs.left, solve @ (scores(inputs.key) @ value), solve @ reads),
        _Write(inputs.key, value, None),
    ]


def _segments(reset: Bool[Array, "C"]) -> Array:
    return jnp.cumsum(reset.astype(jnp.int32))


def _sweep(inputs: Delta, state: Array, reset: Bool[Array, "C"]) -> tuple[Array, Array]:
    log_decay, segment, kept = _log_decays(inputs), _segments(reset), since_last_reset(reset)[:, None]
    first = segment[:, None] == 0
    out = jnp.where(first, read_decayed(inputs.query, jnp.cumsum(log_decay, axis=0), state), 0)
    log_decay_kept = jnp.where(kept, log_decay, 0)
    rest = jnp.where(kept, after_each(log_decay_kept), -jnp.inf)
    state_kept = jnp.where(jnp.any(reset), 0, state)
    after = jnp.exp(jnp.sum(log_decay_kept, axis=0))[:, None] * state_kept
    for write in _writes(inputs, reset):
        written = write.values
        if write.reads is not None:
            written = written + jnp.where(first, write.reads @ state, 0)
        scores = decayed_scores(inputs.query, write.column, log_decay)
        out = out + jnp.where(segment[:, None] == segment[None], scores, 0) @ written
        after = after + write_decayed(write.column, written, rest)  # where there is a reset, of steps after `first`
    return after, out


def _fold(inputs: Delta, reset: Bool[Array, "C"]) -> DeltaElement:
    kept = since_last_reset(reset)[:, None]
    log_decay = jnp.where(kept, _log_decays(inputs), 0)
    reach = jnp.exp(after_each(log_decay))
    decay = jnp.exp(jnp.sum(log_decay, axis=0))
    transition = jnp.diag(jnp.broadcast_to(decay, inputs.key.shape[1:]))
    memory = jnp.zeros((*inputs.key.shape[1:], *inputs.value.shape[1:]), _kind(inputs))
    for write in _writes(inputs, reset):
        column = jnp.where(kept, wide(write.column) * reach, 0)
        memory = memory + column.T @ write.values
        if write.reads is not None:
            transition = transition + column.T @ write.reads
    return DeltaElement(transition, memory)


def delta_rule(
    query: Float[Array, "B T G K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H *K"] | None = None,
    state: Float[Array, "B H K V"] | None = None,
    *,
    segments: Segments | None = None,
    method: str = "auto",
    chunk: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The state decays, then moves beta of the way to holding v at k: `(out, state)` for a batch of heads.

        S = exp(log_decay_t) S_{t-1};   S_t = S + beta_t k_t (v_t - S^T k_t)^T;   out_t = q_t^T S_t

    DeltaNet (2406.06484) with `log_decay` None, gated DeltaNet (2412.06464) with [B, T, H], KDA (2510.26692) with
    [B, T, H, K]. It must be <= 0, and may be -inf. The transition's norm is at most max(1, |1 - beta |k|^2|): for unit
    keys and beta in [0, 2] nothing grows (2411.12537: beyond 1, along k, eigenvalues are negative). Outside of it the
    recurrence may grow by |1 - beta |k|^2| a step; every method then follows it until float32 overflows.
    With G groups, head h uses query and key h // (H / G). Outputs have the type of `value`, states are at least
    float32. `segments` None: one document a row, which continues `state`. The chunk form has gradients of its own,
    which forward-mode differentiation alone does not pass; `sequential` does. Raises ValueError on shapes that do not
    fit.
    """
    groups, heads = query.shape[2], value.shape[2]
    expected = (*value.shape[:3],)
    decays = (None, expected, (*expected, query.shape[-1]))
    fits = query.shape == key.shape and query.shape[:2] == value.shape[:2] and groups > 0 and heads % groups == 0
    if not fits or beta.shape != expected or getattr(log_decay, "shape", None) not in decays:
        raise ValueError(
            f"query and key [B, T, G, K], value [B, T, H, V] with G dividing H, beta [B, T, H], log_decay [B, T, H], "
            f"[B, T, H, K] or None; not {query.shape}, {key.shape}, {value.shape}, {beta.shape}, "
            f"{getattr(log_decay, 'shape', None)}"
        )
    _check_state(state, key, value)
    family = "delta" if getattr(log_decay, "ndim", 3) == 3 else "delta_keys"
    sizes = (key.shape[-1], value.shape[-1])
    where: Any = {"chunk": chunk, "sequence_axis": sequence_axis}
    kernel = lambda: kernels.delta(query, key, value, beta, log_decay, state, segments=segments, **where)
    served = kernels.serve(method, family, kernel, query, key, value, sizes=sizes, **where)
    if served is not None:
        return served
    query, key = (jnp.repeat(x, heads // groups, axis=2) for x in (query, key))
    right = key
    if log_decay is not None:  # what is read is the decayed state
        decay = jnp.exp(wide(log_decay))
        right = (wide(key) * (decay if decay.ndim == key.ndim else decay[..., None])).astype(key.dtype)
    strength = (wide(key) * wide(beta)[..., None]).astype(key.dtype)
    return _run(
        Delta(query, strength, value, right, None, log_decay),
        state,
        segments=segments,
        method=method,
        chunk=chunk,
        sequence_axis=sequence_axis,
    )


def diagonal_plus_rank_one(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T H K"],
    value: Float[Array, "B T H V"],
    left: Float[Array, "B T H K"],
    right: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H *K"] | None = None,
    state: Float[Array, "B H K V"] | None = None,
    *,
    segments: Segments | None = None,
    method: str = "auto",
    chunk: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = (Diag(exp(log_decay_t)) + left_t right_t^T) S_{t-1} + k_t v_t^T, out_t = q_t^T S_t: `(out, state)`.

    RWKV-7 (2503.14456): left = -kappa * a, right = kappa. `log_decay` [B, T, H] or [B, T, H, K] must be <= 0, and may
    be -inf; None: no decay. Nothing bounds left right^T: where the transition's norm is above 1 the state may grow.
    Types, `segments` and errors as in `delta_rule`.
    """
    decays = (None, value.shape[:3], query.shape)
    fits = query.shape == key.shape == left.shape == right.shape and query.shape[:3] == value.shape[:3]
    if not fits or getattr(log_decay, "shape", None) not in decays:
        raise ValueError(
            f"query, key, left and right [B, T, H, K], value [B, T, H, V], log_decay [B, T, H], [B, T, H, K] or None; "
            f"not {query.shape}, {key.shape}, {left.shape}, {right.shape}, {value.shape}, "
            f"{getattr(log_decay, 'shape', None)}"
        )
    return _run(
        Delta(query, key, value, right, left, log_decay),
        state,
        segments=segments,
        method=method,
        chunk=chunk,
        sequence_axis=sequence_axis,
    )


def _run(inputs: Delta, state: Array | None, **options: Any) -> tuple[Array, Array]:
    _check_state(state, inputs.key, inputs.value)
    if state is None:
        batch, _, heads, size = inputs.value.shape
        state = jnp.zeros((batch, heads, inputs.key.shape[-1], size), _kind(inputs))

    out, state = run_family("delta", delta_recurrence(), inputs, state, heads=each_head, **options)
    return out.astype(inputs.value.dtype), state


def _check_state(state: Array | None, key: Array, value: Array) -> None:
    right = (value.shape[0], value.shape[2], key.shape[-1], value.shape[-1])
    if state is not None and state.shape != right:
        raise ValueError(f"the state [B, H, K, V] of key {key.shape} and value {value.shape} is not {state.shape}")
