"""The two kernels of `selective_scan`: a block of channels through a chunk of steps, forward and backward.

A step works on a state [N, W], on rows [1, W] of its channels, and on columns, which come with every entry in all
lanes, [N, LANES]: what crosses lanes is slow, so it is done for a chunk once, for all blocks of channels. A row is read
from [W / LANES, L, LANES], where one load brings it into all rows of a register.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.chunks import turned

LANES, ROWS = 128, 8  # of a register
RATES = (-1e30, -1e-30)  # between which A is kept: -inf times no time at all is no NaN
LONGEST = 1e38  # a step at a document's start takes so much longer; for every A nothing is left after it


def _rates(a: Any) -> Any:
    """log2(e) A: a power of two is what the device has."""
    return jnp.clip(a, *RATES) / math.log(2)


def _waits(documents: Any) -> Any:
    """[L, LANES]: LONGEST where a document starts, else 0."""
    column = turned(documents)[:, :1]
    first = jax.lax.broadcasted_iota(jnp.int32, column.shape, 0) == 0
    before = jnp.where(first, 0, pltpu.roll(column, 1, 0))
    return jnp.broadcast_to(jnp.where(column == before, 0.0, LONGEST), (column.shape[0], LANES))


def _across(x: Any, width: int) -> Any:
    """[..., LANES] as often as it fits into `width`."""
    return jnp.concatenate([x] * (width // LANES), axis=1)


def _widen(columns: Any, wide: Any) -> None:
    """The entries of columns [L N / LANES, LANES] in all lanes of [L N, LANES]."""
    for i in range(columns.shape[0]):
        wide[i * LANES : (i + 1) * LANES] = turned(columns[i : i + 1])


def _narrow(wide: Any, columns: Any) -> None:
    """The other way round: the sums over lanes."""
    for i in range(columns.shape[0]):
        columns[i : i + 1] = jnp.sum(wide[i * LANES : (i + 1) * LANES].T, axis=0, keepdims=True)


def _tile(group: Any) -> Any:
    """The rows of a group of eight steps."""
    return pl.ds(pl.multiple_of(ROWS * group, ROWS), ROWS)


def _put(rows: Any, x: Any) -> None:
    """x [L, W] into [W / LANES, L, LANES], from which a row comes in all rows of a register."""
    for i in range(rows.shape[0]):
        rows[i] = x[:, i * LANES : (i + 1) * LANES]


def _row(rows: Any, step: Any) -> Any:
    return jnp.concatenate([rows[i, pl.ds(step, 1)] for i in range(rows.shape[0])], axis=1)


def _folded(x: Any, axis: int, size: int) -> Any:
    """The sum of the parts of `size` along an axis."""
    parts = [jax.lax.slice_in_dim(x, at, at + size, axis=axis) for at in range(0, x.shape[axis], size)]
    return sum(parts[1:], start=parts[0])


def _rows(parts: Sequence[Any]) -> Any:
    """Eight [N, W] as one [8, W]: row i is the sum over N of part i.

    In three levels, each of which adds neighbours of two parts and puts them into the rows of one: half the work of
    eight sums.
    """
    parts, step = [_folded(part, 0, ROWS) for part in parts], 1
    row = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 0)
    while step < ROWS:
        own = row & step == 0
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [jnp.where(own, x, y) + pltpu.roll(jnp.where(own, y, x), step, 0) for x, y in pairs]
        step *= 2
    return parts[0]


def _prepared(x: Any, dt: Any, b: Any, c: Any, documents: Any, scratch: Sequence[Any]) -> Any:
    """dt in float32; the rows and columns of all steps in scratch, of which columns serve every block of a chunk."""
    wide_b, wide_c, waits, spans, drives = scratch

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        _widen(b[...], wide_b)
        _widen(c[...], wide_c)
        waits[...] = _waits(documents[...])

    steps = dt[...].astype(jnp.float32)
    _put(spans, steps + _across(waits[...], steps.shape[1]))
    _put(drives, steps * x[...].astype(jnp.float32))
    return steps


def _column(wide: Any, step: Any, like: Any) -> Any:
    """A step's column along all channels of a state [N, W]."""
    size, width = like.shape
    return _across(wide[pl.ds(pl.multiple_of(size * step, ROWS), size)], width)


def _flowing(span: Any, x: Any) -> Any:
    """What goes from a step to the next one, or back: nothing over a document's start, be it infinite."""
    return jnp.where(span < LONGEST, x, 0)


def _after(state: Any, rates: Any, step: Any, spans: Any, drives: Any, wide_b: Any) -> Any:
    """The state after a step."""
    span = _row(spans, step)
    kept = _flowing(span, jnp.exp2(rates * span) * state)
    return kept + _column(wide_b, step, state) * _row(drives, step)


def forward(*refs: Any) -> None:
    x, dt, a, b, c, documents, first, out, last, *states, held, wide_b, wide_c, waits, spans, drives, result = refs
    block = pl.program_id(2)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        held[block] = first[...]

    for before in states:
        before[...] = held[block]
    _prepared(x, dt, b, c, documents, (wide_b, wide_c, waits, spans, drives))
    rates = _rates(a[...])

    def group(i: Any, state: Any) -> Any:
        parts = []
        for step in (ROWS * i + j for j in range(ROWS)):
            state = _after(state, rates, step, spans, drives, wide_b)
            parts.append(_column(wide_c, step, state) * state)
        result[_tile(i)] = _rows(parts)
        return state

    state = jax.lax.fori_loop(0, dt.shape[0] // ROWS, group, held[block])
    out[...] = result[...].astype(out.dtype)
    held[block] = state
    last[...] = state


def backward(*refs: Any) -> None:
    x, dt, a, b, c, documents, before, d_out, d_last, dx, ddt, da, db, dc, d_first, *scratch = refs
    held, held_a, wide_b, wide_c, waits, spans, drives, of_b, of_c, states, d_outs, d_drives, d_spans = scratch
    block, groups = pl.program_id(2), dt.shape[0] // ROWS

    @pl.when(block == 0)
    def _() -> None:
        of_b[...] = jnp.zeros_like(of_b)
        of_c[...] = jnp.zeros_like(of_c)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        held[block] = d_last[...]
        held_a[block] = jnp.zeros(a.shape, jnp.float32)

    steps = _prepared(x, dt, b, c, documents, (wide_b, wide_c, waits, spans, drives))
    _put(d_outs, d_out[...].astype(jnp.float32))
    rates = _rates(a[...])

    def again(i: Any, state: Any) -> Any:
        for step in (ROWS * i + j for j in range(ROWS)):
            states[step] = state
            state = _after(state, rates, step, spans, drives, wide_b)
        return state

    def group(i: Any, carry: Any) -> Any:
        after, state, of_rates = carry
        i, of_drive, of_span = groups - 1 - i, [], []
        for step in (ROWS * i + j for j in reversed(range(ROWS))):
            column = pl.ds(pl.multiple_of(a.shape[0] * step, ROWS), a.shape[0])
            gradient = after + _column(wide_c, step, state) * _row(d_outs, step)
            of_c[column] += _folded(state * _row(d_outs, step), 1, LANES)
            of_b[column] += _folded(gradient * _row(drives, step), 1, LANES)
            of_drive.append(_column(wide_b, step, state) * gradient)
            state, span = states[step], _row(spans, step)
            after = _flowing(span, jnp.exp2(rates * span) * gradient)
            of_decay = _flowing(span, after * state)
            of_span.append(rates * of_decay)
            of_rates = of_rates + span * of_decay  # LONGEST meets 0 alone
        d_drives[_tile(i)] = _rows(of_drive[::-1])
        d_spans[_tile(i)] = _rows(of_span[::-1])
        return after, state, of_rates

    state = jax.lax.fori_loop(0, groups, again, before[...])
    after, _, of_rates = jax.lax.fori_loop(0, groups, group, (held[block], state, held_a[block]))
    dx[...] = (d_drives[...] * steps).astype(dx.dtype)
    ddt[...] = (d_drives[...] * x[...].astype(jnp.float32) + math.log(2) * d_spans[...]).astype(ddt.dtype)
    held[block], held_a[block] = after, of_rates
    d_first[...], da[...] = after, of_rates

    @pl.when(block == pl.num_programs(2) - 1)
    def _() -> None:
        _narrow(of_b, db)
        _narrow(of_c, dc)
