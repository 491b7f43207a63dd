"""`chunk_outer_keys`: S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T, read as o_t = q_t^T S_t, with a decay per key.

As `chunk_outer` (GLA, 2312.06635), but that a score has a sum over keys that decay each in their own way:

    P_ij = sum over c of q_ic k_jc exp(G_ijc)        G_ijc the sum of g_c over j < s <= i, for j <= i of one document

which is no product of matrices, and as (Q exp(cumsum)) (K exp(-cumsum))^T overflows. Here steps are paired in blocks of
1, 2, 4 .. L / 2: of two neighbouring blocks, a late step i and an early step j have G_ij = R_i + E_j, where R_i sums
from i's block's start to i, and E_j from after j to its block's end: both at most 0, so each level is one safe product

    P += mask * (Q exp(R)) (K exp(E))^T

and R, E grow from level to level by the other block's total. The backward pass goes through the same levels with
dP = dO V^T, and dg_m = sum over i >= m of (q_i dq_i - k_i dk_i), and sum over v of S' dS', key by key. In the place of
exp(-inf) stands exp(-CLIP), which is 0 too, and whose sums stay finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.chunks import CHUNK, places, turned
from kernels_pallas.outer import Form, check, dot, run

CLIP = 1e4  # exp(-CLIP) is 0


def chunk_outer_keys(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    segment: jax.Array,
    chunk: int = CHUNK,
    save_states: bool = False,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`chunk_outer` with log_decay [B, H, T, K], bfloat16 or float32: `(out [B, H, T, V], state [B, H, K, V])`."""
    decays = (*value.shape[:3], query.shape[3])
    check(FORM.name, query, key, value, log_decay, state, segment, decays)
    return run(FORM, chunk, save_states, interpret, query, key, value, log_decay, state, segment)


def vmem_bytes(key_size: int, value_size: int, chunk: int, dtype: Any) -> dict[str, int]:
    """What the forward and the backward kernel hold: blocks twice (one is copied as one is used), temporaries."""
    item, state = jnp.dtype(dtype).itemsize, 4 * key_size * value_size
    keys, values, scores = chunk * key_size, chunk * value_size, 4 * chunk * chunk
    forward = 2 * (2 * keys + 2 * values) * item + 2 * 4 * keys + 5 * state + 4 * scores + 8 * 4 * keys
    backward = 2 * (2 * keys + 3 * values) * item + 2 * 4 * 4 * keys + 7 * state + 6 * scores + 12 * 4 * keys
    return {"forward": forward, "backward": backward}


def _levels(g: Any, one: Any) -> Iterator[tuple[Any, Any, Any]]:
    """`(R [L, K], E [L, K], mask [L, L])` of every level, then the sums over the chunk in their place.

    `one` [L, L] is where the two steps are of one document. Raises ValueError unless L is a power of two.
    """
    length = g.shape[0]
    if length & (length - 1):
        raise ValueError(f"decays per key pair the steps of a chunk: a power of two of them, not {length}")
    row, column = places(length)
    step = jax.lax.broadcasted_iota(jnp.int32, g.shape, 0)
    reach, rest, total, size = g, jnp.zeros_like(g), g, 1
    while size < length:
        late = (row // size) % 2 == 1
        yield reach, rest, one & late & (column // size == row // size - 1)
        second = (step // size) % 2 == 1
        earlier, later = pltpu.roll(total, size, 0), pltpu.roll(total, length - size, 0)
        reach = reach + jnp.where(second, earlier, 0)
        rest = rest + jnp.where(second, 0, later)
        total = total + jnp.where(second, earlier, later)
        size *= 2
    yield reach, rest, None


def gates(g: Any, documents: Any) -> Any:
    """Clipped log decays [L, K], which steps are of one document [L, L], and as columns: whether the state before goes
    on to a step, and whether a step is of the last document."""
    length = documents.shape[1]
    across = jnp.broadcast_to(documents.astype(jnp.float32), (length, length))
    down = turned(documents)
    first, last = down[:, :1], across[:1, -1:]
    return jnp.maximum(g.astype(jnp.float32), -CLIP), across == down, first == 0, first == last


def _forward_kernel(*refs: Any) -> None:
    query, key, value, g, documents, first, out, last, *states, held = refs

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        held[...] = first[...]

    q, k, v, state = query[...], key[...], value[...], held[...]
    for before in states:
        before[...] = state
    g, one, carried, ends = gates(g[...], documents[...])
    wide_q, wide_k = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = diagonal(jnp.sum(wide_q * wide_k, axis=1, keepdims=True))
    for reach, rest, mask in _levels(g, one):
        late, early = (wide_q * jnp.exp(reach)).astype(q.dtype), (wide_k * jnp.exp(rest)).astype(k.dtype)
        if mask is not None:
            scores = scores + jnp.where(mask, dot(late, early, (1, 1)), 0)
    carry = jnp.where(carried, dot(late, state.astype(q.dtype), (1, 0)), 0)
    out[...] = (dot(scores.astype(v.dtype), v, (1, 0)) + carry).astype(out.dtype)
    kept = turned(jnp.where(carried[-1:], jnp.exp(reach[-1:]), 0))[:, :1]
    state = kept * state + dot(jnp.where(ends, early, 0).astype(k.dtype), v, (0, 0))
    held[...] = state
    last[...] = state


def diagonal(column: Any) -> Any:
    """A column [L, 1] on the diagonal of [L, L]."""
    row, other = places(column.shape[0])
    return jnp.where(row == other, column, 0)


def _backward_kernel(*refs: Any) -> None:
    query, key, value, g, documents, before, d_out, d_last, dq, dk, dv, dg, d_first, held = refs

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        held[...] = d_last[...]

    q, k, v, state, do, after = query[...], key[...], value[...], before[...], d_out[...], held[...]
    kind = q.dtype
    g, one, carried, ends = gates(g[...], documents[...])
    wide_q, wide_k, narrow = q.astype(jnp.float32), k.astype(jnp.float32), after.astype(kind)
    d_scores = dot(do, v, (1, 1))
    own = jnp.sum(do.astype(jnp.float32) * v.astype(jnp.float32), axis=1, keepdims=True)  # of a step with itself
    scores = diagonal(jnp.sum(wide_q * wide_k, axis=1, keepdims=True))
    own_q, own_k = own * wide_k, own * wide_q
    for reach, rest, mask in _levels(g, one):
        from_start, to_end = jnp.exp(reach), jnp.exp(rest)
        late, early = (wide_q * from_start).astype(kind), (wide_k * to_end).astype(kind)
        if mask is not None:
            scores = scores + jnp.where(mask, dot(late, early, (1, 1)), 0)
            masked = jnp.where(mask, d_scores, 0).astype(kind)
            own_q = own_q + from_start * dot(masked, early, (1, 0))
            own_k = own_k + to_end * dot(masked, late, (0, 0))
    late, early = jnp.where(carried, late, 0), jnp.where(ends, early, 0)
    own_q = own_q + jnp.where(carried, from_start * dot(do, state.astype(kind), (1, 1)), 0)
    to_state = jnp.where(ends, to_end * dot(v, narrow, (1, 1)), 0)
    own_k = own_k + to_state
    dq[...] = own_q
    dk[...] = own_k
    dv[...] = (dot(scores.astype(kind), do, (0, 0)) + dot(early, narrow, (1, 0))).astype(dv.dtype)
    kept = turned(jnp.where(carried[-1:], from_start[-1:], 0))[:, :1]
    each, step = wide_q * own_q - wide_k * own_k, 1
    row = jax.lax.broadcasted_iota(jnp.int32, each.shape, 0)
    while step < each.shape[0]:  # sums from each step to the end
        each = each + jnp.where(row < each.shape[0] - step, pltpu.roll(each, each.shape[0] - step, 0), 0)
        step *= 2
    flowing = turned(jnp.sum(kept * state * after, axis=1, keepdims=True))[:1]
    dg[...] = each + flowing + jnp.sum(wide_k * to_state, axis=0, keepdims=True)
    first = dot(late, do, (0, 0)) + kept * after
    held[...] = first
    d_first[...] = first


FORM = Form("chunk_outer_keys", _forward_kernel, _backward_kernel)
