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

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.outer import PARAMS, Blocks, documents_of, dot, whole_chunks

CHUNK = 128
CLIP = 1e4  # exp(-CLIP) is 0


def reference(
    query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array, state: jax.Array, segment: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The recurrence a token at a time, in the type of the state."""
    share = value.shape[1] // query.shape[1]
    query, key = (jnp.repeat(x, share, axis=1) for x in (query, key))
    before = jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]
    kept = jnp.where((segment == before)[:, None, :, None], jnp.exp(log_decay), 0)

    def body(state: jax.Array, step: Any) -> Any:
        q, k, v, a = step
        state = a[..., None] * state + k[..., :, None] * v[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q, state)

    moved = [jnp.moveaxis(x, 2, 0).astype(state.dtype) for x in (query, key, value, kept)]
    state, out = jax.lax.scan(body, state, moved)
    return jnp.moveaxis(out, 0, 2), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
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
    return _forward(query, key, value, log_decay, state, segment, chunk, save_states, interpret)[0]


def vmem_bytes(key_size: int, value_size: int, chunk: int, dtype: Any) -> dict[str, int]:
    """What the forward and the backward kernel hold: blocks twice (one is copied as one is used), temporaries."""
    item, state = jnp.dtype(dtype).itemsize, 4 * key_size * value_size
    keys, values, scores = chunk * key_size, chunk * value_size, 4 * chunk * chunk
    forward = 2 * (2 * keys + 2 * values) * item + 2 * 4 * keys + 5 * state + 4 * scores + 8 * 4 * keys
    backward = 2 * (2 * keys + 3 * values) * item + 2 * 4 * 4 * keys + 7 * state + 6 * scores + 12 * 4 * keys
    return {"forward": forward, "backward": backward}


def _check(query: Any, key: Any, value: Any, log_decay: Any, state: Any, segment: Any) -> None:
    batch, groups, length, size = query.shape
    heads = value.shape[1]
    expected = {
        "key": (key.shape, (batch, groups, length, size)),
        "value": (value.shape[:3], (batch, heads, length)),
        "log_decay": (log_decay.shape, (batch, heads, length, size)),
        "state": (state.shape, (batch, heads, size, value.shape[3])),
        "segment": (segment.shape, (batch, length)),
    }
    wrong = [f"{name} {found}, not {right}" for name, (found, right) in expected.items() if found != right]
    if heads % groups:
        wrong.append(f"{groups} groups of queries for {heads} heads of values")
    if wrong:
        raise ValueError(f"chunk_outer_keys with query {query.shape}: {'; '.join(wrong)}")


def _forward(
    query: Any, key: Any, value: Any, log_decay: Any, state: Any, segment: Any, chunk: int, save: bool, interpret: Any
) -> Any:
    _check(query, key, value, log_decay, state, segment)
    q, k, v, g = whole_chunks(chunk, query, key, value, log_decay)
    out, after, *states = _run_forward(q, k, v, g, documents_of(segment, chunk), state, chunk, save, interpret)
    residuals = (query, key, value, log_decay, state, segment, states[0] if save else None)
    return (out[:, :, : query.shape[2]], after), residuals


def _run_forward(
    q: Any, k: Any, v: Any, g: Any, documents: Any, state: Any, chunk: int, save: bool, interpret: Any
) -> Any:
    blocks = Blocks(q, v, chunk)
    size = (blocks.key_size, blocks.value_size)
    outputs = [(blocks.values, jax.ShapeDtypeStruct(v.shape, v.dtype)), (blocks.state, blocks.shape(*size))]
    outputs += [(blocks.states, blocks.shape(blocks.chunks, *size))] if save else []
    return pl.pallas_call(
        _forward_kernel,
        grid=blocks.grid,
        in_specs=[blocks.shared, blocks.shared, blocks.values, blocks.keys, blocks.documents, blocks.state],
        out_specs=[spec for spec, _ in outputs],
        out_shape=[shape for _, shape in outputs],
        scratch_shapes=blocks.scratch,
        compiler_params=PARAMS,
        interpret=interpret,
        name="chunk_outer_keys_forward",
    )(q, k, v, g, documents, state.astype(jnp.float32))


def _levels(g: Any, one: Any) -> Iterator[tuple[Any, Any, Any]]:
    """`(R [L, K], E [L, K], mask [L, L])` of every level, then the sums over the chunk in their place.

    `one` [L, L] is where the two steps are of one document.
    """
    length = g.shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, one.shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, one.shape, 1)
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


def _gates(g: Any, documents: Any) -> Any:
    """Clipped log decays [L, K], which steps are of one document [L, L], and as columns: whether the state before goes
    on to a step, and whether a step is of the last document."""
    length = documents.shape[1]
    across = jnp.broadcast_to(documents.astype(jnp.float32), (length, length))
    down = across.T
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
    g, one, carried, ends = _gates(g[...], documents[...])
    wide_q, wide_k = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = _diagonal(jnp.sum(wide_q * wide_k, axis=1, keepdims=True), one)
    for reach, rest, mask in _levels(g, one):
        late, early = (wide_q * jnp.exp(reach)).astype(q.dtype), (wide_k * jnp.exp(rest)).astype(k.dtype)
        if mask is not None:
            scores = scores + jnp.where(mask, dot(late, early, (1, 1)), 0)
    carry = jnp.where(carried, dot(late, state.astype(q.dtype), (1, 0)), 0)
    out[...] = (dot(scores.astype(v.dtype), v, (1, 0)) + carry).astype(out.dtype)
    kept = _turned(jnp.where(carried[-1:], jnp.exp(reach[-1:]), 0))[:, :1]
    state = kept * state + dot(jnp.where(ends, early, 0).astype(k.dtype), v, (0, 0))
    held[...] = state
    last[...] = state


def _turned(vector: Any) -> Any:
    """A row [1, K] or a column [K, 1] the other way round, in all columns or rows of [K, K]."""
    size = max(vector.shape)
    return jnp.broadcast_to(vector, (size, size)).T


def _diagonal(column: Any, like: Any) -> Any:
    row = jax.lax.broadcasted_iota(jnp.int32, like.shape, 0)
    return jnp.where(row == jax.lax.broadcasted_iota(jnp.int32, like.shape, 1), column, 0)


def _backward(chunk: int, save: bool, interpret: Any, residuals: Any, gradients: Any) -> Any:
    query, key, value, log_decay, state, segment, states = residuals
    d_out, d_last = gradients
    length, groups = query.shape[2], query.shape[1]
    q, k, v, g, d_out = whole_chunks(chunk, query, key, value, log_decay, d_out)
    documents = documents_of(segment, chunk)
    if states is None:
        states = _run_forward(q, k, v, g, documents, state, chunk, True, interpret)[2]
    blocks = Blocks(q, v, chunk, backward=True)
    padded, size = q.shape[2], (blocks.key_size, blocks.value_size)
    outputs = [
        (blocks.keys, blocks.shape(padded, blocks.key_size)),
        (blocks.keys, blocks.shape(padded, blocks.key_size)),
        (blocks.values, jax.ShapeDtypeStruct(v.shape, v.dtype)),
        (blocks.keys, blocks.shape(padded, blocks.key_size)),
        (blocks.state, blocks.shape(*size)),
    ]
    inputs = [blocks.shared, blocks.shared, blocks.values, blocks.keys, blocks.documents]
    inputs += [blocks.states, blocks.values, blocks.state]
    dq, dk, dv, dg, d_state = pl.pallas_call(
        _backward_kernel,
        grid=blocks.grid,
        in_specs=inputs,
        out_specs=[spec for spec, _ in outputs],
        out_shape=[shape for _, shape in outputs],
        scratch_shapes=blocks.scratch,
        compiler_params=PARAMS,
        interpret=interpret,
        name="chunk_outer_keys_backward",
    )(q, k, v, g, documents, states, d_out, d_last.astype(jnp.float32))
    over_heads = lambda x: jnp.sum(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), axis=2)[:, :, :length]
    return (
        over_heads(dq).astype(query.dtype),
        over_heads(dk).astype(key.dtype),
        dv[:, :, :length],
        dg[:, :, :length].astype(log_decay.dtype),
        d_state.astype(state.dtype),
        None,
    )


def _backward_kernel(*refs: Any) -> None:
    query, key, value, g, documents, before, d_out, d_last, dq, dk, dv, dg, d_first, held = refs

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        held[...] = d_last[...]

    q, k, v, state, do, after = query[...], key[...], value[...], before[...], d_out[...], held[...]
    kind = q.dtype
    g, one, carried, ends = _gates(g[...], documents[...])
    wide_q, wide_k, narrow = q.astype(jnp.float32), k.astype(jnp.float32), after.astype(kind)
    d_scores = dot(do, v, (1, 1))
    own = jnp.sum(do.astype(jnp.float32) * v.astype(jnp.float32), axis=1, keepdims=True)  # of a step with itself
    scores = _diagonal(jnp.sum(wide_q * wide_k, axis=1, keepdims=True), one)
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
    kept = _turned(jnp.where(carried[-1:], from_start[-1:], 0))[:, :1]
    each, step = wide_q * own_q - wide_k * own_k, 1
    row = jax.lax.broadcasted_iota(jnp.int32, each.shape, 0)
    while step < each.shape[0]:  # sums from each step to the end
        each = each + jnp.where(row < each.shape[0] - step, pltpu.roll(each, each.shape[0] - step, 0), 0)
        step *= 2
    flowing = _turned(jnp.sum(kept * state * after, axis=1, keepdims=True))[:1]
    dg[...] = each + flowing + jnp.sum(wide_k * to_state, axis=0, keepdims=True)
    first = dot(late, do, (0, 0)) + kept * after
    held[...] = first
    d_first[...] = first


chunk_outer_keys.defvjp(_forward, _backward)
