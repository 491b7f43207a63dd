"""What the kernels share: checks of shapes, whole chunks, documents, rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

CHUNK = 128  # of the TPU's matrix unit; rows of gates are laid along its 128 lanes
VMEM = 0.8 * 16 * 2**20  # bytes that a kernel may hold: of a TPU's default limit, a fifth left to the compiler
PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def check_shapes(call: str, shapes: Mapping[str, tuple[Any, Any]], wrong: Sequence[str] = ()) -> None:
    """Raises ValueError on arrays, by name, whose shape is not the one beside it, and on what else is wrong."""
    told = [f"{name} {found}, not {right}" for name, (found, right) in shapes.items() if found != right]
    if told or wrong:
        raise ValueError(f"{call}: {'; '.join([*told, *wrong])}")


def whole_chunks(chunk: int, *arrays: jax.Array, axis: int) -> list[jax.Array]:
    """Arrays with steps of zeros along `axis` up to whole chunks."""
    more = -arrays[0].shape[axis] % chunk
    return [jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)]) for x in arrays]


def lanes(size: int) -> int:
    """What `size` entries of an array's last axis take of VMEM: whole registers of 128 lanes."""
    return size + -size % 128


def documents_of(segment: jax.Array, chunk: int) -> jax.Array:
    """[B, 1, T]: documents counted anew in every chunk, 0 for that of the state before it; the last one is padded."""
    segment = jnp.pad(segment, ((0, 0), (0, -segment.shape[1] % chunk)), mode="edge")
    ends = jnp.pad(segment[:, chunk - 1 :: chunk], ((0, 0), (1, 0)))[:, :-1]
    return (segment - jnp.repeat(ends, chunk, axis=1))[:, None]


def belongs(documents: Any) -> tuple[Any, Any, Any]:
    """Of a chunk's documents [1, L]: which steps [L, 1] belong to that of the state before it, and to that of the state
    after it, and whether the two are one [1, 1].

    What others would read or write of a state is selected away: an infinite one times 0 is NaN.
    """
    down = turned(documents)[:, :1]
    last = down[-1:]
    return down == 0, down == last, last == 0


def turned(vector: Any) -> Any:
    """A row [1, N] or a column [N, 1] the other way round, in all columns or rows of a float32 [N, N]."""
    size = max(vector.shape)
    return jnp.broadcast_to(vector.astype(jnp.float32), (size, size)).T


def places(length: int) -> tuple[Any, Any]:
    """The row and the column of every entry of [L, L]."""
    shape = (length, length)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0), jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def sums_between(g: Any) -> Any:
    """G [L, L] of gates [1, L]: the sum of g over j < s <= i, and 0 for i <= j."""
    row, column = places(g.shape[1])
    between = jnp.where(row > column, turned(g), 0)
    step = 1
    while step < g.shape[1]:
        between = between + jnp.where(row >= step, pltpu.roll(between, step, 0), 0)
        step *= 2
    return between


def following(x: Any, steps: int) -> Any:
    """What is `steps` later in [L, K], and zeros at the end."""
    length = x.shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < length - steps, pltpu.roll(x, length - steps, 0), 0)


def sums_to_end(x: Any) -> Any:
    """The sums of [L, K] from each step to the last."""
    step = 1
    while step < x.shape[0]:
        x = x + following(x, step)
        step *= 2
    return x


def dot(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    """A product gathered in float32, of the wider of two types; float32 is not cut down to bfloat16."""
    kind = jnp.result_type(a, b)
    precision = jax.lax.Precision.HIGHEST if kind == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a.astype(kind), b.astype(kind), dimensions, precision=precision, preferred_element_type=jnp.float32
    )
