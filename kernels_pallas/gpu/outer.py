"""`chunk_outer` for GPUs: S_t = exp(g_t) S_{t-1} + k_t v_t^T, read as o_t = q_t^T S_t, with a decay per head.

The equations of a chunk stand in `kernels_pallas/outer.py`. All four outputs are one walk over the chunks of a head,

    O = (X Y^T * M) Z + a * (X S)        S' = b S + Y^T (w * Z)

with M_ij = exp(G_ij) for j <= i, a_i and w_j the decays from the state to i and from j to the next one, b over it all:

    out       X, Y, Z = q, k, v     forward                  dv        k, q, dO    backward, M turned, a and w exchanged
    dq        dO, v, k              forward, state S^T       dk        v, dO, q    backward in this way, state dS^T

dg_m = sum over i >= m of (q_i . dq_i - k_i . dk_i), and <S', dS'> for every m of the chunk. The walks of dq and dk sum
q . dq and k . dk as they go; that of dq keeps its states S' (bfloat16), that of dk multiplies them by its own.

A document starts with a decay of exp(-128) = 0, so gates are all there is to mask; their sums are as `sums_of` says.

Why it should be fast (on paper: no GPU has run it yet). A program keeps 64 columns of the state of a head in registers
and walks over chunks of 64 steps: each array is read once per block of columns, mostly from the L2 cache after the first,
and no state goes to memory in the forward pass, where a pass for the states and one for the outputs, as published kernels
have them, write and read K x V numbers a chunk (half of the traffic at K = V = 128). Copies of a chunk run while the one
before it is used, and the products with X while its gates become M. The price is that B x H x V/64 programs walk one
after another through the time: 32 heads of 128 keep 64 of an H100's 132 processors busy, and fewer heads fewer.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.chunks import whole_chunks
from kernels_pallas.gpu import common
from kernels_pallas.gpu.common import (
    ALONG,
    BLOCK,
    CHUNK,
    DOWN,
    STAGES,
    accumulator,
    by_columns,
    by_rows,
    launch,
    numbers,
    places,
    read,
    read_far,
    tile,
    turned,
)
from kernels_pallas.outer import check

PIECE = 128  # rows of the state that are updated at a time: what two products and the state leave of the registers
HIGH, LOW, CARRIED, WEIGHT = range(4)  # rows of the gates of a chunk


class Walk(NamedTuple):
    """One of the four walks: its name, its way, and what it does beside its product."""

    name: str
    backward: bool = False
    last: bool = False  # the state after all chunks is an output
    beside: bool = False  # the sums of its outputs times another array, for dg
    keep: bool = False  # states after the chunks are an output
    cross: bool = False  # the sums of its states times kept ones


OUT = Walk("out", last=True)
D_QUERY = Walk("d_query", beside=True, keep=True)
D_KEY = Walk("d_key", backward=True, beside=True, cross=True)
D_VALUE = Walk("d_value", backward=True, last=True)


def chunk_outer(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    segment: jax.Array,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.outer.chunk_outer` for bfloat16 and heads of 64, 128 or 256: same arrays, same results.

    Chunks are of 64 steps, and there are no states to save: a walk makes its own. The kernel reads [B, T, H, K]: the
    transposes here and those of a caller who has that order cancel under `jit`. `interpret`: as `common.launch` takes it.
    Raises ValueError on shapes that do not fit, and on types and sizes that the kernel does not take.
    """
    check("chunk_outer", query, key, value, log_decay, state, segment, value.shape[:3])
    kinds = {"query": query.dtype, "key": key.dtype, "value": value.dtype}
    if told := common.refusal(kinds, {"the size of keys": query.shape[3], "that of values": value.shape[3]}):
        raise ValueError(f"chunk_outer: {told}")
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    out, state = run(interpret, swap(query), swap(key), swap(value), log_decay, state, segment)
    return swap(out), state


def gates_of(log_decay: jax.Array, segment: jax.Array) -> jax.Array:
    """[B, H, N, 4, CHUNK]: the sums of a chunk's gates, high and low, and the decays a and w, by step."""
    high, low = common.sums_of(log_decay, common.starts_of(segment)[:, None])
    weight = jnp.exp((high[..., -1:] - high) + (low[..., -1:] - low))
    return jnp.stack([high, low, jnp.exp(high + low), weight], axis=-2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(interpret: Any, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The arrays of `chunk_outer`, checked, with steps before heads."""
    return _forward(interpret, *arrays)[0]


def _whole(log_decay: jax.Array, segment: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Gates and arrays up to whole chunks; steps that are added belong to the last document, and change nothing."""
    more = -segment.shape[1] % CHUNK
    segment = jnp.pad(segment, ((0, 0), (0, more)), mode="edge")
    (log_decay,) = whole_chunks(CHUNK, log_decay, axis=2)
    return gates_of(log_decay, segment), whole_chunks(CHUNK, *arrays, axis=1)


def _forward(interpret: Any, *arrays: Any) -> Any:
    query, key, value, log_decay, state, segment = arrays
    gates, (q, k, v) = _whole(log_decay, segment, query, key, value)
    found = walk(OUT, interpret, q, k, v, gates, state)
    return (found["out"][:, : value.shape[1]], found["last"]), arrays


def _backward(interpret: Any, residuals: Any, gradients: Any) -> Any:
    query, key, value, log_decay, state, segment = residuals
    length, groups = query.shape[1:3]
    gates, (q, k, v, do) = _whole(log_decay, segment, query, key, value, gradients[0])
    d_last = gradients[1].astype(jnp.float32)
    swap = lambda x: jnp.swapaxes(x, 2, 3)
    of_query = walk(D_QUERY, interpret, do, v, k, gates, swap(state), beside=q)
    of_key = walk(D_KEY, interpret, v, do, q, gates, swap(d_last), beside=k, states=of_query["states"])
    of_value = walk(D_VALUE, interpret, k, q, do, gates, d_last)
    each = jnp.sum(of_query["sums"] - of_key["sums"], axis=2)
    rest = jnp.sum(of_key["crossed"], axis=(2, 4))
    dg = lax.cumsum(each, axis=3, reverse=True) + rest[..., None]
    dg = dg.reshape(*dg.shape[:2], -1)[:, :, :length]

    def over_heads(x: jax.Array) -> jax.Array:
        x = x[:, :length]
        parts = x.reshape(*x.shape[:2], groups, -1, x.shape[3])
        return jnp.sum(parts, axis=3, dtype=jnp.float32).astype(x.dtype)

    return (
        over_heads(of_query["out"]),
        over_heads(of_key["out"]),
        of_value["out"][:, :length],
        jnp.where(common.starts_of(segment)[:, None], 0, dg).astype(log_decay.dtype),
        of_value["last"].astype(state.dtype),
        None,
    )


run.defvjp(_forward, _backward)


def walk(
    kind: Walk, interpret: Any, x: Any, y: Any, z: Any, gates: Any, first: Any, *, beside: Any = None, states: Any = None
) -> dict[str, jax.Array]:
    """The outputs of a walk by name: `out` [B, T, H, V], and what else it makes."""
    batch, heads, chunks = gates.shape[:3]
    size, width = x.shape[3], z.shape[3]
    of = jax.ShapeDtypeStruct
    outputs = {"out": of((*x.shape[:2], heads, width), jnp.bfloat16)}
    if kind.last:
        outputs["last"] = of((batch, heads, size, width), jnp.float32)
    if kind.beside:
        outputs["sums"] = of((batch, heads, width // BLOCK, chunks, CHUNK), jnp.float32)
    if kind.keep:
        outputs["states"] = of((batch, heads, chunks, size, width), jnp.bfloat16)
    if kind.cross:
        outputs["crossed"] = of((batch, heads, width // BLOCK, chunks, size), jnp.float32)
    inputs = {"x": x, "y": y, "z": z, "gates": gates, "first": first.astype(jnp.float32)}
    inputs |= {"beside": beside} if kind.beside else {}
    inputs |= {"kept": states} if kind.cross else {}
    scratch = scratch_of(kind, size)
    names = [*inputs, *outputs, *scratch]

    def body(*refs: Any) -> None:
        _walk_kernel(kind, heads, SimpleNamespace(**dict(zip(names, refs, strict=True))))

    grid = {"head": heads, "block": width // BLOCK, "row": batch}
    launched = launch(body, f"chunk_outer_{kind.name}", grid, outputs.values(), scratch.values(), interpret)
    return dict(zip(outputs, launched(*inputs.values()), strict=True))


def scratch_of(kind: Walk, size: int) -> dict[str, Any]:
    """What a program of a walk keeps in shared memory, for states of `size` rows."""
    scratch = {
        "xs": tile(STAGES, CHUNK, size),
        "ys": tile(STAGES, CHUNK, size),
        "zs": tile(STAGES, CHUNK, BLOCK),
        "gs": numbers(STAGES, 4, CHUNK),
        "held": tile(size, BLOCK),  # the state, then the scores
        "work": tile(CHUNK, BLOCK),  # weighted Z, then the output
        "arrived": plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
    }
    if kind.beside:
        scratch |= {"others": tile(CHUNK, BLOCK), "sums_out": numbers(CHUNK), "others_arrived": plgpu.Barrier()}
    if kind.cross:
        piece = tile(min(size, PIECE), BLOCK)
        scratch |= {"piece": piece, "crossed_out": numbers(size), "piece_arrived": plgpu.Barrier()}
    return scratch


def _walk_kernel(kind: Walk, heads: int, a: SimpleNamespace) -> None:
    row, head, block = (lax.axis_index(name) for name in ("row", "head", "block"))
    size, chunks = a.held.shape[0], a.gates.shape[2]
    columns = pl.ds(block * BLOCK, BLOCK)
    rows = min(size, PIECE)
    pieces = [pl.ds(i * rows, rows) for i in range(size // rows)]
    scale, weight = (WEIGHT, CARRIED) if kind.backward else (CARRIED, WEIGHT)
    at = lambda n: chunks - 1 - n if kind.backward else n
    steps = lambda n: pl.ds(at(n) * CHUNK, CHUNK)
    shared = lambda ref: lax.div(head, heads // ref.shape[2])

    def bring(n: Any, slot: Any) -> None:
        arrived = a.arrived.at[slot]
        plgpu.copy_gmem_to_smem(a.x.at[row, steps(n), shared(a.x)], a.xs.at[slot], arrived)
        plgpu.copy_gmem_to_smem(a.y.at[row, steps(n), shared(a.y)], a.ys.at[slot], arrived)
        plgpu.copy_gmem_to_smem(a.z.at[row, steps(n), shared(a.z), columns], a.zs.at[slot], arrived)
        plgpu.copy_gmem_to_smem(a.gates.at[row, head, at(n)], a.gs.at[slot], arrived)

    def bring_others(n: Any) -> None:
        others = a.beside.at[row, steps(n), shared(a.beside), columns]
        plgpu.copy_gmem_to_smem(others, a.others, a.others_arrived)

    def bring_piece(n: Any, i: int) -> None:
        plgpu.copy_gmem_to_smem(a.kept.at[row, head, at(n), pieces[i], columns], a.piece, a.piece_arrived)

    def cross(i: int, part: Any) -> None:
        plgpu.barrier_wait(a.piece_arrived)
        a.crossed_out[pieces[i]] = jnp.sum(part * read(a.piece), axis=1)

    def step(n: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
        slot = lax.rem(n, STAGES)
        x, y, z, g = a.xs.at[slot], a.ys.at[slot], a.zs.at[slot], a.gs.at[slot]
        plgpu.barrier_wait(a.arrived.at[slot])

        def of_x(scores: Any, carried: Any) -> tuple[Any, Any]:
            plgpu.wgmma(scores, x, turned(y))
            plgpu.wgmma(carried, x, a.held)
            decay = _decays(g, kind.backward)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the chunk before
            a.work[...] = (by_rows(read(g.at[weight], DOWN), BLOCK) * read(z)).astype(jnp.bfloat16)
            if kind.cross:
                cross(0, state[0])
            return scores[...] * decay, carried[...]

        scores, carried = pl.run_scoped(of_x, accumulator(CHUNK, CHUNK), accumulator(CHUNK, BLOCK))
        a.held[:CHUNK] = scores.astype(jnp.bfloat16)
        plgpu.commit_smem()
        if kind.cross and len(pieces) > 1:
            bring_piece(n, 1)
        kept = a.gs[slot, CARRIED, CHUNK - 1]

        def of_scores(own: Any) -> Any:
            plgpu.wgmma(own, a.held.at[:CHUNK], z)
            return own[...]

        def of_y(i: int, added: Any) -> Any:
            plgpu.wgmma(added, turned(y.at[:, pieces[i]]), a.work)
            return kept * state[i] + added[...]

        carried = by_rows(read(g.at[scale], DOWN), BLOCK) * carried
        result = carried + pl.run_scoped(of_scores, accumulator(CHUNK, BLOCK))
        after = []
        for i in range(len(pieces)):
            if kind.cross and i:
                cross(i, state[i])
            after.append(pl.run_scoped(functools.partial(of_y, i), accumulator(rows, BLOCK)))
        if kind.beside:
            plgpu.barrier_wait(a.others_arrived)
            a.sums_out[...] = jnp.sum(result * read(a.others), axis=1)
        a.work[...] = result.astype(jnp.bfloat16)
        for piece, part in zip(pieces, after, strict=True):
            a.held[piece] = part.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(a.work, a.out.at[row, steps(n), head, columns])
        if kind.keep:
            plgpu.copy_smem_to_gmem(a.held, a.states.at[row, head, at(n), :, columns])
        if kind.beside:
            plgpu.copy_smem_to_gmem(a.sums_out, a.sums.at[row, head, block, at(n)])
        if kind.cross:
            plgpu.copy_smem_to_gmem(a.crossed_out, a.crossed.at[row, head, block, at(n)])
        pl.when(n + STAGES < chunks)(lambda: bring(n + STAGES, slot))
        pl.when(n + 1 < chunks)(lambda: bring_single(n + 1))
        return tuple(after)

    def bring_single(n: Any) -> None:
        if kind.beside:
            bring_others(n)
        if kind.cross:
            bring_piece(n, 0)

    for n in range(min(STAGES, chunks)):
        bring(n, n)
    bring_single(0)
    state = tuple(read_far(a.first.at[row, head, piece, columns]) for piece in pieces)
    for piece, part in zip(pieces, state, strict=True):
        a.held[piece] = part.astype(jnp.bfloat16)
    plgpu.commit_smem()
    state = lax.fori_loop(0, chunks, step, state)
    if kind.last:
        for piece, part in zip(pieces, state, strict=True):
            a.last[row, head, piece, columns] = part
    plgpu.wait_smem_to_gmem(0)


def _decays(g: Any, backward: bool) -> Any:
    """M of a chunk, or M turned, from its gates."""
    down, along = ([read(g.at[i], layout) for i in (HIGH, LOW)] for layout in (DOWN, ALONG))
    high, low = (by_rows(c, CHUNK) - by_columns(r, CHUNK) for c, r in zip(down, along, strict=True))
    row, column = places()
    between = -(high + low) if backward else high + low
    return jnp.exp(jnp.where(row <= column if backward else row >= column, between, -jnp.inf))
