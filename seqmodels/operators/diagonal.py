"""The diagonal recurrence h' = a * h + b, element by element, real or complex, time-varying or fixed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from seqmodels import compat
from seqmodels.operators import kernels
from seqmodels.operators.diagonal_loop import diagonal_loop
from seqmodels.operators.family import run_family
from seqmodels.scan import Recurrence
from seqmodels.scan.auto import choose
from seqmodels.typing import Segments


class Diagonal(NamedTuple):
    """One step's inputs: `log_decay` [D] or [] (natural log of a) and `drive` [D] (b).

    With a fixed `rate`, `log_decay` holds elapsed time instead: the step decays by `exp(rate * elapsed)`.
    """

    log_decay: Inexact[Array, "*D"]
    drive: Inexact[Array, "D"]


def diagonal_recurrence(rate: Inexact[Array, "D"] | None = None) -> Recurrence:
    """h_t = exp(log_decay_t) h_{t-1} + drive_t, read as h_t; or, with `rate`, exp(rate * elapsed_t) h_{t-1} + drive_t.

    Elements are (log decay, or elapsed time; drive). Decays have a real part <= 0. Exponents are sums of such, never
    differences, so that every decay down to log 0 = -inf is exact to rounding.
    """

    def decay(log_decay: Array) -> Array:
        if rate is None:
            return jnp.exp(log_decay)
        return jnp.exp(_over_time(log_decay, rate))

    def combine(earlier: Diagonal, later: Diagonal) -> Diagonal:
        drive = decay(later.log_decay) * earlier.drive + later.drive
        return Diagonal(earlier.log_decay + later.log_decay, drive)

    def fold(inputs: Diagonal, reset: Bool[Array, "C"]) -> Diagonal:
        kept = since_last_reset(reset)
        log_decay = jnp.where(_over(kept, inputs.log_decay), inputs.log_decay, 0)
        weight = jax.vmap(decay)(after_each(log_decay))
        drive = jnp.sum(jnp.where(kept[:, None], _over(weight, inputs.drive) * inputs.drive, 0), axis=0)
        return Diagonal(jnp.sum(log_decay, axis=0), drive)

    def emit(inputs: Diagonal, state: Array, reset: Bool[Array, "C"]) -> Array:
        log_decay, hidden, stop = inputs.log_decay, inputs.drive, reset
        shift = 1
        while shift < reset.shape[0]:  # h_t holds the drives of the last `shift` steps, and doubles its reach
            reach = _over(jax.vmap(decay)(log_decay), hidden) * _delay(hidden, shift)
            hidden = hidden + jnp.where(stop[:, None], 0, reach)
            log_decay = log_decay + jnp.where(_over(stop, log_decay), 0, _delay(log_decay, shift))
            stop = stop | _delay(stop, shift)
            shift *= 2
        carried = _over(jax.vmap(decay)(log_decay), hidden) * state[None]
        return hidden + jnp.where(stop[:, None], 0, carried)

    kind = jnp.float32 if rate is None else rate.dtype
    return Recurrence(
        elements=lambda x: x,
        combine=combine,
        identity=lambda e: Diagonal(jnp.zeros_like(e.log_decay), jnp.zeros_like(e.drive)),
        act=lambda e, s: decay(e.log_decay) * s + e.drive,
        initial=lambda x: jnp.zeros(x.drive.shape, jnp.result_type(x.drive, x.log_decay, kind)),
        neutral=lambda x: Diagonal(jnp.zeros_like(x.log_decay), jnp.zeros_like(x.drive)),
        fold=fold,
        emit=emit,
    )


def diagonal_scan(
    log_decay: Inexact[Array, "B T D"] | Inexact[Array, "D"],
    drive: Inexact[Array, "B T D"],
    state: Inexact[Array, "B D"] | None = None,
    *,
    elapsed: Inexact[Array, "B T"] | None = None,
    segments: Segments | None = None,
    method: str = "auto",
    chunk: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    """h_t = exp(log_decay_t) h_{t-1} + drive_t over a batch: `(h [B, T, D], state [B, D])`, in at least float32.

    `log_decay` of `[D]` is fixed over time; `elapsed` [B, T] then scales it step by step (irregular samples; default
    1). Real parts must be <= 0. `segments` None: one document a row, which continues `state`. With `sequence_axis`,
    inside `shard_map`, T is this device's span. On CPUs `auto` takes steps that are given one by one in a loop with a
    gradient of its own, which forward-mode differentiation alone does not pass, nor does it pass `chunked` over long
    rows; `sequential` it does. Raises ValueError on shapes that do not fit.
    """
    fixed, length = log_decay.ndim == 1, drive.shape[1]
    decay = log_decay
    if drive.ndim != 3 or log_decay.shape not in (drive.shape, drive.shape[2:]) or (elapsed is not None and not fixed):
        raise ValueError(
            f"diagonal_scan takes drive [B, T, D] with log_decay [B, T, D], or [D] with elapsed [B, T] or None; "
            f"not drive {drive.shape}, log_decay {log_decay.shape}, elapsed {getattr(elapsed, 'shape', None)}"
        )
    if fixed:
        ones = jnp.ones(drive.shape[:2], jnp.promote_types(log_decay.real.dtype, jnp.float32))
        decay = ones if elapsed is None else elapsed
    sizes = (drive.shape[2],)
    where: Any = {"chunk": chunk, "sequence_axis": sequence_axis}

    def kernel() -> tuple[Array, Array]:
        of_steps = decay
        if fixed:
            time = decay if segments is None else jnp.where(segments.valid, decay, 0)  # padding may be NaN
            of_steps = _over_time(time[..., None], log_decay[None, None])
        return kernels.diagonal(of_steps, drive, state, segments=segments, **where)

    served = kernels.serve(method, "diagonal", kernel, drive, log_decay, sizes=sizes, **where)
    if served is not None:
        return served
    plain = method == "auto" and chunk is None and sequence_axis is None and not fixed and length > 4
    if plain and choose(matmul_form=True, length=length, family="diagonal") == "sequential":
        return _loop(decay, drive, state, segments)
    return run_family(
        "diagonal",
        diagonal_recurrence(log_decay if fixed else None),
        Diagonal(decay, drive),
        state,
        segments=segments,
        method=method,
        chunk=chunk,
        sequence_axis=sequence_axis,
    )


def _over_time(elapsed: Array, rate: Array) -> Array:
    """elapsed * rate, and nothing in no time: 0 * -inf is NaN."""
    return elapsed * jnp.where((elapsed == 0) & jnp.isinf(rate), 0, rate)


def _loop(log_decay: Array, drive: Array, state: Array | None, segments: Segments | None) -> tuple[Array, Array]:
    kind = jnp.result_type(log_decay, drive, jnp.float32, *(() if state is None else (state,)))
    shape = (drive.shape[0], drive.shape[2])
    state = jnp.zeros(shape, kind) if state is None else state.astype(kind)
    if state.shape != shape:
        raise ValueError(f"the state [B, D] of drive {drive.shape} is not {state.shape}")
    arrays = [log_decay.astype(kind), drive.astype(kind)]
    if segments is None:
        out = diagonal_loop(*compat.vary_alike((*arrays, state)), None)
        return out, out[:, -1]
    seen = lambda x: jnp.where(segments.valid[..., None], x, 0)  # padding may be NaN
    out = diagonal_loop(*compat.vary_alike((*map(seen, arrays), state)), segments.start)
    return seen(out), out[:, -1]


def since_last_reset(reset: Bool[Array, "C"]) -> Bool[Array, "C"]:
    """Which steps of a chunk come at or after its last reset; all of them where there is none."""
    later = jax.lax.cumsum(reset.astype(jnp.int32), reverse=True)
    return later - reset.astype(jnp.int32) == 0


def after_each(log_decay: Inexact[Array, "C ..."]) -> Inexact[Array, "C ..."]:
    """The decay from after each step to the chunk's end: a reversed, exclusive sum, without any subtraction."""
    return _delay(jax.lax.cumsum(log_decay[::-1]), 1)[::-1]


def sums_between(log_decay: Float[Array, "C"], *, inclusive: bool = True) -> Float[Array, "C C"]:
    """[i, j]: the sum of log_decay over j < s <= i, -inf above the diagonal; `inclusive` False: over j < s < i, j < i.

    By sums alone, since a difference of cumulative sums has no digits left beside a large decay and none at all beside
    -inf. In blocks of about sqrt(C) steps: of two steps in different blocks it is what leads to the end of the earlier
    one, the whole blocks between, and what leads from the start of the later one. So every entry is a few additions,
    all of them in one elementwise program.
    """
    length = log_decay.shape[0]
    size = math.isqrt(length - 1) + 1
    count = -(-length // size)
    blocks = jnp.pad(log_decay, (0, count * size - length)).reshape(count, size)

    def selected(terms: Array, chosen: Bool[Array, "..."]) -> Array:  # a product with zeros would turn -inf into NaN
        return jnp.sum(jnp.where(chosen, terms, 0), axis=-1)

    step, block = jnp.arange(size), jnp.arange(count)
    until, after = step[:, None] >= step[None], step[:, None] < step[None]  # [i, s], [j, s]
    reach, rest = (selected(blocks[:, None], chosen[None]) for chosen in (until, after))
    within = selected(blocks[:, None, None], (until[:, None] & after[None])[None])
    within = jnp.where(until[None], within, -jnp.inf)
    apart = (block[:, None, None] > block[None, None]) & (block[None, :, None] < block[None, None])  # q < m < p
    between = selected(jnp.sum(blocks, axis=1)[None, None], apart)
    across = reach[:, :, None, None] + between[:, None, :, None] + rest[None, None]  # [p, i, q, j]
    order = (block[:, None] - block[None])[:, None, :, None]
    sums = jnp.where(order == 0, within[:, :, None], jnp.where(order > 0, across, -jnp.inf))
    sums = sums.reshape(count * size, count * size)[:length, :length]
    if inclusive:
        return sums
    return jnp.concatenate([jnp.full_like(sums[:1], -jnp.inf), sums[:-1]])  # what led to the step before


def _delay(x: Array, steps: int) -> Array:
    return jnp.concatenate([jnp.zeros_like(x[:steps]), x[:-steps]])


def _over(x: Array, like: Array) -> Array:
    """`x` with trailing axes added up to the rank of `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
