"""The inverses that `chunk_delta` and `chunk_delta_keys` need, of all chunks at once: X = (I + C * beta)^-1, with beta
along rows or columns.

C, which is K K^T * M' or given, has nothing on or above its diagonal. X comes by doubling from blocks of 1, 2, 4 .. 32
steps, two products a level: with A the part of C * beta that leads from the first to the second block of a pair,
X <- X - X A X. Products take bfloat16: factors are split into what it holds of them and what is left, which keeps 16
bits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu.common import (
    ALONG,
    CHUNK,
    DOWN,
    accumulator,
    by_columns,
    by_rows,
    halves_of,
    launch,
    numbers,
    places,
    read,
    read_far,
    tile,
    turned,
)
from kernels_pallas.gpu.walk import chunk_decays, gates_of

BETA = 4  # the row of strengths, after those of `gates_of`


def strengths_and_gates(log_decay: jax.Array, beta: jax.Array, segment: jax.Array) -> jax.Array:
    """[B, H, N, 5, CHUNK] of whole chunks: `gates_of`, and beta."""
    rows = beta.astype(jnp.float32).reshape(*beta.shape[:2], -1, 1, CHUNK)
    return jnp.concatenate([gates_of(log_decay, segment), rows], axis=-2)


def split(pair: Any, values: Any) -> None:
    """Writes `halves_of` into the two tiles of a reference."""
    pair[0], pair[1] = halves_of(values)


def multiply(total: Any, left: Any, right: Any) -> None:
    """Adds a product of two pairs of tiles, less that of both low ones: 16 bits of it."""
    for i, j in ((0, 0), (0, 1), (1, 0)):
        plgpu.wgmma(total, left(i), right.at[j])


def before(row: Any, column: Any, decay: Any) -> Any:
    """M' of M."""
    return jnp.where(row > column, decay, 0)


def scratch_of(size: int) -> dict[str, Any]:
    """What a program keeps in shared memory, for keys of `size`."""
    return {
        "keys": tile(CHUNK, size),
        "gs": numbers(BETA + 1, CHUNK),
        "found": tile(2, CHUNK, CHUNK),
        "across": tile(2, CHUNK, CHUNK),
        "arrived": plgpu.Barrier(num_arrivals=2),
    }


def inverses(key: Any, gates: Any, by_row: bool, interpret: Any) -> jax.Array:
    """[B, H, N, 2, CHUNK, CHUNK]: X of key [B, T, G, K], high and low; C * beta has beta_i (`by_row`) or beta_j."""
    batch, heads, chunks = gates.shape[:3]
    shared, size = heads // key.shape[2], key.shape[3]

    def kernel(key: Any, gates: Any, out: Any, keys: Any, gs: Any, found: Any, across: Any, arrived: Any) -> None:
        here, head = (lax.axis_index(name) for name in ("row", "head"))
        n = lax.axis_index("chunk")
        steps = key.at[here, pl.ds(n * CHUNK, CHUNK), lax.div(head, shared)]
        plgpu.copy_gmem_to_smem(steps, keys, arrived)
        plgpu.copy_gmem_to_smem(gates.at[here, head, n], gs, arrived)
        plgpu.barrier_wait(arrived)
        row, column = places()

        def lower(scores: Any) -> Any:
            plgpu.wgmma(scores, keys, turned(keys))
            decay = before(row, column, chunk_decays(gs, False))
            return scores[...] * (decay * _wide(gs.at[BETA], by_row))

        _double(found, across, pl.run_scoped(lower, accumulator(CHUNK, CHUNK)))
        plgpu.copy_smem_to_gmem(found, out.at[here, head, n])
        plgpu.wait_smem_to_gmem(0)

    scratch = list(scratch_of(size).values())
    shape = jax.ShapeDtypeStruct((batch, heads, chunks, 2, CHUNK, CHUNK), jnp.bfloat16)
    grid = {"head": heads, "chunk": chunks, "row": batch}
    (out,) = launch(kernel, "chunk_delta_solve", grid, [shape], scratch, interpret)(key, gates)
    return out


def inverses_of(scores: Any, beta: Any, by_row: bool, interpret: Any) -> jax.Array:
    """[B, H, N, 2, CHUNK, CHUNK]: X of float32 scores C [B, H, N, CHUNK, CHUNK] and strengths [B, H, N, CHUNK]."""
    batch, heads, chunks = beta.shape[:3]

    def kernel(scores: Any, beta: Any, out: Any, betas: Any, found: Any, across: Any, arrived: Any) -> None:
        here, head, n = (lax.axis_index(name) for name in ("row", "head", "chunk"))
        plgpu.copy_gmem_to_smem(beta.at[here, head, n], betas, arrived)
        whole = read_far(scores.at[here, head, n])
        plgpu.barrier_wait(arrived)
        _double(found, across, whole * _wide(betas, by_row))
        plgpu.copy_smem_to_gmem(found, out.at[here, head, n])
        plgpu.wait_smem_to_gmem(0)

    shape = jax.ShapeDtypeStruct((*scores.shape[:3], 2, CHUNK, CHUNK), jnp.bfloat16)
    grid = {"head": heads, "chunk": chunks, "row": batch}
    scratch = list(scratch_of_scores().values())
    (out,) = launch(kernel, "chunk_delta_keys_solve", grid, [shape], scratch, interpret)(scores, beta)
    return out


def scratch_of_scores() -> dict[str, Any]:
    """What a program of `inverses_of` keeps in shared memory."""
    pairs = {name: tile(2, CHUNK, CHUNK) for name in ("found", "across")}
    return {"betas": numbers(CHUNK), **pairs, "arrived": plgpu.Barrier()}


def _wide(beta: Any, by_row: bool) -> Any:
    """Strengths of a chunk, along rows or columns."""
    return by_rows(read(beta, DOWN), CHUNK) if by_row else by_columns(read(beta, ALONG), CHUNK)


def _double(found: Any, across: Any, whole: Any) -> None:
    """Writes X of C * beta (`whole`); `across` is a place for A, then for X A."""
    row, column = places()
    inverse = jnp.where(row == column, 1.0, 0.0) - _between(whole, row, column, 0)

    def product(total: Any, left: Any, right: Any) -> Any:
        multiply(total, lambda i: left.at[i], right)
        return total[...]

    def times(left: Any, right: Any) -> Any:
        plgpu.commit_smem()
        return pl.run_scoped(lambda total: product(total, left, right), accumulator(CHUNK, CHUNK))

    split(found, inverse)
    for level in range(1, CHUNK.bit_length() - 1):
        split(across, _between(whole, row, column, level))
        split(across, times(found, across))
        inverse = inverse - times(across, found)
        split(found, inverse)
    plgpu.commit_smem()


def _between(whole: Any, row: Any, column: Any, level: int) -> Any:
    """What leads from the first to the second block of each pair of blocks of 2^level steps."""
    second = jnp.right_shift(row, level)
    return jnp.where((second & 1 == 1) & (jnp.right_shift(column, level) == second - 1), whole, 0)
