"""`selective_scan`: h_t = exp(dt_t A) h_{t-1} + dt_t x_t b_t^T, read as y_t = h_t c_t (Mamba, 2312.00752).

States are [N, width], channels along the lanes, and live in VMEM alone: nothing of [T, N, D] reaches main memory. The
grid goes through the chunks of a block of channels in turn. Forward, a step at a time, with u_t = dt_t x_t a row and
b_t, c_t columns of the chunk:

    E_t = exp(A dt_t)            h_t = E_t * h_{t-1} + b_t u_t            y_t = sum over N of c_t * h_t

Backward, from the state before the chunk: h_{t-1} of every step again, then from the last step to the first, with dh
the gradient from the steps after t:

    g_t = dh + c_t dy_t          dc_t = sum over D of h_t * dy_t          db_t = sum over D of g_t * u_t
    dh = E_t * g_t               du_t = sum over N of b_t * g_t           q_t = dh * h_{t-1}
    dx_t = dt_t du_t             d dt_t = x_t du_t + sum over N of A * q_t             dA = sum over t of dt_t q_t

where sums over D are made block by block of channels, then over blocks, and that for A over rows, by XLA. A document
starts with a step so long that nothing is left: in E_t alone dt_t is LONGEST there, and A kept within RATES, which
changes no other decay. A of -inf works for the same reason. Arithmetic is float32, whatever the inputs are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.chunks import CHUNK, PARAMS, check_shapes, documents_of, turned, whole_chunks

LANES, ROWS = 128, 8  # of a register; channels and states are filled up to them
WIDTHS = (512, 256, 128)  # channels of a block, the first that divides them and keeps its states in STATES
STATES = 4 * 2**20  # bytes for the states of all steps of a chunk in the backward kernel
ROOM = 12 * 2**20  # bytes that a kernel may hold, of the 16 MiB it has by default
RATES = (-1e30, -1e-30)
LONGEST = 1e38


def reference(
    x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, state: jax.Array, segment: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The recurrence a token at a time, in the type of the state."""
    before = jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]
    x, dt, a, b, c, kept = (y.astype(state.dtype) for y in (x, dt, a, b, c, segment == before))

    def body(state: jax.Array, step: Any) -> Any:
        x, dt, b, c, kept = step
        decay = kept[:, None, None] * jnp.exp(dt[..., None] * a[None])
        state = decay * state + (dt * x)[..., None] * b[:, None]
        return state, jnp.einsum("bdn,bn->bd", state, c)

    state, y = jax.lax.scan(body, state, [jnp.swapaxes(part, 0, 1) for part in (x, dt, b, c, kept)])
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
    size += -size % ROWS
    width = _width(channels, size, chunk)
    item, block, state = jnp.dtype(dtype).itemsize, chunk * width, 4 * size * width
    columns, documents = 4 * size * chunk, 4 * ROWS * chunk
    shared = 2 * documents + 3 * 4 * chunk * chunk  # documents as a column, in all columns
    forward = 2 * (3 * block * item + 2 * columns + 4 * state) + 4 * 3 * block + 3 * state + 2 * columns
    backward = 2 * (5 * block * item + 4 * columns + 5 * state) + 4 * 5 * block + chunk * state + 8 * state
    return {"forward": forward + shared, "backward": backward + 4 * columns + shared}


def _width(channels: int, size: int, chunk: int) -> int:
    channels += -channels % LANES
    return next((w for w in WIDTHS if channels % w == 0 and 4 * chunk * size * w <= STATES), WIDTHS[-1])


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
    large = f"states of {size} in chunks of {chunk} take {held} bytes of VMEM, more than {ROOM}"
    check_shapes(f"selective_scan with x {x.shape}", shapes, [large] if held > ROOM else [])


class _Blocks:
    """Block shapes and index maps over the grid (row, block of channels, chunk); `backward`: from the last chunk."""

    def __init__(self, x: jax.Array, a: jax.Array, chunk: int, *, backward: bool = False):
        self.batch, self.length, self.channels = x.shape
        self.chunks, self.size, self.chunk = self.length // chunk, a.shape[0], chunk
        self.width = width = _width(self.channels, self.size, chunk)
        last = self.chunks - 1
        at = (lambda n: last - n) if backward else (lambda n: n)
        self.steps = pl.BlockSpec((None, chunk, width), lambda b, d, n: (b, at(n), d))
        self.columns = pl.BlockSpec((None, self.size, chunk), lambda b, d, n: (b, 0, at(n)))
        self.rates = pl.BlockSpec((self.size, width), lambda b, d, n: (0, d))
        self.documents = pl.BlockSpec((None, 1, chunk), lambda b, d, n: (b, 0, at(n)))
        self.state = pl.BlockSpec((None, self.size, width), lambda b, d, n: (b, 0, d))
        self.states = pl.BlockSpec((None, None, self.size, width), lambda b, d, n: (b, at(n), 0, d))
        self.sums = pl.BlockSpec((None, None, self.size, chunk), lambda b, d, n: (b, d, 0, at(n)))

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.channels // self.width, self.chunks

    def shape(self, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct((self.batch, *sizes), jnp.float32)

    def call(self, kernel: Any, name: str, inputs: list[Any], outputs: list[Any], scratch: Any, interpret: Any) -> Any:
        """`scratch`: the shapes of what is kept beside a state."""
        return pl.pallas_call(
            kernel,
            grid=self.grid,
            in_specs=inputs,
            out_specs=[spec for spec, _ in outputs],
            out_shape=[shape for _, shape in outputs],
            scratch_shapes=[pltpu.VMEM(sizes, jnp.float32) for sizes in ((self.size, self.width), *scratch)],
            compiler_params=PARAMS,
            interpret=interpret,
            name=name,
        )


def _laid(x: Any, dt: Any, a: Any, b: Any, c: Any, chunk: int) -> tuple[Any, ...]:
    """x, dt [B, T, D], a [N, D], b, c [B, N, T] in whole chunks and registers."""
    x, dt = whole_chunks(chunk, *whole_chunks(LANES, x, dt, axis=2), axis=1)
    b, c = (jnp.swapaxes(y, 1, 2) for y in whole_chunks(chunk, *whole_chunks(ROWS, b, c, axis=2), axis=1))
    return x, dt, _state_laid(a), b, c


def _state_laid(state: Any) -> Any:
    """[..., D, N] as float32 [..., N, D] in whole registers."""
    state = jnp.swapaxes(state, -1, -2).astype(jnp.float32)
    axis = state.ndim - 1
    return whole_chunks(LANES, *whole_chunks(ROWS, state, axis=axis - 1), axis=axis)[0]


def _run(
    x: Any, dt: Any, a: Any, b: Any, c: Any, state: Any, segment: Any, chunk: int, save: bool, interpret: Any
) -> tuple[Any, ...]:
    """y, the state after it, and where they are kept the states before the chunks [B, T / chunk, N, D]."""
    _check(x, dt, a, b, c, state, segment, chunk)
    _, length, channels = x.shape
    size = a.shape[1]
    x, dt, a, b, c = _laid(x, dt, a, b, c, chunk)
    blocks = _Blocks(x, a, chunk)
    inputs = [blocks.steps, blocks.steps, blocks.rates, blocks.columns, blocks.columns, blocks.documents, blocks.state]
    outputs = [(blocks.steps, jax.ShapeDtypeStruct(x.shape, x.dtype))]
    outputs += [(blocks.state, blocks.shape(blocks.size, blocks.channels))]
    outputs += [(blocks.states, blocks.shape(blocks.chunks, blocks.size, blocks.channels))] * save
    scratch = [(chunk, blocks.width)] * 3
    launch = blocks.call(_forward_kernel, "selective_scan_forward", inputs, outputs, scratch, interpret)
    y, after, *states = launch(x, dt, a, b, c, documents_of(segment, chunk), _state_laid(state))
    return y[:, :length, :channels], jnp.swapaxes(after[:, :size, :channels], 1, 2), *states


def _forward(
    x: Any, dt: Any, a: Any, b: Any, c: Any, state: Any, segment: Any, chunk: int, save: bool, interpret: Any
) -> Any:
    y, after, *states = _run(x, dt, a, b, c, state, segment, chunk, save, interpret)
    return (y, after), (x, dt, a, b, c, state, segment, states[0] if save else None)


def _rates(a: Any) -> Any:
    return jnp.clip(a, *RATES)


def _spans(dt: Any, documents: Any) -> Any:
    """dt [L, W], and LONGEST at a document's start."""
    column = turned(documents)[:, :1]
    first = jax.lax.broadcasted_iota(jnp.int32, column.shape, 0) == 0
    before = jnp.where(first, 0, pltpu.roll(column, 1, 0))
    return jnp.where(jnp.broadcast_to(column == before, dt.shape), dt, LONGEST)


def _tile(group: Any) -> Any:
    """The rows of a group of eight steps."""
    return pl.ds(pl.multiple_of(ROWS * group, ROWS), ROWS)


def _folded(x: Any) -> Any:
    """[N, W] summed up to the rows of one register."""
    return sum(x[at : at + ROWS] for at in range(ROWS, x.shape[0], ROWS)) + x[:ROWS]


def _rows(parts: Sequence[Any]) -> Any:
    """Eight [8, W] as one: row i is the sum over the rows of part i.

    In three levels, each of which adds neighbours of two parts and puts them into the rows of one: half the work of
    eight sums.
    """
    row, step = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 0), 1
    while step < ROWS:
        own = row & step == 0
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [jnp.where(own, x, y) + pltpu.roll(jnp.where(own, y, x), step, 0) for x, y in pairs]
        step *= 2
    return parts[0]


def _forward_kernel(*refs: Any) -> None:
    x, dt, a, b, c, documents, first, out, last, *states, held, spans, drives, result = refs

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        held[...] = first[...]

    for before in states:
        before[...] = held[...]
    steps, length = dt[...].astype(jnp.float32), dt.shape[0]
    spans[...] = _spans(steps, documents[...])
    drives[...] = steps * x[...].astype(jnp.float32)
    rates = _rates(a[...])

    def group(i: Any, carry: Any) -> Any:
        state, b, c = carry  # columns of these steps come first
        span, drive, parts = spans[_tile(i)], drives[_tile(i)], []
        for j in range(ROWS):
            state = jnp.exp(rates * span[j : j + 1]) * state + b[:, j : j + 1] * drive[j : j + 1]
            parts.append(_folded(c[:, j : j + 1] * state))
        result[_tile(i)] = _rows(parts)
        return state, *(pltpu.roll(y, length - ROWS, 1) for y in (b, c))

    carry = (held[...], b[...].astype(jnp.float32), c[...].astype(jnp.float32))
    state, *_ = jax.lax.fori_loop(0, length // ROWS, group, carry)
    out[...] = result[...].astype(out.dtype)
    held[...] = state
    last[...] = state


def _backward(chunk: int, save: bool, interpret: Any, residuals: Any, gradients: Any) -> Any:
    *given, state, segment, states = residuals
    d_out, d_last = gradients
    length, channels = given[0].shape[1:]
    size = state.shape[2]
    if states is None:
        states = _run(*given, state, segment, chunk, True, interpret)[2]
    x, dt, a, b, c = _laid(*given, chunk)
    (d_out,) = whole_chunks(chunk, *whole_chunks(LANES, d_out, axis=2), axis=1)
    blocks = _Blocks(x, a, chunk, backward=True)
    inputs = [blocks.steps, blocks.steps, blocks.rates, blocks.columns, blocks.columns, blocks.documents]
    inputs += [blocks.states, blocks.steps, blocks.state]
    whole = (blocks.state, blocks.shape(blocks.size, blocks.channels))
    sums = (blocks.sums, blocks.shape(blocks.grid[1], blocks.size, blocks.length))
    outputs = [*((blocks.steps, jax.ShapeDtypeStruct(y.shape, y.dtype)) for y in (x, dt)), whole, sums, sums, whole]
    scratch = [(chunk, blocks.size, blocks.width), *[(chunk, blocks.width)] * 5]
    launch = blocks.call(_backward_kernel, "selective_scan_backward", inputs, outputs, scratch, interpret)
    found = launch(x, dt, a, b, c, documents_of(segment, chunk), states, d_out, _state_laid(d_last))
    dx, ddt, da, db, dc, d_state = found
    turn = lambda x, sizes: jnp.swapaxes(x, -1, -2)[..., : sizes[0], : sizes[1]]
    return (
        dx[:, :length, :channels],
        ddt[:, :length, :channels],
        turn(jnp.sum(da, axis=0), (channels, size)).astype(given[2].dtype),
        *(turn(jnp.sum(y, axis=1), (length, size)).astype(given[3 + i].dtype) for i, y in enumerate((db, dc))),
        turn(d_state, (channels, size)).astype(state.dtype),
        None,
    )


def _backward_kernel(*refs: Any) -> None:
    x, dt, a, b, c, documents, before, d_out, d_last, *rest = refs
    dx, ddt, da, db, dc, d_first, held, states, spans, drives, d_outs, d_drives, d_spans = rest

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        held[...] = d_last[...]
        da[...] = jnp.zeros_like(da)

    steps, length = dt[...].astype(jnp.float32), dt.shape[0]
    spans[...] = _spans(steps, documents[...])
    drives[...] = steps * x[...].astype(jnp.float32)
    d_outs[...] = d_out[...].astype(jnp.float32)
    rates, groups = _rates(a[...]), length // ROWS

    def again(i: Any, carry: Any) -> Any:
        state, b = carry
        span, drive = spans[_tile(i)], drives[_tile(i)]
        for j in range(ROWS):
            states[ROWS * i + j] = state
            state = jnp.exp(rates * span[j : j + 1]) * state + b[:, j : j + 1] * drive[j : j + 1]
        return state, pltpu.roll(b, length - ROWS, 1)

    wide_b, wide_c = b[...].astype(jnp.float32), c[...].astype(jnp.float32)
    state, _ = jax.lax.fori_loop(0, groups, again, (before[...], wide_b))
    lane = jax.lax.broadcasted_iota(jnp.int32, wide_b.shape, 1)

    def group(i: Any, carry: Any) -> Any:
        i = groups - 1 - i
        after, state, of_rates, b, c, of_b, of_c = carry  # columns of these steps come last
        span, drive, d_out = (ref[_tile(i)] for ref in (spans, drives, d_outs))
        of_drive, of_span = [], []
        for j in reversed(range(ROWS)):
            at, own = length - ROWS + j, lane == ROWS * i + j
            gradient = after + c[:, at : at + 1] * d_out[j : j + 1]
            of_c = jnp.where(own, jnp.sum(state * d_out[j : j + 1], axis=1, keepdims=True), of_c)
            of_b = jnp.where(own, jnp.sum(gradient * drive[j : j + 1], axis=1, keepdims=True), of_b)
            of_drive.append(_folded(b[:, at : at + 1] * gradient))
            state = states[ROWS * i + j]
            after = jnp.exp(rates * span[j : j + 1]) * gradient
            of_decay = after * state
            of_span.append(_folded(rates * of_decay))
            of_rates = of_rates + span[j : j + 1] * of_decay  # LONGEST meets a decay of 0 alone
        d_drives[_tile(i)] = _rows(of_drive[::-1])
        d_spans[_tile(i)] = _rows(of_span[::-1])
        return after, state, of_rates, *(pltpu.roll(y, ROWS, 1) for y in (b, c)), of_b, of_c

    carry = (held[...], state, da[...], wide_b, wide_c, jnp.zeros_like(wide_b), jnp.zeros_like(wide_c))
    after, _, of_rates, _, _, of_b, of_c = jax.lax.fori_loop(0, groups, group, carry)
    dx[...] = (d_drives[...] * steps).astype(dx.dtype)
    ddt[...] = (d_drives[...] * x[...].astype(jnp.float32) + d_spans[...]).astype(ddt.dtype)
    da[...] = of_rates
    db[...] = of_b
    dc[...] = of_c
    held[...] = after
    d_first[...] = after


selective_scan.defvjp(_forward, _backward)
