"""Recurrences element by element on Hopper GPUs: tiles of steps that stream through shared memory.

A block of the grid is one warpgroup of 128 lanes, each of which owns a channel, through all steps of a row. The tiles
of these channels come through a ring of slots in shared memory: copied in ahead of their turn, and results out
behind it, by the tensor memory accelerator (TMA). Beyond the end of an array that reads zeros, and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.manual import varying

LANES = 128  # of a warpgroup
HOLDS = 108 * 1024  # bytes of shared memory a block takes at most, so that two of them fit on a multiprocessor
SLOTS = 8  # of a ring at most
ALIGNED, BARRIER = 1024, 8  # bytes: where a ring's memory starts, and what a barrier takes
ROW = 32  # int32s of a tile's marks: 128 bytes, where TMA lets a slot of shared memory start
WHOLE = 8  # channels are padded to a multiple of it: strides of arrays that TMA copies are multiples of 16 bytes


class Part(NamedTuple):
    """What a tile needs of an array: a block of this shape, at `at(row, tile, lanes)`."""

    shape: tuple[int, ...]
    at: Callable[[Any, Any, Any], tuple[Any, ...]]


def of_steps(steps: int) -> Part:
    """Of [B, T, D]: the tile's steps."""
    return Part((steps, LANES), lambda row, tile, lanes: (row, pl.ds(tile * steps, steps), lanes))


def of_tile(vectors: int) -> Part:
    """Of [B, tiles, vectors, D]: what there is once a tile."""
    return Part((vectors, LANES), lambda row, tile, lanes: (row, tile, pl.ds(0, vectors), lanes))


MARKS = Part((ROW,), lambda row, tile, lanes: (row, tile))  # of [B, tiles, ROW], the same for all channels


def going_on(segment: jax.Array, steps: int) -> jax.Array:
    """[B, tiles, ROW] int32: 1 where a step goes on from the one before, 0 where a document starts; padded."""
    batch, length = segment.shape
    on = segment == jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]
    on = jnp.pad(on, ((0, 0), (0, -length % steps)), constant_values=True).reshape(batch, -1, steps)
    return jnp.pad(on.astype(jnp.int32), ((0, 0), (0, 0), (0, ROW - steps)))


def whole_channels(x: jax.Array, multiple: int = WHOLE) -> jax.Array:
    """`x` [..., D] with zeros up to a multiple of channels."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)])


def ring(parts: Sequence[tuple[Part, Any]], tiles: int, rows: Sequence[int]) -> tuple[int, int]:
    """How many slots there are for these parts, by their types, and the bytes of shared memory that a block takes.

    `rows`: how many vectors of each memory the block holds beside the ring.
    """
    sizes = [math.prod(part.shape) * jnp.dtype(dtype).itemsize for part, dtype in parts]
    aligned = lambda size: -(-size // ALIGNED) * ALIGNED
    beside = sum(aligned(4 * LANES * count) for count in rows)
    slots = min(max((HOLDS - beside) // sum(sizes), 2), SLOTS, tiles)
    return slots, sum(aligned(slots * size) for size in sizes) + beside + slots * BARRIER


def scan_tiles(
    tile: Callable[..., None],
    carry: jax.Array,
    *given: jax.Array,
    reads: Sequence[tuple[jax.Array, Part]],
    writes: Sequence[tuple[Any, Part]],
    scratch: Sequence[tuple[int, ...]] = (),
    backward: bool = False,
    interpret: Any = None,
    name: str,
) -> tuple[list[jax.Array], jax.Array]:
    """`tile(read, written, carry, *given, *scratch)` over the tiles of each row in turn: what was written, and `carry`.

    `tile` gets references to shared memory: a tile's blocks; in float32, R vectors of LANES of `carry` [B, R, D] and of
    each `given` [R, D], with D a multiple of LANES; and scratch of these shapes. What it leaves in `carry` the next one
    finds there. `writes` are shapes with types. `backward`: from the last tile.
    """
    batch, vectors, channels = carry.shape
    tiles = next(x.shape[1] for x, part in reads if part is MARKS)
    beside = [vectors, *[x.shape[0] for x in given], *[-(-math.prod(shape) // LANES) for shape in scratch]]
    slots, _ = ring([(part, x.dtype) for x, part in (*reads, *writes)], tiles, beside)
    memory = lambda pairs: [plgpu.SMEM((slots, *part.shape), x.dtype) for x, part in pairs]

    def body(*refs: Any, ready: Any, held: Any, made: Any, kept: Any, more: Any) -> None:
        sources, rest = refs[: len(reads)], refs[len(reads) :]
        fixed, first, results, last = rest[: len(given)], rest[len(given)], rest[len(given) + 1 : -1], rest[-1]
        row = jax.lax.axis_index("row")
        lanes = pl.ds(jax.lax.axis_index("block") * LANES, LANES)
        place = lambda part, turn: part.at(row, tiles - 1 - turn if backward else turn, lanes)

        def fetch(turn: Any, slot: Any) -> None:
            for ref, to, (_, part) in zip(sources, held, reads, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[place(part, turn)], to.at[slot], ready.at[slot])

        def step(turn: Any, _: None) -> None:
            slot = jax.lax.rem(turn, jnp.int32(slots))
            plgpu.barrier_wait(ready.at[slot])
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)  # what this slot held before is out
            tile([x.at[slot] for x in held], [x.at[slot] for x in made], *kept, *more)
            plgpu.commit_smem()  # all lanes have read and written: the slot may go out, and be filled again
            for ref, source, (_, part) in zip(results, made, writes, strict=True):
                plgpu.copy_smem_to_gmem(source.at[slot], ref.at[place(part, turn)], commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            pl.when(turn + slots < tiles)(lambda: fetch(turn + slots, slot))

        for turn in range(slots):
            fetch(jnp.int32(turn), turn)
        for ref, to in zip((first.at[row], *fixed), kept, strict=True):
            for i in range(to.shape[0]):
                to[i] = ref[i, lanes]
        jax.lax.fori_loop(0, tiles, step, None)
        for i in range(vectors):
            last[row, i, lanes] = kept[0][i]
        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        body,
        out_type=[*[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in writes], shape_of(carry.shape)],
        scratch_types={
            "ready": plgpu.Barrier(num_arrivals=len(reads), num_barriers=slots),
            "held": memory(reads),
            "made": memory(writes),
            "kept": [plgpu.SMEM((x.shape[-2], LANES), jnp.float32) for x in (carry, *given)],
            "more": [plgpu.SMEM(shape, jnp.float32) for shape in scratch],
        },
        grid=(channels // LANES, batch),
        grid_names=("block", "row"),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
    )
    *found, carry = varying(run)(*[x for x, _ in reads], *given, carry)
    return found, carry


def shape_of(shape: Sequence[int]) -> Any:
    return jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
