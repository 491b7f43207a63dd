"""`linear_scan` on Hopper GPUs: h_t = exp(g_t) h_{t-1} + x_t, element by element, real or complex.

Forward, a step at a time for the channel that a lane owns, where a_t is exp(g_t), or 0 at a document's start:

    h_t = a_t h_{t-1} + x_t

Backward, from the last step to the first, where dh_t is the gradient of the output, and f that of the state after t:

    dx_t = dh_t + f              f <- a_t dx_t              dg_t = f h_{t-1}

The states before each tile of steps are kept for gradients, in float32, and h is computed again from them tile by tile:
a bfloat16 output has too few of its digits. A tile's steps are unrolled, with its decays and its states in registers.
That is one pass over the inputs each way. Complex numbers are two planes, (real, imaginary).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

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
from kernels_pallas.linear import check
from kernels_pallas.planes import Planes, exp, joined, pick, planes_of, plus, times, wide

STEPS = 16  # of a tile; of complex numbers half as many


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_scan(
    log_decay: jax.Array, drive: jax.Array, state: jax.Array, segment: jax.Array, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """`(h [B, T, D], state [B, D])` of log_decay and drive [B, T, D] and a state [B, D]: all real, or all complex.

    Arguments and results are those of `kernels_pallas.linear.linear_scan`, whose `reference` is this one's too.
    `interpret`: parameters of interpret mode for GPUs. Raises ValueError on shapes and types that do not fit.
    """
    return _forward(log_decay, drive, state, segment, interpret, keep=False)[0]


def shared_bytes(length: int, *, planes: int = 1, dtype: Any = jnp.float32) -> dict[str, int]:
    """Shared memory that a block of each kernel takes; `inference` is the forward one that keeps no states."""
    steps = STEPS // planes
    tiles = -(-length // steps)
    item = dtype if planes == 1 else jnp.float32
    stream, kept, marks = (of_steps(steps), item), (of_tile(planes), jnp.float32), (MARKS, jnp.int32)
    own = lambda arrays, *small: ring([*[stream] * (arrays * planes), *small], tiles, [planes])[1]
    return {"inference": own(3, marks), "forward": own(3, kept, marks), "backward": own(5, kept, marks)}


def _streams(steps: int, *arrays: jax.Array) -> list[tuple[jax.Array, Part]]:
    """The planes of arrays [B, T, D], a tile of steps at a time."""
    return [(whole_channels(plane), of_steps(steps)) for x in arrays for plane in planes_of(x)]


def _vectors(state: jax.Array) -> jax.Array:
    """Planes of a state [B, D] as vectors, [B, planes, D]."""
    return whole_channels(jnp.stack(planes_of(state), axis=1).astype(jnp.float32), LANES)


def _numbers(planes: Sequence[jax.Array], like: jax.Array, dtype: Any = None) -> jax.Array:
    """Planes as numbers, without what was added to their last axis."""
    return joined(tuple(x[..., : like.shape[-1]] for x in planes), dtype or like.dtype)


def _forward(log_decay: Any, drive: Any, state: Any, segment: Any, interpret: Any, *, keep: bool = True) -> Any:
    check(log_decay, drive, state, segment)
    first = _vectors(state)
    planes = first.shape[1]
    steps = STEPS // planes
    marks = going_on(segment, steps)
    drives = _streams(steps, drive)
    kept = shape_of((first.shape[0], marks.shape[1], *first.shape[1:]))
    found, last = scan_tiles(
        functools.partial(_forward_tile, planes, steps),
        first,
        reads=[*_streams(steps, log_decay), *drives, (marks, MARKS)],
        writes=[*drives, *([(kept, of_tile(planes))] if keep else [])],
        interpret=interpret,
        name="linear_scan_forward",
    )
    out = _numbers(found[:planes], drive)
    after = _numbers([last[:, i] for i in range(planes)], drive, jnp.complex64 if planes == 2 else jnp.float32)
    return (out, after), (log_decay, drive, state, segment, found[planes:])


def _forward_tile(planes: int, steps: int, read: Sequence[Any], written: Sequence[Any], carry: Any) -> None:
    logs, drives, marks = read[:planes], read[planes : 2 * planes], read[-1]
    out, kept = written[:planes], written[planes:]
    state = _vectors_of(carry, planes)
    for ref in kept:
        _keep(ref, state)
    decays = [exp(_at(logs, i)) for i in range(steps)]
    inputs = [_at(drives, i) for i in range(steps)]
    for i in range(steps):
        state = plus(_kept(marks, i, times(decays[i], state)), inputs[i])
        _put(out, i, state)
    _keep(carry, state)


def _backward(interpret: Any, residuals: Any, gradients: Any) -> Any:
    log_decay, drive, state, segment, states = residuals
    d_out, d_last = gradients
    last = _vectors(d_last)
    planes = last.shape[1]
    steps = STEPS // planes
    marks = going_on(segment, steps)
    logs, drives = _streams(steps, log_decay), _streams(steps, drive)
    found, first = scan_tiles(
        functools.partial(_backward_tile, planes, steps),
        last,
        reads=[*logs, *drives, *_streams(steps, d_out), (states[0], of_tile(planes)), (marks, MARKS)],
        writes=[*logs, *drives],
        backward=True,
        interpret=interpret,
        name="linear_scan_backward",
    )
    d_state = _numbers([first[:, i] for i in range(planes)], state)
    return _numbers(found[:planes], log_decay), _numbers(found[planes:], drive), d_state, None


def _backward_tile(planes: int, steps: int, read: Sequence[Any], written: Sequence[Any], carry: Any) -> None:
    logs, drives, d_out = (read[i * planes : (i + 1) * planes] for i in range(3))
    kept, marks = read[-2:]
    d_log, d_drive = written[:planes], written[planes:]
    decays = [exp(_at(logs, i)) for i in range(steps)]
    before = [_vectors_of(kept, planes)]  # the states before each step
    for i in range(steps - 1):
        before.append(plus(_kept(marks, i, times(decays[i], before[i])), _at(drives, i)))
    flowing = _vectors_of(carry, planes)
    for i in reversed(range(steps)):
        gradient = plus(_at(d_out, i), flowing)
        flowing = _kept(marks, i, times(decays[i], gradient))
        _put(d_drive, i, gradient)
        _put(d_log, i, _kept(marks, i, times(flowing, before[i])))
    _keep(carry, flowing)


def _kept(marks: Any, step: int, planes: Planes) -> Planes:
    """What goes from a step to the next one, or back: nothing over a document's start, be it infinite."""
    return pick(jnp.broadcast_to(marks[step], (LANES,)) == 1, planes, 0.0)


def _vectors_of(ref: Any, planes: int) -> Planes:
    return tuple(ref[i] for i in range(planes))


def _keep(ref: Any, planes: Planes) -> None:
    for i, plane in enumerate(planes):
        ref[i] = plane


def _at(refs: Sequence[Any], step: int) -> Planes:
    return wide(tuple(ref[step] for ref in refs))


def _put(refs: Sequence[Any], step: Any, planes: Planes) -> None:
    for ref, plane in zip(refs, planes, strict=True):
        ref[step] = plane.astype(ref.dtype)


linear_scan.defvjp(_forward, _backward)
