"""mLSTM's exponential gating: S' = f S + i k v^T with a normaliser, gates in log space under a running maximum."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqmodels import compat
from seqmodels.operators import kernels
from seqmodels.operators.decayed import exact, read_decayed, weigh, wide, write_decayed
from seqmodels.operators.diagonal import after_each, since_last_reset, sums_between
from seqmodels.operators.family import each_head, run_family
from seqmodels.scan import Recurrence
from seqmodels.typing import Segments

EPS = 1e-6
"""Added to the denominator, as published: where the input gates are large, exp(-m) underflows, and a query orthogonal
to the normaliser would divide by zero. It bounds outputs by 1e6 times their numerator."""


class Exponential(NamedTuple):
    """One step's inputs: `query`, `key` [K], `value` [V], and the logs of the input and the forget gate."""

    query: Float[Array, "K"]
    key: Float[Array, "K"]
    value: Float[Array, "V"]
    log_input: Float[Array, ""]
    log_forget: Float[Array, ""]


class ExponentialState(NamedTuple):
    """The true normaliser and memory are exp(log_max) times these; log_max is -inf, they are 0, before any token."""

    log_max: Float[Array, "*B"]
    normaliser: Float[Array, "*B K"]
    memory: Float[Array, "*B K V"]


class ExponentialElement(NamedTuple):
    """A span: the sum of its log forget gates, and the state that it leaves behind an empty one."""

    log_forget: Float[Array, ""]
    written: ExponentialState


def exponential_recurrence(eps: float = EPS) -> Recurrence:
    """C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t, out = q^T C / max(|q^T n|, 1) (2405.04517).

    Kept under m_t = max(log f_t + m_{t-1}, log i_t), from m = -inf: C and n stand for exp(-m) times the above, and
    out = q^T C / (max(|q^T n|, exp(-m)) + eps). `log_forget` is in [-inf, 0], `log_input` any number or -inf (nothing
    is written). Every exponent is a sum of logs <= 0 less a maximum over such sums, so nothing overflows.
    """

    def emit(inputs: Exponential, state: ExponentialState, reset: Bool[Array, "C"]) -> Array:
        query, log_input = wide(inputs.query), wide(inputs.log_input)
        log_forget = jnp.where(reset, -jnp.inf, wide(inputs.log_forget))  # nothing before a reset reaches beyond it
        reach = jnp.cumsum(log_forget) + state.log_max
        inside = sums_between(log_forget) + log_input[None]
        log_max = larger(reach, _maxima(inside, log_forget, log_input))
        log_carried = _under(reach, log_max)
        scores = compat.wide_einsum("ik,jk->ij", inputs.query, inputs.key) * _weight(inside, log_max[:, None])
        values = inputs.value
        memory = compat.wide_einsum("ij,jv->iv", scores.astype(jnp.result_type(inputs.key, values)), values)
        memory += read_decayed(query, log_carried[:, None], state.memory)
        normaliser = jnp.sum(scores, axis=1) + jnp.exp(log_carried) * (query @ state.normaliser)
        return _normalise(memory, normaliser, log_max, eps)

    def read(state: ExponentialState, inputs: Exponential) -> Array:
        query = wide(inputs.query)
        return _normalise(query @ state.memory, query @ state.normaliser, state.log_max, eps)

    return Recurrence(
        elements=_element,
        combine=lambda a, b: ExponentialElement(a.log_forget + b.log_forget, _act(b, a.written)),
        identity=lambda e: ExponentialElement(jnp.zeros_like(e.log_forget), _empty_like(e.written)),
        act=_act,
        read=read,
        initial=lambda x: empty_state((), x.key.shape[-1], x.value.shape[-1], jnp.result_type(x.key, x.value)),
        neutral=lambda x: x._replace(
            log_input=jnp.full_like(x.log_input, -jnp.inf), log_forget=jnp.zeros_like(x.log_forget)
        ),
        fold=_fold,
        emit=emit,
    )


def empty_state(batch: tuple[int, ...], key_size: int, value_size: int, dtype: Any = jnp.float32) -> ExponentialState:
    """What a document starts from, in at least float32."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    zeros = lambda *shape: jnp.zeros((*batch, *shape), dtype)
    return ExponentialState(jnp.full(batch, -jnp.inf, dtype), zeros(key_size), zeros(key_size, value_size))


def _empty_like(state: ExponentialState) -> ExponentialState:
    return jax.tree.map(jnp.zeros_like, state)._replace(log_max=jnp.full_like(state.log_max, -jnp.inf))


def larger(a: Array, b: Array) -> Array:
    """The maximum, whose gradient always goes to one side. That of jnp.maximum and jnp.max goes where an operand equals
    the result, and is lost where a fused backward pass recomputes the operand with another rounding."""
    return jnp.where(a >= b, a, b)


def _largest(x: Float[Array, "*C C"]) -> Float[Array, "*C"]:
    """The maximum over the last axis; as `larger`, with its gradient for exactly one entry."""
    place = jnp.argmax(x, axis=-1, keepdims=True)
    return jnp.sum(jnp.where(jax.lax.broadcasted_iota(place.dtype, x.shape, x.ndim - 1) == place, x, 0), axis=-1)


def _maxima(
    inside: Float[Array, "C C"], log_forget: Float[Array, "C"], log_input: Float[Array, "C"]
) -> Float[Array, "C"]:
    """`_largest(inside)`, whose gradient takes the way of m_t = max(log_forget_t + m_{t-1}, log_input_t) from m = -inf.

    That is as many steps as C has digits, over spans of 1, 2, 4, ... tokens up to each, where an index costs C^2. The
    values have to be those of `inside`: beside large gates, sums of another order can be far above all of them.
    """
    span, way, shift = log_forget, log_input, 1
    while shift < span.shape[0]:
        before = lambda x, empty, shift=shift: jnp.concatenate([jnp.full_like(x[:shift], empty), x[:-shift]])
        way = larger(way, span + before(way, -jnp.inf))
        span = span + before(span, 0)
        shift *= 2
    slope_alone = jnp.where(way == -jnp.inf, 0, way - jax.lax.stop_gradient(way))
    return jax.lax.stop_gradient(jnp.max(inside, axis=1)) + slope_alone  # 0, with a gradient


def _weight(log: Array, log_max: Array) -> Array:
    """exp(log - log_max), both <= log_max, and 0 where the maximum of nothing is -inf; gradients there are 0 too."""
    return jnp.exp(_under(log, log_max))


def _under(log: Array, log_max: Array) -> Array:
    return log - jnp.where(log_max == -jnp.inf, 0, log_max)


def _normalise(memory: Array, normaliser: Array, log_max: Array, eps: float) -> Array:
    """memory / (max(|normaliser|, exp(-m)) + eps), both sides times exp(min(m, 0)): exp(-m) itself overflows."""
    scale = jnp.exp(jnp.minimum(log_max, 0))
    floor = jnp.exp(-jnp.maximum(log_max, 0))
    return weigh(memory, scale / (jnp.maximum(jnp.abs(normaliser) * scale, floor) + eps * scale))


def _element(inputs: Exponential) -> ExponentialElement:
    log_input, key = wide(inputs.log_input), wide(inputs.key)
    normaliser = jnp.where(log_input == -jnp.inf, 0, key)  # an empty element is 0 throughout
    memory = normaliser[:, None] * wide(inputs.value)[None]
    return ExponentialElement(wide(inputs.log_forget), ExponentialState(log_input, normaliser, memory))


def _act(element: ExponentialElement, state: ExponentialState) -> ExponentialState:
    """Both sides brought under their common maximum."""
    written, forgotten = element.written, element.log_forget + state.log_max
    log_max = larger(forgotten, written.log_max)
    old, new = _weight(forgotten, log_max), _weight(written.log_max, log_max)
    normaliser = old * state.normaliser + new * written.normaliser
    return ExponentialState(log_max, normaliser, old * state.memory + new * written.memory)


def _fold(inputs: Exponential, reset: Bool[Array, "C"]) -> ExponentialElement:
    kept = since_last_reset(reset)
    log_forget = jnp.where(kept, wide(inputs.log_forget), 0)
    log_weight = jnp.where(kept, after_each(log_forget) + wide(inputs.log_input), -jnp.inf)
    log_max = _largest(log_weight)
    log_weight = _under(log_weight, log_max)
    memory = write_decayed(inputs.key, inputs.value, log_weight[:, None])
    normaliser = exact("c,ck->k", jnp.exp(log_weight), wide(inputs.key))
    return ExponentialElement(jnp.sum(log_forget), ExponentialState(log_max, normaliser, memory))


def mlstm_scan(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T H K"],
    value: Float[Array, "B T H V"],
    log_input: Float[Array, "B T H"],
    log_forget: Float[Array, "B T H"],
    state: ExponentialState | None = None,
    *,
    eps: float = EPS,
    segments: Segments | None = None,
    method: str = "auto",
    chunk: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], ExponentialState]:
    """mLSTM's recurrence (see `exponential_recurrence`) for a batch of heads: `(out, state)`.

    The query's scale (K^-1/2 in the papers) is the caller's. `log_input` is the pre-activation of an exponential input
    gate, `log_forget` <= 0 the log-sigmoid of the forget gate's; both may be -inf. Outputs have the type of `value`,
    the state [B, H], [B, H, K], [B, H, K, V] is at least float32. `segments` None: one document a row, which continues
    `state`. The chunk form has gradients of its own, which forward-mode differentiation alone does not pass;
    `sequential` does. Raises ValueError on shapes that do not fit.
    """
    batch, _, heads, size = query.shape
    gates = (log_input.shape, log_forget.shape)
    if query.shape != key.shape or value.shape[:3] != query.shape[:3] or gates != (query.shape[:3],) * 2:
        raise ValueError(
            f"query and key [B, T, H, K], value [B, T, H, V], log_input and log_forget [B, T, H]; "
            f"not {query.shape}, {key.shape}, {value.shape}, {gates[0]}, {gates[1]}"
        )
    empty = empty_state((batch, heads), size, value.shape[-1], jnp.result_type(key, value))
    state = empty if state is None else state
    shapes = jax.tree.map(jnp.shape, (tuple(state), tuple(empty)))
    if shapes[0] != shapes[1]:
        raise ValueError(f"the state of key {key.shape} and value {value.shape} is shaped {shapes[1]}, not {shapes[0]}")

    sizes = (size, value.shape[-1])
    where: Any = {"chunk": chunk, "sequence_axis": sequence_axis}
    given = (query, key, value, log_input, log_forget, state)
    kernel = lambda: kernels.exponential(*given, eps=eps, segments=segments, **where)
    served = kernels.serve(method, "exponential", kernel, query, key, value, sizes=sizes, **where)
    if served is not None:
        out, after = served
        return out, ExponentialState(*after)
    out, state = run_family(
        "exponential",
        exponential_recurrence(eps),
        Exponential(query, key, value, log_input, log_forget),
        state,
        segments=segments,
        method=method,
        chunk=chunk,
        sequence_axis=sequence_axis,
        heads=each_head,
    )
    return out.astype(value.dtype), state
