"""`selective_scan`: h_t = exp(dt_t A) h_{t-1} + dt_t x_t b_t^T, read as y_t = h_t c_t (Mamba, 2312.00752).

States are [N, W], a block of channels along the lanes, and live in VMEM alone: nothing of [T, N, D] reaches main
memory. Forward, a step at a time, with u_t = dt_t x_t a row and b_t, c_t columns:

    E_t = exp(A dt_t)            h_t = E_t * h_{t-1} + b_t u_t            y_t = sum over N of c_t * h_t

Backward, from the state before the chunk: h_{t-1} of every step again, then from the last step to the first, with dh
the gradient from the steps after t:

    g_t = dh + c_t dy_t          dc_t = sum over D of h_t * dy_t          db_t = sum over D of g_t * u_t
    dh = E_t * g_t               du_t = sum over N of b_t * g_t           q_t = dh * h_{t-1}
    dx_t = dt_t du_t             d dt_t = x_t du_t + sum over N of A * q_t             dA = sum over t of dt_t q_t

The grid goes through the chunks of a row in turn, and in each through the blocks of channels, whose states all stay in
VMEM: columns are laid along all lanes once a chunk, and what is summed over D leaves the lanes once a chunk. Where a
document starts, E_t alone takes a step LONGEST more, by which the state is known to end. Arithmetic is float32,
whatever comes in.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import selective_kernels
from kernels_pallas.chunks import (
    CHUNK,
    VMEM,
    check_shapes,
    documents_of,
    lanes,
    whole_chunks,
)
from kernels_pallas.manual import pallas_call
from kernels_pallas.selective_kernels import LANES, ROWS

WIDTHS = (256, 128)  # channels of a block, the first that divides them and keeps a chunk's states within STATES
STATES = 2 * 2**20  # bytes
PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"))


def reference(
    x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, state: jax.Array, segment: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The recurrence a token at a time, in the type of the state."""
    before = jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]
    x, dt, a, b, c = (y.astype(state.dtype) for y in (x, dt, a, b, c))

    def body(state: jax.Array, step: Any) -> Any:
        x, dt, b, c, goes_on = step
        state = jnp.where(goes_on[:, None, None], state, 0)
        state = jnp.exp(dt[..., None] * a[None]) * state + (dt * x)[..., None] * b[:, None]
        return state, jnp.einsum("bdn,bn->bd", state, c)

    state, y = jax.lax.scan(body, state, [jnp.swapaxes(part, 0, 1) for part in (x, dt, b, c, segment == before)])
    return jnp.swapaxes(y, 0, 1), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    state: jax.Array,
    segment: jax.Array,
    chunk: int = CHUNK,
    save_states: bool = True,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`(y [B, T, D], state [B, D, N])` of x and dt [B, T, D], a [D, N], b and c [B, T, N] and a state [B, D, N].

    dt is at least 0, a at most 0, -inf too. `segment` [B, T] int32 counts the documents of a row: `state` goes on where
    it is 0, and every change starts from zeros. x, dt, b and c are bfloat16 or float32, y has the type of x; a and the
    state are float32. `save_states`: a training step keeps the states before the chunks (N / `chunk` of the entries
    of x, in float32), instead of a second run of the forward kernel. `interpret`: as `pallas_call` takes it. Raises
    ValueError on shapes that do not fit, and on states too large for VMEM.
    """
    return _run(x, dt, a, b, c, state, segment, chunk, False, interpret)[:2]


def vmem_bytes(channels: int, size: int, chunk: int = CHUNK, dtype: Any = jnp.float32) -> dict[str, int]:
    """What the forward and the backward kernel hold: blocks twice (one is copied as one is used), scratch, temporaries.

    `dtype`: of x, dt and y.
    """
    channels, size = lanes(channels), size + -size % ROWS
    width, item = _width(channels, size, chunk), jnp.dtype(dtype).itemsize
    rows, state, columns = chunk * width, 4 * size * width, 4 * size * chunk
    wide, held, documents = columns * LANES, 4 * size * channels, 4 * chunk * (2 * ROWS + LANES)
    forward = 2 * (3 * rows * item + 2 * columns + 4 * state) + 2 * wide + held + 4 * 3 * rows + 4 * state
    backward = 2 * (5 * rows * item + 4 * columns + 5 * state) + 4 * wide + 2 * held + (4 * 5 + 4 * size) * rows
    turning = 3 * 4 * LANES * LANES
    return {"forward": forward + documents + turning, "backward": backward + 10 * state + documents + turning}


def _width(channels: int, size: int, chunk: int) -> int:
    fits = (w for w in WIDTHS if channels % w == 0 and 4 * chunk * size * w <= STATES)
    return next(fits, WIDTHS[-1])


def _check(x: Any, dt: Any, a: Any, b: Any, c: Any, state: Any, segment: Any, chunk: int) -> None:
    batch, length, channels = x.shape
    size = a.shape[-1]
    shapes = {
        "dt": (dt.shape, x.shape),
        "a": (a.shape, (channels, size)),
        "b": (b.shape, (batch, length, size)),
        "c": (c.shape, (batch, length, size)),
        "state": (state.shape, (batch, channels, size)),
        "segment": (segment.shape, (batch, length)),
    }
    held = max(vmem_bytes(channels, size, chunk, x.dtype).values())
    large = f"states of {size} in chunks of {chunk} steps take {held} bytes of VMEM, more than {VMEM:.0f}"
    check_shapes(f"selective_scan with x {x.shape}", shapes, [large] if held > VMEM else [])


class _Blocks:
    """Block shapes and index maps over the grid (row, chunk, block of channels); `backward`: from the last chunk."""

    def __init__(self, x: jax.Array, a: jax.Array, chunk: int, *, backward: bool = False):
        self.batch, self.length, self.channels = x.shape
        self.chunks, self.size = self.length // chunk, a.shape[0]
        self.width = _width(self.channels, self.size, chunk)
        size, width, end = self.size, self.width, self.chunks - 1
        final = self.channels // width - 1
        at = (lambda n: end - n) if backward else (lambda n: n)
        self.steps = pl.BlockSpec((None, chunk, width), lambda b, n, d: (b, at(n), d))
        self.columns = pl.BlockSpec((None, chunk * size // LANES, LANES), lambda b, n, d: (b, at(n), 0))
        self.rates = pl.BlockSpec((size, width), lambda b, n, d: (0, d))
        self.documents = pl.BlockSpec((None, 1, chunk), lambda b, n, d: (b, 0, at(n)))
        self.states = pl.BlockSpec((None, None, size, width), lambda b, n, d: (b, at(n), 0, d))
        # Read in the first chunk that is gone through alone, and written in the last one.
        self.first = pl.BlockSpec((None, size, width), lambda b, n, d: (b, 0, jnp.where(n == 0, d, final)))
        self.last = pl.BlockSpec((None, size, width), lambda b, n, d: (b, 0, jnp.where(n == end, d, 0)))
        self.held = (final + 1, size, width)
        self.wide = (chunk * size, LANES)
        self.rows = (width // LANES, chunk, LANES)
        self.prepared = [self.wide, self.wide, (chunk, LANES), self.rows, self.rows]

    def shape(self, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct((self.batch, *sizes), jnp.float32)

    def call(self, kernel: Any, name: str, inputs: list[Any], outputs: list[Any], scratch: Any, interpret: Any) -> Any:
        return pallas_call(
            kernel,
            grid=(self.batch, self.chunks, self.channels // self.width),
            in_specs=inputs,
            out_specs=[spec for spec, _ in outputs],
            out_shape=[shape for _, shape in outputs],
            scratch_shapes=[pltpu.VMEM(sizes, jnp.float32) for sizes in scratch],
            compiler_params=PARAMS,
            interpret=interpret,
            name=name,
        )


def _laid(chunk: int, x: Any, dt: Any, a: Any, b: Any, c: Any) -> tuple[Any, ...]:
    """x, dt [B, T, D] and a [N, D] in whole chunks and registers; b, c the same as [B, T N / LANES, LANES]."""
    x, dt = whole_chunks(chunk, *whole_chunks(LANES, x, dt, axis=2), axis=1)
    b, c = whole_chunks(chunk, *whole_chunks(ROWS, b, c, axis=2), axis=1)
    return x, dt, _state_laid(a), *(y.reshape(y.shape[0], -1, LANES) for y in (b, c))


def _state_laid(state: Any) -> Any:
    """[..., D, N] as float32 [..., N, D] in whole registers."""
    state = jnp.swapaxes(state, -1, -2).astype(jnp.float32)
    (state,) = whole_chunks(ROWS, state, axis=state.ndim - 2)
    return whole_chunks(LANES, state, axis=state.ndim - 1)[0]


def _run(
    x: Any, dt: Any, a: Any, b: Any, c: Any, state: Any, segment: Any, chunk: int, save: bool, interpret: Any
) -> tuple[Any, ...]:
    """y, the state after it, and where they are kept the states before the chunks [B, T / chunk, N, D]."""
    _check(x, dt, a, b, c, state, segment, chunk)
    _, length, channels = x.shape
    size = a.shape[1]
    x, dt, a, b, c = _laid(chunk, x, dt, a, b, c)
    blocks = _Blocks(x, a, chunk)
    inputs = [blocks.steps, blocks.steps, blocks.rates, blocks.columns, blocks.columns, blocks.documents, blocks.first]
    outputs = [(blocks.steps, jax.ShapeDtypeStruct(x.shape, x.dtype))]
    outputs += [(blocks.last, blocks.shape(blocks.size, blocks.channels))]
    outputs += [(blocks.states, blocks.shape(blocks.chunks, blocks.size, blocks.channels))] * save
    scratch = [blocks.held, *blocks.prepared, (chunk, blocks.width)]
    launch = blocks.call(selective_kernels.forward, "selective_scan_forward", inputs, outputs, scratch, interpret)
    y, after, *states = launch(x, dt, a, b, c, documents_of(segment, chunk), _state_laid(state))
    return y[:, :length, :channels], jnp.swapaxes(after[:, :size, :channels], 1, 2), *states


def _forward(
    x: Any, dt: Any, a: Any, b: Any, c: Any, state: Any, segment: Any, chunk: int, save: bool, interpret: Any
) -> Any:
    y, after, *states = _run(x, dt, a, b, c, state, segment, chunk, save, interpret)
    return (y, after), (x, dt, a, b, c, state, segment, states[0] if save else None)


def _backward(chunk: int, save: bool, interpret: Any, residuals: Any, gradients: Any) -> Any:
    x, dt, a, b, c, state, segment, states = residuals
    d_out, d_last = gradients
    batch, length, channels = x.shape
    size, of_rates, of_columns = state.shape[2], a.dtype, (b.dtype, c.dtype)
    if states is None:
        states = _run(x, dt, a, b, c, state, segment, chunk, True, interpret)[2]
    x, dt, a, b, c = _laid(chunk, x, dt, a, b, c)
    (d_out,) = whole_chunks(chunk, *whole_chunks(LANES, d_out, axis=2), axis=1)
    blocks = _Blocks(x, a, chunk, backward=True)
    inputs = [blocks.steps, blocks.steps, blocks.rates, blocks.columns, blocks.columns, blocks.documents]
    inputs += [blocks.states, blocks.steps, blocks.first]
    whole = (blocks.last, blocks.shape(blocks.size, blocks.channels))
    sums = (blocks.columns, blocks.shape(*b.shape[1:]))
    outputs = [*((blocks.steps, jax.ShapeDtypeStruct(y.shape, y.dtype)) for y in (x, dt)), whole, sums, sums, whole]
    scratch = [*[blocks.held] * 2, *blocks.prepared, *[blocks.wide] * 2, (chunk, blocks.size, blocks.width)]
    scratch += [blocks.rows, *[(chunk, blocks.width)] * 2]
    launch = blocks.call(selective_kernels.backward, "selective_scan_backward", inputs, outputs, scratch, interpret)
    found = launch(x, dt, a, b, c, documents_of(segment, chunk), states, d_out, _state_laid(d_last))
    dx, ddt, da, db, dc, d_state = found
    turn = lambda x: jnp.swapaxes(x, -1, -2)[..., :channels, :size]
    narrow = lambda x: x.reshape(batch, -1, blocks.size)[:, :length, :size]
    return (
        dx[:, :length, :channels],
        ddt[:, :length, :channels],
        turn(jnp.sum(da, axis=0)).astype(of_rates),
        *(narrow(y).astype(kind) for y, kind in zip((db, dc), of_columns, strict=True)),
        turn(d_state).astype(state.dtype),
        None,
    )


selective_scan.defvjp(_forward, _backward)
