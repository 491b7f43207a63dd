"""`chunk_outer`: S_t = exp(g_t) S_{t-1} + k_t v_t^T, read as o_t = q_t^T S_t, with a decay per head.

Forward, for a chunk of L steps from the state S, with G_ij the sum of g over j < s <= i and M_ij = exp(G_ij) for j <= i
of one document, else 0 (Mamba-2, 2405.21060, and gated linear attention, 2312.06635):

    O  = (Q K^T * M) V + a * (Q S)                 a_i = exp(g_1 + .. + g_i) while the document of S goes on, else 0
    S' = b S + (w * K)^T V                         w_j = M_Lj, b = a_L

Backward, with dS' from the chunk after it and dA = dO V^T * M:

    dQ = dA K + a * (dO S^T)                       dV = (Q K^T * M)^T dO + w * (K dS')
    dK = dA^T Q + w * (V dS'^T)                    dS = (a * Q)^T dO + b dS'
    dg_m = sum over i >= m of (q_i . dq_i - k_i . dk_i), and <S', dS'> for every m of the chunk

G is summed up, never taken as a difference of sums: decays of any size, exp(-inf) = 0 among them, cost no digits.
The grid goes through the chunks of a head in turn, the state stays in VMEM: one pass over the inputs each way. States
before the chunks are computed again in the backward pass, or kept in the forward one (`save_states`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.chunks import (
    CHUNK,
    PARAMS,
    belongs,
    check_shapes,
    documents_of,
    dot,
    lanes,
    places,
    sums_between,
    turned,
    whole_chunks,
)
from kernels_pallas.manual import pallas_call


class Form(NamedTuple):
    """The two kernels of a kind of decay; `run` launches them."""

    name: str
    forward: Callable[..., None]
    backward: Callable[..., None]


def reference(
    query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array, state: jax.Array, segment: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The recurrence a token at a time, in the type of the state; log_decay is [B, H, T], or [B, H, T, K]."""
    share = value.shape[1] // query.shape[1]
    query, key = (jnp.repeat(x, share, axis=1) for x in (query, key))
    before = jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]
    log_decay = log_decay.reshape(*value.shape[:3], -1)

    def body(state: jax.Array, step: Any) -> Any:
        q, k, v, g, goes_on = step
        state = jnp.exp(g)[..., None] * jnp.where(goes_on[:, None, None, None], state, 0)
        state = state + k[..., :, None] * v[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q, state)

    moved = [jnp.moveaxis(x, 2, 0).astype(state.dtype) for x in (query, key, value, log_decay)]
    state, out = jax.lax.scan(body, state, (*moved, (segment == before).T))
    return jnp.moveaxis(out, 0, 2), state


def chunk_outer(
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
    """`(out [B, H, T, V], state [B, H, K, V])` of query and key [B, G, T, K], value [B, H, T, V], float32 log_decay
    [B, H, T] (at most 0, -inf too) and state [B, H, K, V].

    Head h reads query and key h // (H / G). `segment` [B, T] int32 counts the documents of a row: `state` goes on where
    it is 0, and every change starts from zeros. Inputs are bfloat16 or float32, products gather in float32; the output
    has the type of `value`. `interpret`: as `pallas_call` takes it. Raises ValueError on shapes that do not fit.
    """
    check(FORM.name, query, key, value, log_decay, state, segment, value.shape[:3])
    return run(FORM, chunk, save_states, interpret, query, key, value, log_decay, state, segment)


def vmem_bytes(key_size: int, value_size: int, chunk: int, dtype: Any) -> dict[str, int]:
    """What they hold: blocks twice (one is copied as one is used), states, scores, keys and values in float32."""
    key_size, value_size = lanes(key_size), lanes(value_size)
    item, state = jnp.dtype(dtype).itemsize, 4 * key_size * value_size
    keys, values, scores = chunk * key_size, chunk * value_size, 4 * chunk * chunk
    gates = 2 * 8 * chunk * 4  # rows of eight sublanes: decays and documents
    forward = 2 * ((2 * keys + 2 * values) * item + gates) + 5 * state + 4 * scores + 4 * 4 * (keys + values)
    backward = 2 * ((2 * keys + 2 * values) * item + 4 * (2 * keys + values) + 2 * gates) + 7 * state + 6 * scores
    backward += 12 * 4 * (keys + values)
    return {"forward": forward, "backward": backward}


def check(
    name: str, query: Any, key: Any, value: Any, log_decay: Any, state: Any, segment: Any, decays: tuple[int, ...]
) -> None:
    batch, groups, length, size = query.shape
    heads = value.shape[1]
    shapes = {
        "key": (key.shape, (batch, groups, length, size)),
        "value": (value.shape[:3], (batch, heads, length)),
        "log_decay": (log_decay.shape, decays),
        "state": (state.shape, (batch, heads, size, value.shape[3])),
        "segment": (segment.shape, (batch, length)),
    }
    uneven = [f"{groups} groups of queries for {heads} heads of values"] if not groups or heads % groups else []
    check_shapes(f"{name} with query {query.shape}", shapes, uneven)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def run(form: Form, chunk: int, save_states: bool, interpret: Any, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The arrays of `chunk_outer`, and a bonus where the form has one, checked, through the kernels of a form."""
    return _forward(form, chunk, save_states, interpret, *arrays)[0]


def _rows(log_decay: jax.Array) -> jax.Array:
    """[B, H, T] as rows [B, H, 1, T], in float32; [B, H, T, K] as it is."""
    return log_decay[:, :, None].astype(jnp.float32) if log_decay.ndim == 3 else log_decay


def _forward(form: Form, chunk: int, save: bool, interpret: Any, *arrays: Any) -> Any:
    *given, state, segment = arrays[:6]
    padded, documents = whole_chunks(chunk, *given, axis=2), documents_of(segment, chunk)
    out, after, *states = _outputs(form, padded, documents, state, arrays[6:], chunk, save, interpret)
    return (out[:, :, : given[0].shape[2]], after), (arrays, states[0] if save else None)


def _outputs(
    form: Form, padded: Any, documents: Any, state: Any, bonus: Any, chunk: int, save: bool, interpret: Any
) -> Any:
    q, k, v, g = padded
    g = _rows(g)
    blocks = Blocks(q, v, g, chunk)
    size = (blocks.key_size, blocks.value_size)
    outputs = [(blocks.values, jax.ShapeDtypeStruct(v.shape, v.dtype)), (blocks.state, blocks.shape(*size))]
    outputs += [(blocks.states, blocks.shape(blocks.chunks, *size))] if save else []
    inputs = [blocks.shared, blocks.shared, blocks.values, blocks.gates, blocks.documents, blocks.state]
    inputs += [blocks.bonus for _ in bonus]
    launch = blocks.call(form.forward, f"{form.name}_forward", inputs, outputs, interpret)
    return launch(q, k, v, g, documents, state.astype(jnp.float32), *(u[:, None].astype(jnp.float32) for u in bonus))


def _backward(form: Form, chunk: int, save: bool, interpret: Any, residuals: Any, gradients: Any) -> Any:
    (arrays, states), (d_out, d_last) = residuals, gradients
    *given, state, segment = arrays[:6]
    bonus = arrays[6:]
    query, key, _, log_decay = given
    length, groups = query.shape[2], query.shape[1]
    q, k, v, g, d_out = whole_chunks(chunk, *given, d_out, axis=2)
    documents = documents_of(segment, chunk)
    if states is None:
        states = _outputs(form, (q, k, v, g), documents, state, bonus, chunk, True, interpret)[2]
    g = _rows(g)
    blocks = Blocks(q, v, g, chunk, backward=True)
    size = (blocks.key_size, blocks.value_size)
    inputs = [blocks.shared, blocks.shared, blocks.values, blocks.gates, blocks.documents]
    inputs += [blocks.states, blocks.values, blocks.state, *(blocks.bonus for _ in bonus)]
    keys = (blocks.keys, blocks.shape(q.shape[2], blocks.key_size))
    outputs = [keys, keys, (blocks.values, jax.ShapeDtypeStruct(v.shape, v.dtype))]
    outputs += [(blocks.gates, blocks.shape(*g.shape[2:])), (blocks.state, blocks.shape(*size))]
    outputs += [(blocks.of_bonus, blocks.shape(1, blocks.key_size)) for _ in bonus]
    launch = blocks.call(form.backward, f"{form.name}_backward", inputs, outputs, interpret)
    wide = (x.astype(jnp.float32) for x in (d_last, *(u[:, None] for u in bonus)))
    dq, dk, dv, dg, d_state, *d_bonus = launch(q, k, v, g, documents, states, d_out, *wide)
    over_heads = lambda x: jnp.sum(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), axis=2)[:, :, :length]
    dg = dg[:, :, 0] if log_decay.ndim == 3 else dg
    return (
        over_heads(dq).astype(query.dtype),
        over_heads(dk).astype(key.dtype),
        dv[:, :, :length],
        dg[:, :, :length].astype(log_decay.dtype),
        d_state.astype(state.dtype),
        None,
        *(jnp.sum(x[:, :, 0], axis=0).astype(u.dtype) for x, u in zip(d_bonus, bonus, strict=True)),
    )


run.defvjp(_forward, _backward)


class Blocks:
    """Block shapes and index maps over the grid (row, head, chunk); `backward`: from the last chunk to the first."""

    def __init__(self, query: Any, value: Any, decays: Any, chunk: int, *, backward: bool = False):
        self.batch, groups, length, self.key_size = query.shape
        self.heads, self.value_size = value.shape[1], value.shape[3]
        self.chunk, self.chunks = chunk, length // chunk
        share = self.heads // groups
        last = self.chunks - 1
        at = (lambda n: last - n) if backward else (lambda n: n)
        block = lambda shape, index: pl.BlockSpec(shape, index)
        self.shared = block((None, None, chunk, self.key_size), lambda b, h, n: (b, h // share, at(n), 0))
        self.keys = block((None, None, chunk, self.key_size), lambda b, h, n: (b, h, at(n), 0))
        self.values = block((None, None, chunk, self.value_size), lambda b, h, n: (b, h, at(n), 0))
        per_head = decays.shape[2] == 1  # a row along the steps; else [T, K] as the keys
        self.gates = block((None, None, 1, chunk), lambda b, h, n: (b, h, 0, at(n))) if per_head else self.keys
        self.bonus = block((None, 1, self.key_size), lambda b, h, n: (h, 0, 0))
        self.of_bonus = block((None, None, 1, self.key_size), lambda b, h, n: (b, h, 0, 0))
        self.documents = block((None, 1, chunk), lambda b, h, n: (b, 0, at(n)))
        self.state = block((None, None, self.key_size, self.value_size), lambda b, h, n: (b, h, 0, 0))
        self.states = block((None, None, None, self.key_size, self.value_size), lambda b, h, n: (b, h, at(n), 0, 0))

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.chunks

    @property
    def scratch(self) -> list[Any]:
        return [pltpu.VMEM((self.key_size, self.value_size), jnp.float32)]

    def shape(self, *sizes: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((self.batch, self.heads, *sizes), dtype)

    def call(self, kernel: Any, name: str, inputs: list[Any], outputs: list[Any], interpret: Any) -> Any:
        return pallas_call(
            kernel,
            grid=self.grid,
            in_specs=inputs,
            out_specs=[spec for spec, _ in outputs],
            out_shape=[shape for _, shape in outputs],
            scratch_shapes=self.scratch,
            compiler_params=PARAMS,
            interpret=interpret,
            name=name,
        )


def chunk_decays(g: Any, documents: Any) -> tuple[Any, Any, Any, Any]:
    """`(M [L, L], a [L, 1], w [L, 1], b [1, 1])` of a chunk's gates [1, L] and documents [1, L]."""
    length = g.shape[1]
    row, column = places(length)
    between = sums_between(g)
    of_row = turned(documents)
    one = (row >= column) & (of_row == documents.astype(jnp.float32))
    decay = jnp.exp(jnp.where(one, between, -jnp.inf))
    reach = jnp.exp(between[:, :1] + g[:, :1])
    carried = jnp.where(of_row[:, :1] == 0, reach, 0)
    return decay, carried, decay.T[:, length - 1 :], carried[length - 1 :]


def _forward_kernel(*refs: Any) -> None:
    query, key, value, g, documents, first, out, last, *rest = refs
    *states, held = rest

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        held[...] = first[...]

    q, k, v, state = query[...], key[...], value[...], held[...]
    for kept_before in states:
        kept_before[...] = state
    decay, carried, weight, kept = chunk_decays(g[...], documents[...])
    reads, _, through = belongs(documents[...])
    scores = dot(q, k, (1, 1)) * decay
    read = jnp.where(reads, carried * dot(q, state.astype(q.dtype), (1, 0)), 0)
    out[...] = (dot(scores.astype(v.dtype), v, (1, 0)) + read).astype(out.dtype)
    state = jnp.where(through, kept * state, 0) + dot((weight * k).astype(k.dtype), v, (0, 0))
    held[...] = state
    last[...] = state


def _backward_kernel(*refs: Any) -> None:
    query, key, value, g, documents, before, d_out, d_last, dq, dk, dv, dg, d_first, held = refs

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        held[...] = d_last[...]

    q, k, v, state, do, after = query[...], key[...], value[...], before[...], d_out[...], held[...]
    decay, carried, weight, kept = chunk_decays(g[...], documents[...])
    reads, writes, through = belongs(documents[...])
    kind = q.dtype
    scores = (dot(q, k, (1, 1)) * decay).astype(kind)
    d_scores = (dot(do, v, (1, 1)) * decay).astype(kind)
    narrow = after.astype(kind)
    own_q = dot(d_scores, k, (1, 0)) + jnp.where(reads, carried * dot(do, state.astype(kind), (1, 1)), 0)
    to_state = jnp.where(writes, weight * dot(v, narrow, (1, 1)), 0)
    own_k = dot(d_scores, q, (0, 0)) + to_state
    dq[...] = own_q
    dk[...] = own_k
    dv[...] = (dot(scores, do, (0, 0)) + jnp.where(writes, weight * dot(k, narrow, (1, 0)), 0)).astype(dv.dtype)
    each = jnp.sum(q.astype(jnp.float32) * own_q - k.astype(jnp.float32) * own_k, axis=1, keepdims=True)
    row, column = places(each.shape[0])
    total = jnp.sum(k.astype(jnp.float32) * to_state, keepdims=True)
    total = total + jnp.where(through, kept * jnp.sum(state * after, keepdims=True), 0)
    dg[...] = jnp.sum(jnp.where(row >= column, each, 0), axis=0, keepdims=True) + total
    first = dot((carried * q).astype(kind), do, (0, 0)) + jnp.where(through, kept * after, 0)
    held[...] = first
    d_first[...] = first


FORM = Form("chunk_outer", _forward_kernel, _backward_kernel)
