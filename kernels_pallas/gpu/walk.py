"""One walk over the chunks of heads: O = (X Y^T * M) Z + a * (X S), S' = b S + Y^T (w * Z).

A program (head, block of 64 columns of Z and S, row) keeps its columns of S in registers, in float32, and goes from the
first chunk to the last, or back. Of a chunk, in turn:

    scores = X Y^T, X S      run while the gates become M, and weighted Z = w * Z is written
    P = scores * M           written where S was, or beside it when S is wide and X S has to wait for registers
    P Z, Y^T (w * Z)         the output and the next state; both are written, the output goes out

X, Y, Z and gates of the chunk after the next are asked for as soon as their place is free. What is read once a chunk
and late (the array beside, kept states) has one place, and is asked for when the chunk before has read it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

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
    STAGES,
    accumulator,
    by_columns,
    by_rows,
    launch,
    numbers,
    places,
    read,
    read_far,
    scaled,
    starts_of,
    sums_of,
    tile,
    turned,
)

NARROW = 128  # rows of a state that leave a thread registers for two products beside it
HIGH, LOW, CARRIED, WEIGHT = range(4)  # rows of the gates of a chunk


class Walk(NamedTuple):
    """A kind of walk: its name, its way, and what it does beside its product."""

    name: str
    backward: bool = False
    last: bool = False  # the state after all chunks is an output
    beside: bool = False  # sums of the output's rows times those of another array are one
    keep: bool = False  # states after each chunk are one
    cross: bool = False  # sums of the rows of states times those of kept ones are one
    operator: str = "chunk_outer"


class More(NamedTuple):
    """What an operator that is more than an outer product adds to a walk: its program, and arrays by name."""

    program: Callable[[Walk, int, SimpleNamespace], Program]
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    scratch: Mapping[str, Any]


def gates_of(log_decay: jax.Array, segment: jax.Array) -> jax.Array:
    """[B, H, N, 4, CHUNK] of whole chunks: the sums of a chunk's gates, high and low, and decays a and w, by step."""
    high, low = sums_of(log_decay, starts_of(segment)[:, None])
    weight = jnp.exp((high[..., -1:] - high) + (low[..., -1:] - low))
    return jnp.stack([high, low, jnp.exp(high + low), weight], axis=-2)


def walk(
    kind: Walk, interpret: Any, x: Any, y: Any, z: Any, gates: Any, first: Any, more: More | None = None, **late: Any
) -> dict[str, jax.Array]:
    """The outputs of a walk, by name: `out` [B, T, H, V] and those of its kind.

    x and y are [B, T, G, K], z [B, T, G, V] with any G that divides the heads H of gates; first is [B, H, K, V]. What
    comes late is `beside`, as z, or `kept` [B, H, N, K, V], where the kind has them; T = N * CHUNK.
    """
    batch, heads, chunks = gates.shape[:3]
    length, size, width = x.shape[1], x.shape[3], z.shape[3]
    blocks = width // BLOCK
    shapes = {
        "out": (True, (batch, length, heads, width), jnp.bfloat16),
        "last": (kind.last, (batch, heads, size, width), jnp.float32),
        "sums": (kind.beside, (batch, heads, blocks, chunks, CHUNK), jnp.float32),
        "states": (kind.keep, (batch, heads, chunks, size, width), jnp.bfloat16),
        "crossed": (kind.cross, (batch, heads, blocks, chunks, size), jnp.float32),
    }
    outputs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (made, shape, dtype) in shapes.items() if made}
    given = {"x": x, "y": y, "z": z, "gates": gates, "first": first.astype(jnp.float32)}
    inputs = {**given, **late}
    scratch = scratch_of(kind, size)
    program = more.program if more else Program
    if more:
        inputs, outputs, scratch = {**inputs, **more.inputs}, {**outputs, **more.outputs}, {**scratch, **more.scratch}
    names = [*inputs, *outputs, *scratch]

    def kernel(*refs: Any) -> None:
        program(kind, heads, SimpleNamespace(**dict(zip(names, refs, strict=True)))).run()

    grid = {"head": heads, "block": blocks, "row": batch}
    name = f"{kind.operator}_{kind.name}"
    call = launch(kernel, name, grid, list(outputs.values()), list(scratch.values()), interpret)
    return dict(zip(outputs, call(*inputs.values()), strict=True))


def scratch_of(kind: Walk, size: int) -> dict[str, Any]:
    """What a program keeps in shared memory, for states of `size` rows."""
    scratch = {
        "xs": tile(STAGES, CHUNK, size),
        "ys": tile(STAGES, CHUNK, size),
        "zs": tile(STAGES, CHUNK, BLOCK),
        "gs": numbers(STAGES, 4, CHUNK),
        "held": tile(size, BLOCK),  # the state, then the scores if it is narrow
        "work": tile(CHUNK, BLOCK),  # weighted Z, then the output
        "arrived": plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
    }
    if size > NARROW:
        scratch["scores"] = tile(CHUNK, CHUNK)
    if kind.beside:
        scratch |= {"others": tile(CHUNK, BLOCK), "row_sums": numbers(CHUNK), "others_arrived": plgpu.Barrier()}
    if kind.cross:
        piece = tile(min(size, NARROW), BLOCK)
        scratch |= {"piece": piece, "state_sums": numbers(size), "piece_arrived": plgpu.Barrier()}
    return scratch


class Program:
    """What one program does; `refs` by name: inputs, outputs and scratch of `walk`."""

    def __init__(self, kind: Walk, heads: int, refs: SimpleNamespace):
        self.kind, self.heads, self.refs = kind, heads, refs
        self.row, self.head, self.block = (lax.axis_index(name) for name in ("row", "head", "block"))
        self.size, self.chunks = refs.held.shape[0], refs.gates.shape[2]
        self.columns = pl.ds(self.block * BLOCK, BLOCK)
        self.narrow = self.size <= NARROW
        self.rows = self.size if self.narrow else BLOCK
        # The state is updated by parts, kept ones come by pieces.
        self.parts = [pl.ds(i, self.rows) for i in range(0, self.size, self.rows)]
        self.pieces = [pl.ds(i, min(self.size, NARROW)) for i in range(0, self.size, NARROW)]

    def run(self) -> None:
        refs = self.refs
        for n in range(min(STAGES, self.chunks)):
            self.bring(n, n)
        self.bring_late(0)
        state = tuple(read_far(refs.first.at[self.row, self.head, part, self.columns]) for part in self.parts)
        self.hold(state)
        plgpu.commit_smem()
        state = lax.fori_loop(0, self.chunks, self.step, state)
        if self.kind.last:
            for part, values in zip(self.parts, state, strict=True):
                refs.last[self.row, self.head, part, self.columns] = values
        plgpu.wait_smem_to_gmem(0)

    def decays(self, slot: Any) -> Any:
        """What scores become P by: M, where they are multiplied by it alone."""
        return chunk_decays(self.refs.gs.at[slot], self.kind.backward)

    def scored(self, slot: Any, scores: Any, decays: Any) -> Any:
        """P."""
        return scores * decays

    def weighted(self, slot: Any) -> Any:
        """w * Z."""
        weight = self.refs.gs.at[slot, CARRIED if self.kind.backward else WEIGHT]
        return by_rows(read(weight, DOWN), BLOCK) * read(self.refs.zs.at[slot])

    def output(self, slot: Any, carried: Any, own: Any) -> Any:
        """O, from X S and P Z."""
        scale = self.refs.gs.at[slot, WEIGHT if self.kind.backward else CARRIED]
        return scaled(by_rows(read(scale, DOWN), BLOCK), carried) + own

    def at(self, n: Any) -> Any:
        """The chunk that comes n-th."""
        return self.chunks - 1 - n if self.kind.backward else n

    def steps(self, n: Any, array: Any) -> Any:
        """The n-th chunk of an array [B, T, G, ..], of the group of this head."""
        return array.at[self.row, pl.ds(self.at(n) * CHUNK, CHUNK), lax.div(self.head, self.heads // array.shape[2])]

    def bring(self, n: Any, slot: Any) -> None:
        refs, arrived = self.refs, self.refs.arrived.at[slot]
        plgpu.copy_gmem_to_smem(self.steps(n, refs.x), refs.xs.at[slot], arrived)
        plgpu.copy_gmem_to_smem(self.steps(n, refs.y), refs.ys.at[slot], arrived)
        plgpu.copy_gmem_to_smem(self.steps(n, refs.z).at[:, self.columns], refs.zs.at[slot], arrived)
        plgpu.copy_gmem_to_smem(refs.gates.at[self.row, self.head, self.at(n)], refs.gs.at[slot], arrived)

    def bring_late(self, n: Any) -> None:
        refs = self.refs
        if self.kind.beside:
            others = self.steps(n, refs.beside).at[:, self.columns]
            plgpu.copy_gmem_to_smem(others, refs.others, refs.others_arrived)
        if self.kind.cross:
            self.bring_piece(n, 0)

    def bring_piece(self, n: Any, i: int) -> None:
        kept = self.refs.kept.at[self.row, self.head, self.at(n), self.pieces[i], self.columns]
        plgpu.copy_gmem_to_smem(kept, self.refs.piece, self.refs.piece_arrived)

    def cross(self, i: int, state: Any) -> None:
        """Sums of the rows of a piece of the state times the kept one."""
        refs = self.refs
        plgpu.barrier_wait(refs.piece_arrived)
        count = refs.piece.shape[0] // self.rows
        for j in range(count):
            part = i * count + j
            product = state[part] * read(refs.piece.at[self.parts[j]])
            refs.state_sums[self.parts[part]] = jnp.sum(product, axis=1)

    def hold(self, state: Any) -> None:
        """Writes the state where products read it."""
        for part, values in zip(self.parts, state, strict=True):
            self.refs.held[part] = values.astype(jnp.bfloat16)

    def step(self, n: Any, state: Any) -> Any:
        """The n-th chunk: from the state before it to the one after it."""
        refs, kind = self.refs, self.kind
        slot = lax.rem(n, STAGES)
        x, y, z = refs.xs.at[slot], refs.ys.at[slot], refs.zs.at[slot]
        held_scores = refs.held.at[:CHUNK] if self.narrow else refs.scores
        plgpu.barrier_wait(refs.arrived.at[slot])

        def with_state(*sums: Any) -> None:
            for carried in sums:
                plgpu.wgmma(carried, x, refs.held)

        def first(scores: Any, *sums: Any) -> Any:
            plgpu.wgmma(scores, x, turned(y))
            with_state(*sums)
            decays = self.decays(slot)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the chunk before put out
            refs.work[...] = self.weighted(slot).astype(jnp.bfloat16)
            if kind.cross:
                self.cross(0, state)
            return self.scored(slot, scores[...], decays), *(carried[...] for carried in sums)

        def second(own: Any, *sums: Any) -> Any:
            plgpu.wgmma(own, held_scores, z)
            with_state(*sums)
            return own[...], *(carried[...] for carried in sums)

        def updated(i: int, added: Any) -> Any:
            plgpu.wgmma(added, turned(y.at[:, self.parts[i]]), refs.work)
            return scaled(kept, state[i]) + added[...]

        one = accumulator(CHUNK, BLOCK)
        scores, *early = pl.run_scoped(first, accumulator(CHUNK, CHUNK), *([one] if self.narrow else []))
        held_scores[...] = scores.astype(jnp.bfloat16)
        plgpu.commit_smem()
        if kind.cross and not self.narrow:
            self.bring_piece(n, 1)
        own, *late = pl.run_scoped(second, one, *([] if self.narrow else [one]))
        (carried,) = early + late
        out = self.output(slot, carried, own)
        if kind.cross and not self.narrow:
            self.cross(1, state)
        kept = refs.gs[slot, CARRIED, CHUNK - 1]
        update = lambda i: pl.run_scoped(functools.partial(updated, i), accumulator(self.rows, BLOCK))
        state = tuple(update(i) for i in range(len(self.parts)))
        self.put(n, slot, out, state)
        return state

    def put(self, n: Any, slot: Any, out: Any, state: Any) -> None:
        """Writes the output and the state, sends what goes out, and asks for what comes next."""
        refs, kind, here = self.refs, self.kind, (self.row, self.head)
        if kind.beside:
            plgpu.barrier_wait(refs.others_arrived)
            refs.row_sums[...] = jnp.sum(out * read(refs.others), axis=1)
        refs.work[...] = out.astype(jnp.bfloat16)
        self.hold(state)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.work, self.steps(n, refs.out).at[:, self.columns])
        if kind.beside:
            plgpu.copy_smem_to_gmem(refs.row_sums, refs.sums.at[*here, self.block, self.at(n)])
        if kind.keep:
            plgpu.copy_smem_to_gmem(refs.held, refs.states.at[*here, self.at(n), :, self.columns])
        if kind.cross:
            plgpu.copy_smem_to_gmem(refs.state_sums, refs.crossed.at[*here, self.block, self.at(n)])
        pl.when(n + STAGES < self.chunks)(lambda: self.bring(n + STAGES, slot))
        pl.when(n + 1 < self.chunks)(lambda: self.bring_late(n + 1))


def chunk_decays(g: Any, backward: bool) -> Any:
    """M of a chunk, or M turned, from its gates."""
    down, along = ([read(g.at[i], layout) for i in (HIGH, LOW)] for layout in (DOWN, ALONG))
    high, low = (by_rows(c, CHUNK) - by_columns(r, CHUNK) for c, r in zip(down, along, strict=True))
    row, column = places()
    between = -(high + low) if backward else high + low
    return jnp.exp(jnp.where(row <= column if backward else row >= column, between, -jnp.inf))
