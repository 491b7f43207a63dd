"""The gradients of queries, keys and gates that `chunk_delta` has, of all chunks at once, once the walks have kept the
states S before each chunk, the gradients dS' of those after it, the errors E and the gradients dV of values:

    dP = dO U^T * M,  dC = -dV U^T * M'          U = beta * E
    dQ = dP K + a * (dO S^T)
    dR = dC K - a * (dV S^T)                     dW = dP^T Q + dC^T K + w * (U dS'^T),  dK = dR + dW

A program (head, chunk, block of 64 columns of Q and K, row) makes dP and dC anew for its block.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu.common import (
    ALONG,
    BLOCK,
    CHUNK,
    DOWN,
    accumulator,
    by_columns,
    by_rows,
    launch,
    numbers,
    places,
    read,
    scaled,
    tile,
    turned,
)
from kernels_pallas.gpu.delta_solve import BETA, before
from kernels_pallas.gpu.walk import CARRIED, WEIGHT, chunk_decays


def scratch_of(width: int) -> dict[str, Any]:
    """What a program keeps in shared memory, for values of `width`."""
    return {
        "do": tile(CHUNK, width),
        "dv": tile(CHUNK, width),
        "es": tile(CHUNK, width),
        "state": tile(BLOCK, width),
        "after": tile(BLOCK, width),
        "q": tile(CHUNK, BLOCK),  # then dQ
        "k": tile(CHUNK, BLOCK),  # then dK
        "gs": numbers(BETA + 1, CHUNK),
        "dp": tile(CHUNK, CHUNK),
        "dc": tile(CHUNK, CHUNK),
        "sums": numbers(2, CHUNK),
        "arrived": plgpu.Barrier(num_arrivals=8),
    }


def gradients(interpret: Any, **inputs: Any) -> dict[str, jax.Array]:
    """dQ and dK, `query` and `key` [B, T, H, K], and `sums` [B, H, K/64, N, 2, 64] of `gates_gradient`.

    query and key are [B, T, G, K], d_out, d_value and errors [B, T, H, V], gates as from `strengths_and_gates`, states
    and d_states [B, H, N, K, V].
    """
    query, gates, d_out = inputs["query"], inputs["gates"], inputs["d_out"]
    batch, heads, chunks = gates.shape[:3]
    length, size, width = query.shape[1], query.shape[3], d_out.shape[3]
    blocks = size // BLOCK
    wide = jax.ShapeDtypeStruct((batch, length, heads, size), jnp.bfloat16)
    sums = jax.ShapeDtypeStruct((batch, heads, blocks, chunks, 2, CHUNK), jnp.float32)
    outputs = {"d_query": wide, "d_key": wide, "d_sums": sums}
    scratch = scratch_of(width)
    names = [*inputs, *outputs, *scratch]

    def kernel(*refs: Any) -> None:
        _program(heads, blocks, SimpleNamespace(**dict(zip(names, refs, strict=True))))

    grid = {"head": heads, "part": chunks * blocks, "row": batch}
    call = launch(kernel, "chunk_delta_gradients", grid, list(outputs.values()), list(scratch.values()), interpret)
    return dict(zip(outputs, call(*inputs.values()), strict=True))


def gates_gradient(sums: jax.Array) -> jax.Array:
    """[B, H, N, 64]: dg_m is the sum over i >= m of (q_i . dq_i + k_i . dr_i - k_i . dw_i), and <S', dS'>."""
    sums = jnp.sum(sums, axis=2)
    return lax.cumsum(sums[..., 0, :], axis=3, reverse=True) + jnp.sum(sums[..., 1, :], axis=-1, keepdims=True)


def _program(heads: int, blocks: int, refs: SimpleNamespace) -> None:
    row, head, part = (lax.axis_index(name) for name in ("row", "head", "part"))
    n, block = lax.div(part, blocks), lax.rem(part, blocks)
    columns = pl.ds(block * BLOCK, BLOCK)
    steps = lambda array: array.at[row, pl.ds(n * CHUNK, CHUNK), lax.div(head, heads // array.shape[2])]
    g = refs.gs
    for source, place in (
        (steps(refs.d_out), refs.do),
        (steps(refs.errors), refs.es),
        (steps(refs.d_value), refs.dv),
        (refs.gates.at[row, head, n], g),
        (steps(refs.key).at[:, columns], refs.k),
        (refs.states.at[row, head, n, columns], refs.state),
        (steps(refs.query).at[:, columns], refs.q),
        (refs.d_states.at[row, head, n, columns], refs.after),
    ):
        plgpu.copy_gmem_to_smem(source, place, refs.arrived)
    plgpu.barrier_wait(refs.arrived)
    wide = lambda i: by_rows(read(g.at[i], DOWN), BLOCK)

    def scores(own_p: Any, own_c: Any) -> Any:
        plgpu.wgmma(own_p, refs.do, turned(refs.es))
        plgpu.wgmma(own_c, refs.dv, turned(refs.es))
        decay = chunk_decays(g, False) * by_columns(read(g.at[BETA], ALONG), CHUNK)
        return own_p[...] * decay, -own_c[...] * before(*places(), decay)

    def reads(scored: Any, values: Any, own: Any, carried: Any) -> Any:
        plgpu.wgmma(own, scored, refs.k)
        plgpu.wgmma(carried, values, turned(refs.state))
        return own[...], scaled(wide(CARRIED), carried[...])

    def writes(own: Any, carried: Any) -> Any:
        plgpu.wgmma(own, turned(refs.dp), refs.q)
        plgpu.wgmma(own, turned(refs.dc), refs.k)
        plgpu.wgmma(carried, refs.es, turned(refs.after))
        return own[...], scaled(wide(WEIGHT) * wide(BETA), carried[...])

    two = [accumulator(CHUNK, CHUNK)] * 2
    for place, values in zip((refs.dp, refs.dc), pl.run_scoped(scores, *two), strict=True):
        place[...] = values.astype(jnp.bfloat16)
    plgpu.commit_smem()
    own, carried = pl.run_scoped(lambda *sums: reads(refs.dp, refs.do, *sums), *two)
    dq = own + carried
    own, carried = pl.run_scoped(lambda *sums: reads(refs.dc, refs.dv, *sums), *two)
    dr = own - carried
    own, to_state = pl.run_scoped(writes, *two)
    dw = own + to_state
    k = read(refs.k)
    refs.sums[0] = jnp.sum(read(refs.q) * dq + k * (dr - dw), axis=1)
    flowing = sum(_dots(refs, i) for i in range(0, refs.state.shape[1], BLOCK))
    refs.sums[1] = jnp.sum(k * to_state, axis=1) + scaled(g[CARRIED, CHUNK - 1], flowing)
    refs.q[...] = dq.astype(jnp.bfloat16)
    refs.k[...] = (dr + dw).astype(jnp.bfloat16)
    plgpu.commit_smem()
    here = (row, pl.ds(n * CHUNK, CHUNK), head, columns)
    plgpu.copy_smem_to_gmem(refs.q, refs.d_query.at[here])
    plgpu.copy_smem_to_gmem(refs.k, refs.d_key.at[here])
    plgpu.copy_smem_to_gmem(refs.sums, refs.d_sums.at[row, head, block, n])
    plgpu.wait_smem_to_gmem(0)


def _dots(refs: SimpleNamespace, start: int) -> Any:
    """<S, dS'> by rows, of a block of columns."""
    columns = pl.ds(start, BLOCK)
    return jnp.sum(read(refs.state.at[:, columns]) * read(refs.after.at[:, columns]), axis=1)
