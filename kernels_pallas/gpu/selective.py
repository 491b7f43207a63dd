"""`selective_scan` on Hopper GPUs: h_t = exp(dt_t A) h_{t-1} + dt_t x_t b_t^T, y_t = h_t c_t (2312.00752).

A lane owns a channel with all N entries of its state, which are gone through one after the other: entry n of the state
through the steps of a tile, with u_t = dt_t x_t, E_t = exp(dt_t A_n), or 0 at a document's start, and b_t, c_t scalars:

    h_t = E_t h_{t-1} + b_t u_t                     y_t += c_t h_t

Backward, h of the tile's steps again from the state before the tile, then from the last step to the first, where dy_t
is the gradient of the output and f that of the state after t:

    g = f + c_t dy_t              f <- E_t g              q = f h_{t-1}
    du_t += b_t g                 s_t += A_n q            dA_n += dt_t q
    db_t = sum over D of g u_t                            dc_t = sum over D of dy_t h_t

and dx_t = dt_t du_t, d dt_t = x_t du_t + s_t. Sums over D are taken over the 128 channels of a block, by way of shared
memory, for two entries at a time, and over the blocks afterwards. So E_t is taken once each way, which is what the time
goes to: N exponentials for each entry of x. Arithmetic is float32, whatever comes in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.chunks import check_shapes
from kernels_pallas.gpu.common import SHARED
from kernels_pallas.gpu.elementwise import (
    LANES,
    MARKS,
    Part,
    going_on,
    of_steps,
    of_tile,
    ring,
    scan_tiles,
    shape_of,
    whole_channels,
)

STEPS = 16  # of a tile
ENTRIES = 8  # of a state are padded to a multiple of it
ROWS = 4 * STEPS  # of products to sum over the lanes: of b and of c, for two entries of a state
SUMS = 2048  # bytes of shared memory that a sum over lanes is given by the compiler
PITCH = LANES + 8  # float32s from row to row, so that eight rows that are read at a time lie in other banks

Found = tuple[list[Any], list[Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    state: jax.Array,
    segment: jax.Array,
    save_states: bool = False,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`(y [B, T, D], state [B, D, N])` of x and dt [B, T, D], a [D, N], b and c [B, T, N] and a state [B, D, N].

    dt is at least 0, a at most 0 and finite. `segment` [B, T] int32 counts the documents of a row: `state` goes on
    where it is 0, and every change starts from zeros. Inputs are bfloat16 or float32, y has the type of x, the state is
    float32. `save_states`: a training step keeps the states before the tiles (N / 16 of the entries of x, in float32),
    instead of running the forward kernel once more. `interpret`: parameters of interpret mode for GPUs. Raises
    ValueError on shapes that do not fit, and on states too large for shared memory (from 40 entries on in float32).
    """
    found, last = _run(x, dt, a, b, c, state, segment, interpret, keep=False)
    return _given(found[0], x), _entries(last, a)


def shared_bytes(length: int, size: int, dtype: Any = jnp.float32) -> dict[str, int]:
    """Shared memory that a block of each kernel takes; `inference` is the forward one that keeps no states."""
    size += -size % ENTRIES
    stream, kept = (of_steps(STEPS), dtype), (of_tile(size), jnp.float32)
    small = [(_columns(size), jnp.float32), (MARKS, jnp.int32)]
    own = lambda parts, rows: ring([*parts, *small], -(-length // STEPS), rows)[1]
    sums = (of_tile(size // 4), jnp.float32)
    return {
        "inference": own([stream] * 3, [size, size]),
        "forward": own([*[stream] * 3, kept], [size, size]),
        "backward": own([*[stream] * 5, kept, sums], [2 * size, size, ROWS * PITCH // LANES]) + SUMS,
    }


def _columns(size: int) -> Part:
    """Of [B, tiles, 2 N, steps], of b and c."""
    return Part((2 * size, STEPS), lambda row, tile, lanes: (row, tile))


def _stream(x: jax.Array) -> tuple[jax.Array, Part]:
    return whole_channels(x), of_steps(STEPS)


def _given(x: jax.Array, like: jax.Array) -> jax.Array:
    """Without the channels that were added."""
    return x[..., : like.shape[-1]].astype(like.dtype)


def _vectors(state: jax.Array) -> jax.Array:
    """[..., D, N] as vectors of channels, [..., N, D], both padded with zeros."""
    return whole_channels(jnp.swapaxes(whole_channels(state.astype(jnp.float32), ENTRIES), -1, -2), LANES)


def _entries(vectors: jax.Array, a: jax.Array) -> jax.Array:
    """Vectors of channels as [..., D, N], without what was added."""
    return jnp.swapaxes(vectors, -1, -2)[..., : a.shape[0], : a.shape[1]]


def _prepared(a: Any, b: Any, c: Any, segment: Any) -> tuple[Any, Any, Any]:
    """Rates of exp2 as vectors, b and c of every tile [B, tiles, 2 N, steps], marks of documents."""
    marks = going_on(segment, STEPS)

    def tiles(x: jax.Array) -> jax.Array:
        x = whole_channels(x.astype(jnp.float32), ENTRIES)
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % STEPS), (0, 0)))
        return jnp.swapaxes(x.reshape(x.shape[0], -1, STEPS, x.shape[2]), 2, 3)

    return _vectors(a) * math.log2(math.e), jnp.concatenate([tiles(b), tiles(c)], axis=2), marks


def _check(x: Any, dt: Any, a: Any, b: Any, c: Any, state: Any, segment: Any) -> None:
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
    held = max(shared_bytes(length, size, x.dtype).values())
    large = f"states of {size} entries take {held} bytes of shared memory, more than {SHARED}"
    check_shapes(f"selective_scan with x {x.shape}", shapes, [large] if held > SHARED else [])


def _run(x: Any, dt: Any, a: Any, b: Any, c: Any, state: Any, segment: Any, interpret: Any, *, keep: bool) -> Any:
    """The outputs, with `keep` the states before the tiles, and the last state."""
    _check(x, dt, a, b, c, state, segment)
    rates, columns, marks = _prepared(a, b, c, segment)
    first = _vectors(state)
    size = first.shape[1]
    kept = [(shape_of((first.shape[0], marks.shape[1], *first.shape[1:])), of_tile(size))]
    return scan_tiles(
        functools.partial(_forward_tile, size),
        first,
        rates,
        reads=[_stream(x), _stream(dt), (columns, _columns(size)), (marks, MARKS)],
        writes=[_stream(x), *(kept if keep else [])],
        interpret=interpret,
        name="selective_scan_forward",
    )


def _forward(
    x: Any, dt: Any, a: Any, b: Any, c: Any, state: Any, segment: Any, save_states: bool, interpret: Any
) -> Any:
    found, last = _run(x, dt, a, b, c, state, segment, interpret, keep=save_states)
    return (_given(found[0], x), _entries(last, a)), (x, dt, a, b, c, state, segment, found[1:])


def _forward_tile(size: int, read: Sequence[Any], written: Sequence[Any], carry: Any, rates: Any) -> None:
    x, dt, columns, marks = read
    out, kept = written[0], written[1:]
    steps, drives, on = _steps(x, dt, marks)

    def entry(n: Any, y: list[Any]) -> list[Any]:
        state, rate = carry[n], rates[n]
        for ref in kept:
            ref[n] = state
        decays = [jnp.exp2(steps[i] * rate) for i in range(STEPS)]
        for i in range(STEPS):
            state = _kept(on[i], decays[i] * state) + columns[n, i] * drives[i]
            y[i] = y[i] + columns[size + n, i] * state
        carry[n] = state
        return y

    for i, y in enumerate(jax.lax.fori_loop(0, size, entry, _zeros(STEPS))):
        out[i] = y.astype(out.dtype)


def _backward(save_states: bool, interpret: Any, residuals: Any, gradients: Any) -> Any:
    x, dt, a, b, c, state, segment, states = residuals
    d_out, d_last = gradients
    if not save_states:
        states = _run(x, dt, a, b, c, state, segment, interpret, keep=True)[0][1:]
    rates, columns, marks = _prepared(a, b, c, segment)
    last = _vectors(d_last)
    batch, size, channels = last.shape
    sums = shape_of((batch, marks.shape[1], size // 4, channels))
    streams = [_stream(x), _stream(dt)]
    (d_x, d_dt, sums), carry = scan_tiles(
        functools.partial(_backward_tile, size),
        jnp.concatenate([last, jnp.zeros_like(last)], axis=1),
        rates,
        reads=[*streams, _stream(d_out), (states[0], of_tile(size)), (columns, _columns(size)), (marks, MARKS)],
        writes=[*streams, (sums, of_tile(size // 4))],
        scratch=[(ROWS, PITCH)],
        backward=True,
        interpret=interpret,
        name="selective_scan_backward",
    )
    sums = jnp.sum(sums.reshape(*sums.shape[:3], -1, 2, 2, 2, STEPS), axis=3)  # [B, tiles, N / 4, 2, 2, b or c, steps]
    sums = jnp.moveaxis(sums, (5, 6), (0, 3)).reshape(2, batch, -1, size)[:, :, : x.shape[1], : a.shape[1]]
    d_a = _entries(jnp.sum(carry[:, size:], axis=0), a)
    return (
        _given(d_x, x),
        _given(d_dt, dt),
        d_a.astype(a.dtype),
        sums[0].astype(b.dtype),
        sums[1].astype(c.dtype),
        _entries(carry[:, :size], a).astype(state.dtype),
        None,
    )


def _backward_tile(
    size: int, read: Sequence[Any], written: Sequence[Any], carry: Any, rates: Any, products: Any
) -> None:
    x, dt, d_out, kept, columns, marks = read
    d_x, d_dt, sums = written
    steps, drives, on = _steps(x, dt, marks)
    of_out = [d_out[i].astype(jnp.float32) for i in range(STEPS)]

    def entry(n: Any, row: Any, of_drives: list[Any], of_steps: list[Any]) -> Found:
        rate, flowing, of_rate = rates[n], carry[n], carry[size + n]
        decays = [jnp.exp2(steps[i] * rate) for i in range(STEPS)]
        states = [kept[n]]
        for i in range(STEPS):
            states.append(_kept(on[i], decays[i] * states[i]) + columns[n, i] * drives[i])
        for i in reversed(range(STEPS)):
            gradient = flowing + columns[size + n, i] * of_out[i]
            products[row + i, pl.ds(0, LANES)] = gradient * drives[i]
            products[row + STEPS + i, pl.ds(0, LANES)] = of_out[i] * states[i + 1]
            flowing = _kept(on[i], decays[i] * gradient)
            of_exponent = _kept(on[i], flowing * states[i])
            of_drives[i] = of_drives[i] + columns[n, i] * gradient
            of_steps[i] = of_steps[i] + rate * of_exponent
            of_rate = of_rate + steps[i] * of_exponent
        carry[n] = flowing
        carry[size + n] = of_rate
        return of_drives, of_steps

    def pair(n: Any, found: Found) -> Found:
        found = jax.lax.fori_loop(0, 2, lambda half, x: entry(2 * n + half, half * 2 * STEPS, *x), found)
        plgpu.commit_smem()  # all lanes have written their products
        table = plgpu.layout_cast(products[:, pl.ds(0, LANES)], plgpu.Layout.WGMMA)
        sums[n // 2, pl.ds(jax.lax.rem(n, 2) * ROWS, ROWS)] = jnp.sum(table, axis=1)
        plgpu.commit_smem()  # and read those of others
        return found

    of_drives, of_steps = jax.lax.fori_loop(0, size // 2, pair, (_zeros(STEPS), _zeros(STEPS)))
    for i in range(STEPS):
        d_x[i] = (steps[i] * of_drives[i]).astype(d_x.dtype)
        d_dt[i] = (x[i].astype(jnp.float32) * of_drives[i] + math.log(2) * of_steps[i]).astype(d_dt.dtype)


def _steps(x: Any, dt: Any, marks: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """dt, dt x, and whether the document of the step before goes on, of every step of a tile."""
    steps = [dt[i].astype(jnp.float32) for i in range(STEPS)]
    drives = [steps[i] * x[i].astype(jnp.float32) for i in range(STEPS)]
    return steps, drives, [jnp.broadcast_to(marks[i], (LANES,)) == 1 for i in range(STEPS)]


def _kept(on: Any, x: Any) -> Any:
    """What goes from a step to the next one, or back: nothing over a document's start, be it infinite."""
    return jnp.where(on, x, 0)


def _zeros(count: int) -> list[Any]:
    layout = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
    return [plgpu.layout_cast(jnp.zeros((LANES,), jnp.float32), layout) for _ in range(count)]


selective_scan.defvjp(_forward, _backward)
