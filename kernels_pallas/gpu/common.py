"""What kernels for Hopper share: sizes, tiles of shared memory, reads by rows and columns, sums of gates, a launch.

A program is one warp group (128 threads). Its products are `wgmma`s of 64 rows, with both factors in shared memory and
float32 sums in registers; tiles there are swizzled by 128 bytes, as wide as a block of 64 bfloat16 columns. Layouts are
named, not inferred: the lowering is the same in every version of jax that the project runs on.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.manual import varying

CHUNK = 64  # steps, the rows of a `wgmma`
BLOCK = 64  # columns that a program has to itself
SIZES = (64, 128, 256)  # of heads: whole blocks, and a state of at most 128 registers of a thread
SHARED = 227 * 1024  # bytes of shared memory that a program may have
STAGES = 2  # chunks in shared memory: one is used while the next one comes
LOWEST = -128.0  # exp of it and of less is 0 in float32
PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
TILE = plgpu.Layout.WGMMA  # the registers of a product
DOWN, ALONG = TILE.reduce(1), TILE.reduce(0)  # those of one number a row, and one a column
INDEXED = "idx" in inspect.signature(plgpu.load).parameters  # jax < 0.11


def refused(query: Any, key: Any, value: Any) -> str | None:
    """Why the kernels do not take these arrays, of any order of heads and steps; None where they do."""
    kinds = {"query": query.dtype, "key": key.dtype, "value": value.dtype}
    sizes = {"that of keys": query.shape[3], "that of values": value.shape[3]}
    wrong = [f"{name} is {jnp.dtype(kind)}" for name, kind in kinds.items() if kind != jnp.bfloat16]
    wrong += [f"{name} is {size}" for name, size in sizes.items() if size not in SIZES]
    takes = f"the kernel for GPUs takes bfloat16 and heads of {', '.join(map(str, SIZES))}"
    return f"{takes}, but {' and '.join(wrong)}" if wrong else None


def tile(*shape: int) -> Any:
    """bfloat16 in shared memory, laid out for copies and products; the last axis is whole blocks."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(128)))


def numbers(*shape: int) -> Any:
    """float32 in shared memory, in plain order."""
    return plgpu.SMEM(shape, jnp.float32)


def shared_bytes(scratch: Iterable[Any]) -> int:
    """Bytes of shared memory of a program: arrays as `tile` and `numbers` make them, room to sum in, barriers."""
    arrays = [x for x in scratch if hasattr(x, "dtype")]
    sizes = [math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays]
    return sum(-(-size // 1024) * 1024 for size in sizes) + PARAMS.reduction_scratch_bytes + 1024


def read(ref: Any, layout: Any = TILE) -> Any:
    """An array from shared memory, in float32."""
    return plgpu.load(ref, *([()] if INDEXED else []), layout=layout).astype(jnp.float32)


def read_far(ref: Any) -> Any:
    """A tile from device memory, for what is read once."""
    return plgpu.load(ref, *([()] if INDEXED else []), layout=TILE, optimized=False)


def halves_of(values: Any) -> tuple[Any, Any]:
    """float32 as two bfloat16, high and low, whose sum has 16 of its bits."""
    high = values.astype(jnp.bfloat16)
    return high, (values - high.astype(jnp.float32)).astype(jnp.bfloat16)


def by_rows(column: Any, columns: int) -> Any:
    """A number a row, in all columns."""
    return lax.broadcast_in_dim(column, (column.shape[0], columns), [0])


def by_columns(row: Any, rows: int) -> Any:
    """A number a column, in all rows."""
    return lax.broadcast_in_dim(row, (rows, row.shape[0]), [1])


def scaled(scale: Any, x: Any) -> Any:
    """scale * x, and 0 where nothing is kept of x, which may be infinite: a state at a document's start."""
    return jnp.where(scale == 0, 0, scale * x)


def turned(ref: Any) -> Any:
    """A tile of shared memory as a transposed factor."""
    return ref.transpose((1, 0))


def accumulator(rows: int, columns: int) -> Any:
    """Zeros to which products are added."""
    return plgpu.ACC((rows, columns), jnp.float32)


def places() -> tuple[Any, Any]:
    """The row and the column of every entry of [CHUNK, CHUNK]."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=TILE) for axis in (0, 1))
    return row, column


def chunks_of(array: jax.Array) -> jax.Array:
    """[.., T] as [.., N, CHUNK]."""
    return array.reshape(*array.shape[:-1], -1, CHUNK)


def over_heads(x: jax.Array, groups: int) -> jax.Array:
    """What heads [B, T, H, K] that share an array [B, T, groups, K] give in all, added up in float32."""
    parts = x.reshape(*x.shape[:2], groups, -1, x.shape[3])
    return jnp.sum(parts, axis=3, dtype=jnp.float32).astype(x.dtype)


def starts_of(segment: jax.Array) -> jax.Array:
    """[B, T]: where a document starts."""
    return segment != jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]


def sums_of(log_decay: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sums of log decays [.., T] from a chunk's first step to each, as two float32 [.., N, CHUNK]: c = high + low.

    A difference of two of them loses no digits. `high` sums the multiples of 1/1024 in the decays, at most 64 * 128 in
    all: 23 bits hold every sum and every difference. `low` sums what is left, 2^-11 a step at most, and is off by less
    than 2^-24. A decay below `LOWEST` is that, and a document starts with it: exp is 0, and nothing is infinite.
    """
    g = chunks_of(jnp.where(start, LOWEST, jnp.maximum(log_decay.astype(jnp.float32), LOWEST)))
    high = jnp.round(g * 1024) / 1024
    return jnp.cumsum(high, axis=-1), jnp.cumsum(g - high, axis=-1)


def launch(
    kernel: Callable[..., None],
    name: str,
    grid: Mapping[str, int],
    outputs: Sequence[Any],
    scratch: Sequence[Any],
    interpret: Any,
) -> Callable[..., Any]:
    """The kernel over a grid with named axes; `interpret`: parameters of Mosaic GPU's interpreter, or False."""
    how = {"interpret": interpret} if interpret else {}
    made = plgpu.kernel(
        kernel,
        out_type=tuple(outputs),
        scratch_types=tuple(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=PARAMS,
        kernel_name=name,
        **how,
    )
    return varying(made)
