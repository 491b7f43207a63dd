"""Pairs of a chunk's steps by levels, for decays per key: which steps a level sums, and sums of decays as products.

`pairs.py` says what levels are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu.common import CHUNK, TILE, accumulator, halves_of, places

LEVELS = (1, 2, 4, 8, 16, 32)  # steps of a block, half of a pair


def steps_of(row: Any, head: Any, chunk: Any, heads: int) -> Callable[[Any], Any]:
    """Of an array [B, T, G, ..] the steps of a chunk, of the group of a head."""
    return lambda x: x.at[row, pl.ds(chunk * CHUNK, CHUNK), lax.div(head, heads // x.shape[2])]


def paired(size: int) -> Any:
    """Where two steps are in the two blocks of a pair."""
    down, along = places()
    return (down ^ along >= size) & (down ^ along < 2 * size)


def late(size: int, columns: int = CHUNK) -> Any:
    """Where the step of a row is in the later block of its pair."""
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, columns), 0, layout=TILE) & size != 0


def span_of(size: int, lag: int) -> Any:
    """The steps (columns) whose decays a step (row) sums at a level: R of a late one, E of an early one."""
    down, along = places()
    return (down ^ along < size) & jnp.where(late(size), down - along >= lag, down - along < 0)


def write_span(refs: Any, reached: Any, values: Any = 1.0) -> None:
    refs.span[...] = jnp.where(reached, values, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()


def sums_over(refs: Any, block: Any) -> Any:
    """The sums of decays over the span that was written last."""

    def product(sums: Any) -> Any:
        plgpu.wgmma(sums, refs.span, refs.high.at[:, block])
        plgpu.wgmma(sums, refs.span, refs.low.at[:, block])
        return sums[...]

    return pl.run_scoped(product, accumulator(CHUNK, block.size))


def write_parts(near: Any, values: Any) -> None:
    """Writes `halves_of` into two references, to be read by products."""
    near[0][...], near[1][...] = halves_of(values)
    plgpu.commit_smem()
