"""`linear_scan`: h_t = exp(g_t) h_{t-1} + x_t, element by element, real or complex (RG-LRU, LRU, S5).

Forward, for a chunk of L steps from the state h: drives and decays of the last 1, 2, 4 .. L steps by doubling,

    X_t <- X_t + A_t X_{t-s},  A_t <- A_t A_{t-s}    s = 1, 2, 4 ..         h_t = X_t + A_t h

where A_t starts as exp(g_t), or 0 at a document's start. Backward, from the last step to the first:

    dx_t = dh_t + A_{t+1} dx_{t+1}                   dg_t = dx_t A_t h_{t-1}

by the same doubling, where dh_t is the gradient of the output, and of the state after the chunk; h is computed again
from the states before the chunks, a hundredth of the data. The grid goes through the chunks of a block of channels in
turn, the state stays in VMEM: one pass over the inputs each way. Complex numbers are two planes, (real, imaginary).
"""

from __future__ import annotations

import functools
from typing import Any

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
    lanes,
    turned,
    whole_chunks,
)
from kernels_pallas.manual import pallas_call
from kernels_pallas.planes import Planes, exp, joined, pick, planes_of, plus, times, wide

WIDTHS = (512, 256, 128)  # channels of a block, the first that divides them; all of them else


def reference(log_decay: jax.Array, drive: jax.Array, state: jax.Array, segment: jax.Array) -> Any:
    """The recurrence a token at a time, in the type of the state."""
    before = jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]

    def body(state: jax.Array, step: Any) -> Any:
        g, x, goes_on = step
        state = jnp.exp(g) * jnp.where(goes_on[:, None], state, 0) + x
        return state, state

    moved = [jnp.swapaxes(x.astype(state.dtype), 0, 1) for x in (log_decay, drive)]
    state, out = jax.lax.scan(body, state, (*moved, (segment == before).T))
    return jnp.swapaxes(out, 0, 1), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def linear_scan(
    log_decay: jax.Array,
    drive: jax.Array,
    state: jax.Array,
    segment: jax.Array,
    chunk: int = CHUNK,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`(h [B, T, D], state [B, D])` of log_decay and drive [B, T, D] and a state [B, D]: all real, or all complex.

    Real parts of log_decay are at most 0, -inf too. `segment` [B, T] int32 counts the documents of a row: `state` goes
    on where it is 0, and every change starts from zeros. Inputs are bfloat16, float32 or complex64; h has the type of
    `drive`, the state is float32 or complex64. `interpret`: as `pallas_call` takes it. Raises ValueError on shapes and
    types that do not fit.
    """
    return _forward(log_decay, drive, state, segment, chunk, interpret)[0]


def vmem_bytes(channels: int, chunk: int = CHUNK, *, planes: int = 1, dtype: Any = jnp.float32) -> dict[str, int]:
    """What the forward and the backward kernel hold: blocks twice (one is copied as one is used), temporaries."""
    block = chunk * lanes(_width(channels))
    item = jnp.dtype(dtype).itemsize if planes == 1 else 4
    own = lambda inputs, outputs, live: planes * block * (2 * (inputs + outputs) * item + 4 * live)
    return {"forward": own(2, 1, 4), "backward": own(3, 2, 8)}


def _width(channels: int) -> int:
    return next((width for width in WIDTHS if channels % width == 0), channels)


def _roll(x: Planes, steps: int) -> Planes:
    return tuple(pltpu.roll(plane, steps % plane.shape[0], 0) for plane in x)


def _doubled(decay: Planes, drive: Planes, *, backward: bool = False) -> tuple[Planes, Planes]:
    """Drives and decays of all steps up to each one, or from each one on; without the state."""
    length = drive[0].shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, drive[0].shape, 0)
    step = 1
    while step < length:
        shift, within = (-step, row < length - step) if backward else (step, row >= step)
        drive = pick(within, plus(drive, times(decay, _roll(drive, shift))), drive)
        decay = pick(within, times(decay, _roll(decay, shift)), decay)
        step *= 2
    return drive, decay


def _goes_on(documents: Any) -> Any:
    """[L, 1]: whether a step is of the document of the one before."""
    column = turned(documents)[:, :1]
    row = jax.lax.broadcasted_iota(jnp.int32, column.shape, 0)
    return column == jnp.where(row == 0, 0, pltpu.roll(column, 1, 0))


def _decays(log_decay: Planes, goes_on: Any) -> Planes:
    """exp(g), and 0 where a document starts."""
    return pick(jnp.broadcast_to(goes_on, log_decay[0].shape), exp(wide(log_decay)), 0.0)


class _Blocks:
    """Block shapes and index maps over the grid (row, block of channels, chunk); `backward`: from the last chunk."""

    def __init__(self, drive: jax.Array, chunk: int, *, backward: bool = False):
        self.batch, length, self.channels = drive.shape
        self.chunks, width = length // chunk, _width(self.channels)
        self.grid = (self.batch, self.channels // width, self.chunks)
        last = self.chunks - 1
        at = (lambda n: last - n) if backward else (lambda n: n)
        self.steps = pl.BlockSpec((None, chunk, width), lambda b, d, n: (b, at(n), d))
        self.documents = pl.BlockSpec((None, 1, chunk), lambda b, d, n: (b, 0, at(n)))
        self.state = pl.BlockSpec((None, 1, width), lambda b, d, n: (b, 0, d))
        self.states = pl.BlockSpec((None, None, 1, width), lambda b, d, n: (b, at(n), 0, d))
        self.scratch = pltpu.VMEM((1, width), jnp.float32)

    def state_shape(self) -> Any:
        return jax.ShapeDtypeStruct((self.batch, 1, self.channels), jnp.float32)

    def states_shape(self) -> Any:
        return jax.ShapeDtypeStruct((self.batch, self.chunks, 1, self.channels), jnp.float32)


def check(log_decay: Any, drive: Any, state: Any, segment: Any) -> None:
    batch, length, channels = drive.shape
    shapes = {
        "log_decay": (log_decay.shape, (batch, length, channels)),
        "state": (state.shape, (batch, channels)),
        "segment": (segment.shape, (batch, length)),
    }
    mixed = len({jnp.iscomplexobj(x) for x in (log_decay, drive, state)}) > 1
    types = f"types {log_decay.dtype}, {drive.dtype}, {state.dtype}: all real, or all complex"
    check_shapes(f"linear_scan with drive {drive.shape}", shapes, [types] if mixed else [])


def _forward(log_decay: Any, drive: Any, state: Any, segment: Any, chunk: int, interpret: Any) -> Any:
    check(log_decay, drive, state, segment)
    g, x = whole_chunks(chunk, log_decay, drive, axis=1)
    documents = documents_of(segment, chunk)
    blocks = _Blocks(x, chunk)
    logs, drives = planes_of(g), planes_of(x)
    initial = [plane[:, None].astype(jnp.float32) for plane in planes_of(state)]
    count = len(drives)
    found = pallas_call(
        functools.partial(_forward_kernel, count),
        grid=blocks.grid,
        in_specs=[*[blocks.steps] * (2 * count), blocks.documents, *[blocks.state] * count],
        out_specs=[*[blocks.steps] * count, *[blocks.state] * count, *[blocks.states] * count],
        out_shape=[
            *[jax.ShapeDtypeStruct(x.shape, plane.dtype) for plane in drives],
            *[blocks.state_shape()] * count,
            *[blocks.states_shape()] * count,
        ],
        scratch_shapes=[blocks.scratch] * count,
        compiler_params=PARAMS,
        interpret=interpret,
        name="linear_scan_forward",
    )(*logs, *drives, documents, *initial)
    out, after, states = found[:count], found[count : 2 * count], tuple(found[2 * count :])
    kind = jnp.complex64 if count == 2 else jnp.float32
    out = joined(tuple(out), drive.dtype)[:, : drive.shape[1]]
    return (out, joined(tuple(x[:, 0] for x in after), kind)), (log_decay, drive, state, segment, states)


def _forward_kernel(count: int, *refs: Any) -> None:
    parts = [refs[:count], refs[count : 2 * count], refs[2 * count], refs[2 * count + 1 : 3 * count + 1]]
    logs, drives, documents, first = parts
    out, last, states, held = (refs[(3 + i) * count + 1 : (4 + i) * count + 1] for i in range(4))

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for to, given in zip(held, first, strict=True):
            to[...] = given[...]

    state = tuple(ref[...] for ref in held)
    decay = _decays(tuple(ref[...] for ref in logs), _goes_on(documents[...]))
    whole, reach = _doubled(decay, wide(tuple(ref[...] for ref in drives)))
    hidden = plus(whole, pick(belongs(documents[...])[0], times(reach, state), 0.0))
    for i in range(count):
        states[i][...] = state[i]
        out[i][...] = hidden[i].astype(out[i].dtype)
        held[i][...] = hidden[i][-1:]
        last[i][...] = hidden[i][-1:]


def _backward(chunk: int, interpret: Any, residuals: Any, gradients: Any) -> Any:
    log_decay, drive, state, segment, states = residuals
    d_out, d_last = gradients
    length = drive.shape[1]
    g, x, d_out = whole_chunks(chunk, log_decay, drive, d_out, axis=1)
    documents = documents_of(segment, chunk)
    blocks = _Blocks(x, chunk, backward=True)
    planes = [planes_of(part) for part in (g, x, d_out)]
    count = len(planes[0])
    ends = [plane[:, None].astype(jnp.float32) for plane in planes_of(d_last)]
    found = pallas_call(
        functools.partial(_backward_kernel, count),
        grid=blocks.grid,
        in_specs=[
            *[blocks.steps] * (3 * count), blocks.documents, *[blocks.states] * count, *[blocks.state] * count,
        ],
        out_specs=[*[blocks.steps] * (2 * count), *[blocks.state] * count],
        out_shape=[
            *[jax.ShapeDtypeStruct(x.shape, plane.dtype) for plane in (*planes[0], *planes[1])],
            *[blocks.state_shape()] * count,
        ],
        scratch_shapes=[blocks.scratch] * count,
        compiler_params=PARAMS,
        interpret=interpret,
        name="linear_scan_backward",
    )(*planes[0], *planes[1], *planes[2], documents, *states, *ends)  # fmt: skip
    d_log, d_drive, d_first = (tuple(found[i * count : (i + 1) * count]) for i in range(3))
    return (
        joined(d_log, log_decay.dtype)[:, :length],
        joined(d_drive, drive.dtype)[:, :length],
        joined(tuple(x[:, 0] for x in d_first), state.dtype),
        None,
    )


def _backward_kernel(count: int, *refs: Any) -> None:
    logs, drives, d_out = (refs[i * count : (i + 1) * count] for i in range(3))
    documents, rest = refs[3 * count], refs[3 * count + 1 :]
    before, d_last, d_log, d_drive, d_first, held = (rest[i * count : (i + 1) * count] for i in range(6))

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for to, given in zip(held, d_last, strict=True):
            to[...] = given[...]

    read = lambda part: tuple(ref[...] for ref in part)
    goes_on, (reads, writes, _) = _goes_on(documents[...]), belongs(documents[...])
    decay = _decays(read(logs), goes_on)
    state, after = read(before), read(held)
    whole, reach = _doubled(decay, wide(read(drives)))
    hidden = plus(whole, pick(reads, times(reach, state), 0.0))
    row = jax.lax.broadcasted_iota(jnp.int32, hidden[0].shape, 0)
    one = tuple(jnp.full_like(x, i == 0) for i, x in enumerate(decay))  # 1, or 1 + 0i
    following = pick(row < hidden[0].shape[0] - 1, _roll(decay, -1), one)
    inside, reach = _doubled(following, wide(read(d_out)), backward=True)
    gradient = plus(inside, pick(writes, times(reach, after), 0.0))
    earlier = pick(
        row == 0, tuple(jnp.broadcast_to(x, h.shape) for x, h in zip(state, hidden, strict=True)), _roll(hidden, 1)
    )
    flowing = pick(goes_on, times(decay, gradient), 0.0)
    of_log = pick(goes_on, times(flowing, earlier), 0.0)
    for i in range(count):
        d_log[i][...] = of_log[i].astype(d_log[i].dtype)
        d_drive[i][...] = gradient[i].astype(d_drive[i].dtype)
        held[i][...] = flowing[i][:1]
        d_first[i][...] = flowing[i][:1]


linear_scan.defvjp(_forward, _backward)
