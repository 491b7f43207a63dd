"""One walk over the chunks of heads: O = P Z + X S, S' = Diag(b) S + Y^T Z, all factors given.

A program (head, block of 64 columns of Z and S, row) keeps its columns of S in registers, in float32, and goes from the
first chunk to the last, or back. What a chunk reads is asked for two chunks ahead.
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

from kernels_pallas.gpu.common import (
    BLOCK,
    CHUNK,
    DOWN,
    STAGES,
    accumulator,
    by_rows,
    launch,
    numbers,
    read,
    read_far,
    tile,
    turned,
)

NARROW = 128  # rows of a state that are updated at once


class Carry(NamedTuple):
    """A kind of walk: its name, its way, and what it puts out."""

    name: str
    backward: bool = False  # P is turned then too
    out: bool = False
    last: bool = False  # the state after all chunks
    keep: bool = False  # states before each chunk, in the order of the walk


def carry(
    kind: Carry, interpret: Any, z: Any, y: Any, kept: Any, first: Any, *, x: Any = None, scores: Any = None
) -> dict[str, jax.Array]:
    """The outputs of a walk, by name: `out` [B, T, H, V], `last` [B, H, K, V], `states` [B, H, N, K, V] in bfloat16.

    x and y are [B, T, H, K], z [B, T, H, V], scores [B, H, N, CHUNK, CHUNK], all bfloat16; kept [B, H, N, K] and first
    [B, H, K, V] float32; T = N * CHUNK. x and scores are for `out`.
    """
    batch, length, heads, width = z.shape
    chunks, size = kept.shape[2:]
    shapes = {
        "out": (kind.out, (batch, length, heads, width), jnp.bfloat16),
        "last": (kind.last, (batch, heads, size, width), jnp.float32),
        "states": (kind.keep, (batch, heads, chunks, size, width), jnp.bfloat16),
    }
    outputs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (made, shape, dtype) in shapes.items() if made}
    inputs = {"z": z, "y": y, "kept": kept, "first": first, **({"x": x, "scores": scores} if kind.out else {})}
    scratch = scratch_of(kind, size)
    names = [*inputs, *outputs, *scratch]

    def kernel(*refs: Any) -> None:
        Program(kind, SimpleNamespace(**dict(zip(names, refs, strict=True)))).run()

    grid = {"head": heads, "block": width // BLOCK, "row": batch}
    name = f"chunk_outer_keys_{kind.name}"
    call = launch(kernel, name, grid, list(outputs.values()), list(scratch.values()), interpret)
    return dict(zip(outputs, call(*inputs.values()), strict=True))


def scratch_of(kind: Carry, size: int) -> dict[str, Any]:
    """What a program keeps in shared memory, for states of `size` rows."""
    scratch = {
        "zs": tile(STAGES, CHUNK, BLOCK),
        "ys": tile(STAGES, CHUNK, size),
        "kepts": numbers(STAGES, size),
        "held": tile(size, BLOCK),  # the state
        "arrived": plgpu.Barrier(num_arrivals=5 if kind.out else 3, num_barriers=STAGES),
    }
    if kind.out:
        scratch |= {"xs": tile(STAGES, CHUNK, size), "ps": tile(STAGES, CHUNK, CHUNK), "work": tile(CHUNK, BLOCK)}
    return scratch


class Program:
    """What one program does; `refs` by name: inputs, outputs and scratch of `carry`."""

    def __init__(self, kind: Carry, refs: SimpleNamespace):
        self.kind, self.refs = kind, refs
        self.row, self.head, block = (lax.axis_index(name) for name in ("row", "head", "block"))
        self.chunks, size = refs.kept.shape[2:]
        self.columns = pl.ds(block * BLOCK, BLOCK)
        self.rows = size if size <= NARROW else BLOCK
        self.parts = [pl.ds(i, self.rows) for i in range(0, size, self.rows)]

    def run(self) -> None:
        refs = self.refs
        for n in range(min(STAGES, self.chunks)):
            self.bring(n, n)
        state = tuple(read_far(refs.first.at[self.row, self.head, part, self.columns]) for part in self.parts)
        self.hold(state)
        state = lax.fori_loop(0, self.chunks, self.step, state)
        if self.kind.last:
            for part, values in zip(self.parts, state, strict=True):
                refs.last[self.row, self.head, part, self.columns] = values
        plgpu.wait_smem_to_gmem(0)

    def at(self, n: Any) -> Any:
        """The chunk that comes n-th."""
        return self.chunks - 1 - n if self.kind.backward else n

    def steps(self, n: Any, array: Any) -> Any:
        """The n-th chunk of an array [B, T, H, ..], of this head."""
        return array.at[self.row, pl.ds(self.at(n) * CHUNK, CHUNK), self.head]

    def bring(self, n: Any, slot: Any) -> None:
        refs, arrived, here = self.refs, self.refs.arrived.at[slot], (self.row, self.head, self.at(n))
        plgpu.copy_gmem_to_smem(self.steps(n, refs.z).at[:, self.columns], refs.zs.at[slot], arrived)
        plgpu.copy_gmem_to_smem(self.steps(n, refs.y), refs.ys.at[slot], arrived)
        plgpu.copy_gmem_to_smem(refs.kept.at[here], refs.kepts.at[slot], arrived)
        if self.kind.out:
            plgpu.copy_gmem_to_smem(self.steps(n, refs.x), refs.xs.at[slot], arrived)
            plgpu.copy_gmem_to_smem(refs.scores.at[here], refs.ps.at[slot], arrived)

    def hold(self, state: Any) -> None:
        """Writes the state where products and copies read it."""
        for part, values in zip(self.parts, state, strict=True):
            self.refs.held[part] = values.astype(jnp.bfloat16)
        plgpu.commit_smem()

    def step(self, n: Any, state: Any) -> Any:
        """The n-th chunk: from the state before it to the one after it."""
        refs, kind = self.refs, self.kind
        slot = lax.rem(n, STAGES)
        z, y = refs.zs.at[slot], refs.ys.at[slot]
        if kind.keep:
            plgpu.copy_smem_to_gmem(refs.held, refs.states.at[self.row, self.head, self.at(n), :, self.columns])
        plgpu.barrier_wait(refs.arrived.at[slot])

        def product(sums: Any) -> Any:
            p = refs.ps.at[slot]
            plgpu.wgmma(sums, turned(p) if kind.backward else p, z)
            plgpu.wgmma(sums, refs.xs.at[slot], refs.held)
            return sums[...]

        def updated(i: int, added: Any) -> Any:
            plgpu.wgmma(added, turned(y.at[:, self.parts[i]]), z)
            kept = by_rows(read(refs.kepts.at[slot, self.parts[i]], DOWN), BLOCK)
            return kept * state[i] + added[...]

        out: Any = pl.run_scoped(product, accumulator(CHUNK, BLOCK)) if kind.out else None
        update = lambda i: pl.run_scoped(functools.partial(updated, i), accumulator(self.rows, BLOCK))
        state = tuple(update(i) for i in range(len(self.parts)))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what this chunk and the one before put out
        if kind.out:
            refs.work[...] = out.astype(jnp.bfloat16)
        self.hold(state)
        if kind.out:
            plgpu.copy_smem_to_gmem(refs.work, self.steps(n, refs.out).at[:, self.columns])
        pl.when(n + STAGES < self.chunks)(lambda: self.bring(n + STAGES, slot))
        return state
