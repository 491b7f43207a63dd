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

With a bonus u (RWKV-6, 2404.05892) o_t = q_t^T (S_{t-1} + Diag(u) k_t v_t^T): sums to a step i end before g_i, so R
starts from 0 in the place of g, the diagonal of P is q_i . (u * k_i), and dg_m sums q_i dq_i over i > m alone, all
without a step's own pair, which has du = sum over i of (dO_i . v_i) q_i k_i.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.chunks import CHUNK, belongs, check_shapes, dot, following, lanes, places, sums_to_end, turned
from kernels_pallas.outer import Form, check, run

CLIP = 1e4  # exp(-CLIP) is 0


def reference(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    bonus: jax.Array,
    segment: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence with a bonus, a token at a time, in the type of the state; `outer.reference` has it without."""
    share = value.shape[1] // query.shape[1]
    query, key = (jnp.repeat(x, share, axis=1) for x in (query, key))
    same = segment == jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]

    def body(state: jax.Array, step: Any) -> Any:
        q, k, v, g, goes_on = step
        state = jnp.where(goes_on[:, None, None, None], state, 0)
        own = (bonus[None] * k)[..., :, None] * v[..., None, :]
        out = jnp.einsum("bhk,bhkv->bhv", q, state + own)
        return jnp.exp(g)[..., None] * state + k[..., :, None] * v[..., None, :], out

    moved = [jnp.moveaxis(x, 2, 0).astype(state.dtype) for x in (query, key, value, log_decay)]
    state, out = jax.lax.scan(body, state, (*moved, same.T))
    return jnp.moveaxis(out, 0, 2), state


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
    bonus: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`chunk_outer` with log_decay [B, H, T, K], bfloat16 or float32: `(out [B, H, T, V], state [B, H, K, V])`.

    With a `bonus` u [H, K] the output is q_t^T (S_{t-1} + Diag(u) k_t v_t^T).
    """
    decays = (*value.shape[:3], query.shape[3])
    form = FORM if bonus is None else BONUS
    check(form.name, query, key, value, log_decay, state, segment, decays)
    arrays = (query, key, value, log_decay, state, segment)
    if bonus is None:
        return run(form, chunk, save_states, interpret, *arrays)
    check_shapes(form.name, {"bonus": (bonus.shape, (value.shape[1], query.shape[3]))})
    return run(form, chunk, save_states, interpret, *arrays, bonus)


def vmem_bytes(key_size: int, value_size: int, chunk: int, dtype: Any) -> dict[str, int]:
    """What the forward and the backward kernel hold: blocks twice (one is copied as one is used), temporaries."""
    key_size, value_size = lanes(key_size), lanes(value_size)
    item, state = jnp.dtype(dtype).itemsize, 4 * key_size * value_size
    keys, values, scores = chunk * key_size, chunk * value_size, 4 * chunk * chunk
    forward = 2 * (2 * keys + 2 * values) * item + 2 * 4 * keys + 5 * state + 4 * scores + 8 * 4 * keys
    backward = 2 * (2 * keys + 3 * values) * item + 2 * 4 * 4 * keys + 7 * state + 6 * scores + 12 * 4 * keys
    spread = 4 * (keys + values)  # a product of float32 takes three parts of each side
    return {"forward": forward + 4 * spread, "backward": backward + 14 * spread}


def _levels(g: Any, one: Any, bonus: bool) -> Iterator[tuple[Any, Any, Any]]:
    """`(R [L, K], E [L, K], mask [L, L])` of every level, then the sums over the chunk in their place.

    `one` [L, L] is where the two steps are of one document. With a bonus R leaves a step's own decay out. Raises
    ValueError unless L is a power of two.
    """
    length = g.shape[0]
    if length & (length - 1):
        raise ValueError(f"decays per key pair the steps of a chunk: a power of two of them, not {length}")
    row, column = places(length)
    step = jax.lax.broadcasted_iota(jnp.int32, g.shape, 0)
    reach, rest, total, size = jnp.zeros_like(g) if bonus else g, jnp.zeros_like(g), g, 1
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
    """Clipped log decays [L, K], which steps are of one document [L, L], and what `belongs` gives."""
    one = turned(documents) == documents.astype(jnp.float32)
    return jnp.maximum(g.astype(jnp.float32), -CLIP), one, *belongs(documents)


def _forward_kernel(*refs: Any, bonus: bool = False) -> None:
    query, key, value, g, documents, first, *others = refs
    factor = others.pop(0)[...] if bonus else 1.0
    out, last, *states, held = others

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        held[...] = first[...]

    q, k, v, state = query[...], key[...], value[...], held[...]
    for before in states:
        before[...] = state
    g, one, carried, ends, through = gates(g[...], documents[...])
    wide_q, wide_k = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = diagonal(jnp.sum(wide_q * wide_k * factor, axis=1, keepdims=True))
    for reach, rest, mask in _levels(g, one, bonus):
        late, early = (wide_q * jnp.exp(reach)).astype(q.dtype), (wide_k * jnp.exp(rest)).astype(k.dtype)
        if mask is not None:
            scores = scores + jnp.where(mask, dot(late, early, (1, 1)), 0)
    carry = jnp.where(carried, dot(late, state.astype(q.dtype), (1, 0)), 0)
    out[...] = (dot(scores.astype(v.dtype), v, (1, 0)) + carry).astype(out.dtype)
    whole = reach[-1:] + g[-1:] if bonus else reach[-1:]
    kept = turned(jnp.exp(whole))[:, :1]
    state = jnp.where(through, kept * state, 0) + dot(jnp.where(ends, early, 0).astype(k.dtype), v, (0, 0))
    held[...] = state
    last[...] = state


def diagonal(column: Any) -> Any:
    """A column [L, 1] on the diagonal of [L, L]."""
    row, other = places(column.shape[0])
    return jnp.where(row == other, column, 0)


def _backward_kernel(*refs: Any, bonus: bool = False) -> None:
    query, key, value, g, documents, before, d_out, d_last, *others = refs
    factor = others.pop(0)[...] if bonus else 1.0
    dq, dk, dv, dg, d_first, *d_bonus, held = others

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        held[...] = d_last[...]
        for to in d_bonus:
            to[...] = jnp.zeros_like(to)

    q, k, v, state, do, after = query[...], key[...], value[...], before[...], d_out[...], held[...]
    kind = q.dtype
    g, one, carried, ends, through = gates(g[...], documents[...])
    wide_q, wide_k, narrow = q.astype(jnp.float32), k.astype(jnp.float32), after.astype(kind)
    d_scores = dot(do, v, (1, 1))
    own = jnp.sum(do.astype(jnp.float32) * v.astype(jnp.float32), axis=1, keepdims=True)  # of a step with itself
    scores = diagonal(jnp.sum(wide_q * wide_k * factor, axis=1, keepdims=True))
    other_q, other_k = jnp.zeros_like(wide_q), jnp.zeros_like(wide_k)  # of a step with others
    for reach, rest, mask in _levels(g, one, bonus):
        from_start, to_end = jnp.exp(reach), jnp.exp(rest)
        late, early = (wide_q * from_start).astype(kind), (wide_k * to_end).astype(kind)
        if mask is not None:
            scores = scores + jnp.where(mask, dot(late, early, (1, 1)), 0)
            masked = jnp.where(mask, d_scores, 0).astype(kind)
            other_q = other_q + from_start * dot(masked, early, (1, 0))
            other_k = other_k + to_end * dot(masked, late, (0, 0))
    late, early = jnp.where(carried, late, 0), jnp.where(ends, early, 0)
    other_q = other_q + jnp.where(carried, from_start * dot(do, state.astype(kind), (1, 1)), 0)
    to_state = jnp.where(ends, to_end * dot(v, narrow, (1, 1)), 0)
    other_k = other_k + to_state
    dq[...] = other_q + own * wide_k * factor
    dk[...] = other_k + own * wide_q * factor
    for to in d_bonus:
        to[...] += jnp.sum(own * wide_q * wide_k, axis=0, keepdims=True)
    written = jnp.where(ends, dot(early, narrow, (1, 0)), 0)
    dv[...] = (dot(scores.astype(kind), do, (0, 0)) + written).astype(dv.dtype)
    whole = from_start[-1:] * jnp.exp(g[-1:]) if bonus else from_start[-1:]
    kept = turned(whole)[:, :1]
    of_q = following(wide_q * other_q, 1) if bonus else wide_q * other_q
    each = sums_to_end(of_q - wide_k * other_k)
    flowing = turned(jnp.sum(jnp.where(through, kept * state * after, 0), axis=1, keepdims=True))[:1]
    dg[...] = each + flowing + jnp.sum(wide_k * to_state, axis=0, keepdims=True)
    first = dot(late, do, (0, 0)) + jnp.where(through, kept * after, 0)
    held[...] = first
    d_first[...] = first


FORM = Form("chunk_outer_keys", _forward_kernel, _backward_kernel)
BONUS = Form(
    "chunk_outer_keys_bonus",
    functools.partial(_forward_kernel, bonus=True),
    functools.partial(_backward_kernel, bonus=True),
)
