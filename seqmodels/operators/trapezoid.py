"""The trapezoidal outer-product recurrence of Mamba-3 (arXiv 2603.15569), with drives of rank R."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqmodels import compat
from seqmodels.operators.decayed import decayed_scores, wide
from seqmodels.operators.diagonal import after_each, since_last_reset
from seqmodels.operators.family import each_head, run_family
from seqmodels.operators.outer import OuterElement
from seqmodels.scan import Recurrence
from seqmodels.typing import Segments

CHUNK = 64  # pairs of a token and a rank


class Trapezoid(NamedTuple):
    """One step's inputs: R queries, keys and values, the log decay, and what the step's outer product counts.

    `now` for its own output, `now + later` for all steps after it.
    """

    query: Float[Array, "R K"]
    key: Float[Array, "R K"]
    value: Float[Array, "R V"]
    log_decay: Float[Array, ""]
    now: Float[Array, ""]
    later: Float[Array, ""]


def trapezoid_recurrence() -> Recurrence:
    """G_t = a_t G_{t-1} + (now_t + later_t) sum_r k_tr v_tr^T, read as q_tr^T (a_t G_{t-1} + now_t sum_s k_ts v_ts^T).

    `later` reaches no output of its own step, so that it may come from the next one. Decays are <= 0 in log.
    """

    def emit(inputs: Trapezoid, state: Array, reset: Bool[Array, "C"]) -> Array:
        log_decay = wide(inputs.log_decay)[:, None]
        steps, segment = jnp.arange(reset.shape[0]), jnp.cumsum(reset.astype(jnp.int32))
        ones = jnp.ones_like(log_decay)
        decay = decayed_scores(ones, ones, log_decay)  # [C, C], zero above the diagonal
        weight = jnp.where(steps[:, None] == steps[None], inputs.now[None], decay * (inputs.now + inputs.later)[None])
        weight = jnp.where(segment[:, None] == segment[None], weight, 0)
        rank, size = inputs.key.shape[1:]
        query, key = inputs.query.reshape(-1, size), inputs.key.reshape(-1, size)
        weight = jnp.repeat(jnp.repeat(weight, rank, axis=0), rank, axis=1)
        scores = compat.wide_einsum("ik,jk->ij", query, key) * weight
        value = inputs.value.reshape(-1, inputs.value.shape[-1])
        inside = compat.wide_einsum("ij,jv->iv", scores.astype(value.dtype), value)
        reach = jnp.where(segment == 0, jnp.exp(jnp.cumsum(log_decay[:, 0])), 0)
        carried = (wide(query) @ state) * jnp.repeat(reach, rank)[:, None]
        return (inside + carried).reshape(inputs.value.shape)

    def read(state: Array, x: Trapezoid) -> Array:
        own = jnp.einsum("rk,sk,sv->rv", *map(wide, (x.query, x.key, x.value)))
        return jnp.exp(wide(x.log_decay)) * (wide(x.query) @ state) + x.now * own

    return Recurrence(
        elements=lambda x: fold(jax.tree.map(lambda y: y[None], x), jnp.zeros(1, bool)),
        combine=lambda a, b: OuterElement(a.log_decay + b.log_decay, act(b, a.memory)),
        identity=lambda e: jax.tree.map(jnp.zeros_like, e),
        act=act,
        read=read,
        read_before=True,
        initial=lambda x: jnp.zeros((x.key.shape[1], x.value.shape[1]), jnp.result_type(*x, jnp.float32)),
        neutral=lambda x: x._replace(key=jnp.zeros_like(x.key), log_decay=jnp.zeros_like(x.log_decay)),
        fold=fold,
        emit=emit,
    )


def act(element: OuterElement, state: Array) -> Array:
    """The state after a span."""
    return jnp.exp(element.log_decay)[:, None] * state + element.memory


def fold(inputs: Trapezoid, reset: Bool[Array, "C"]) -> OuterElement:
    """A chunk's element since its last reset."""
    kept = since_last_reset(reset)
    log_decay = jnp.where(kept, wide(inputs.log_decay), 0)
    weight = jnp.where(kept, (inputs.now + inputs.later) * jnp.exp(after_each(log_decay)), 0)
    key = wide(inputs.key) * weight[:, None, None]
    memory = compat.wide_einsum("crk,crv->kv", key.astype(inputs.key.dtype), inputs.value)
    return OuterElement(jnp.sum(log_decay)[None], memory)


class LastToken(NamedTuple):
    """Key and value of the token before: what the first one of a call still adds to the memory."""

    key: Float[Array, "B H R K"]
    value: Float[Array, "B H R V"]


def trapezoidal_scan(
    query: Float[Array, "B T H R K"],
    key: Float[Array, "B T H R K"],
    value: Float[Array, "B T H R V"],
    *,
    log_decay: Float[Array, "B T H"],
    now: Float[Array, "B T H"],
    before: Float[Array, "B T H"],
    memory: Float[Array, "B H K V"],
    last: LastToken,
    segments: Segments,
    method: str = "auto",
    chunk: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T H R V"], Float[Array, "B H K V"]]:
    """S_t = a_t (S_{t-1} + before_t U_{t-1}) + now_t U_t, U = sum_r k_r v_r^T, out_tr = q_tr^T S_t: `(out, memory)`.

    `memory` is the state S, and `last` are key and value of the token it ends with (zeros: none). With a step dt, a
    share lambda and log a = A dt, now = lambda dt and before = (1 - lambda) dt are the trapezoidal rule. U_{t-1} is of
    the same document, zero at its start. Rather than as a second drive it enters with U_{t-1} itself: G_t = S_t +
    before_{t+1} U_t is a recurrence with one drive of rank R, whose last step lacks the term that the next call adds.
    `log_decay` <= 0. Outputs have the type of `value`, states are at least float32. On CPUs the chunk form of a long
    row has a gradient of its own, which forward-mode differentiation alone does not pass; `sequential` does. Raises
    ValueError on shapes.
    """
    expected = (*key.shape[:3], *key.shape[3:])
    shapes = [x.shape for x in (query, key, value, log_decay, now, before)]
    steps = key.shape[:3]
    if query.shape != expected or value.shape[:4] != key.shape[:4] or any(shape != steps for shape in shapes[3:]):
        raise ValueError(
            f"query and key [B, T, H, R, K], value [B, T, H, R, V], log_decay, now and before [B, T, H]; not {shapes}"
        )
    if memory.shape != (key.shape[0], *key.shape[2:3], key.shape[4], value.shape[4]):
        raise ValueError(f"the memory [B, H, K, V] of key {key.shape} and value {value.shape} is not {memory.shape}")
    follows = segments.valid & ~segments.start
    before = jnp.where(follows[..., None], before, 0)
    first, after_span = before[:, 0], jnp.zeros_like(before[:, 0])
    if sequence_axis is not None:
        firsts = compat.gather_along(before[:, 0], sequence_axis)
        nexts = jnp.concatenate([firsts[1:], jnp.zeros_like(firsts[:1])])
        first, after_span = firsts[0], nexts[jax.lax.axis_index(sequence_axis)]
    later = jnp.concatenate([before[:, 1:], after_span[:, None]], axis=1)
    pending = jnp.einsum("bhrk,bhrv->bhkv", wide(last.key), wide(last.value))
    out, memory = run_family(
        "outer",
        trapezoid_recurrence(),
        Trapezoid(query, key, value, log_decay, now, later),
        memory + first[..., None, None] * pending,
        segments=segments,
        method=method,
        chunk=chunk if chunk is not None else max(1, CHUNK // key.shape[3]),
        sequence_axis=sequence_axis,
        heads=each_head,
    )
    return out.astype(value.dtype), memory
