"""The kernels of `kernels_pallas.exponential` within a chunk; its docstring has the equations."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.chunks import belongs, dot, places, sums_between, turned


class Form(NamedTuple):
    """How a state is read: under a running maximum or as it is, and divided by q^T n or not."""

    name: str
    eps: float
    stabilised: bool = True
    normalised: bool = True


class _Logs(NamedTuple):
    """Of a chunk: E [L, L], R and m [L, 1], W [L, L], a and w [L, 1], and what `belongs` gives."""

    inside: Any
    reach: Any
    log_max: Any
    weight: Any
    carried: Any
    kept: Any
    reads: Any
    writes: Any
    through: Any


def _logs(form: Form, i: Any, f: Any, documents: Any, m: Any) -> _Logs:
    length = f.shape[1]
    row, column = places(length)
    between, of_row = sums_between(f), turned(documents)
    one = (row >= column) & (of_row == documents.astype(jnp.float32))
    inside = jnp.where(one, between + i, -jnp.inf)
    reads, writes, through = belongs(documents)
    reach = jnp.where(reads, between[:, :1] + f[:, :1] + m, -jnp.inf)
    log_max = jnp.zeros_like(reach)
    if form.stabilised:
        log_max = jnp.maximum(reach, jnp.max(inside, axis=1, keepdims=True))
    base = jnp.where(log_max == -jnp.inf, 0, log_max)
    weight = jnp.exp(inside - base)
    carried, kept = jnp.exp(reach - base), weight.T[:, length - 1 :]
    return _Logs(inside, reach, log_max, weight, carried, kept, reads, writes, through)


def _ratio(form: Form, sums: Any, log_max: Any) -> tuple[Any, Any]:
    """`(r, the slope of r's denominator in the sums)`, both sides times exp(min(m, 0)): exp(-m) overflows."""
    if not form.normalised:
        return jnp.ones_like(sums), jnp.zeros_like(sums)
    scale, floor = jnp.exp(jnp.minimum(log_max, 0)), jnp.exp(-jnp.maximum(log_max, 0))
    size = jnp.abs(sums) * scale
    return scale / (jnp.maximum(size, floor) + form.eps * scale), jnp.where(size > floor, jnp.sign(sums), 0)


def forward_kernel(form: Form, *refs: Any) -> None:
    query, key, value, log_input, log_forget, documents, *first = refs[:9]
    out, *last = refs[9:13]
    *states, m, n, c = refs[13:]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for to, given in zip((m, n, c), first, strict=True):
            to[...] = given[...]

    for before, held in zip(states, (m, n, c), strict=False):
        before[...] = held[...]
    q, k, v, normaliser, memory = query[...], key[...], value[...], n[...], c[...]
    logs = _logs(form, log_input[...], log_forget[...], documents[...], m[...])
    scores = dot(q, k, (1, 1)) * logs.weight
    read = lambda x: jnp.where(logs.reads, logs.carried * x, 0)
    sums = _across(scores) + read(_across(q.astype(jnp.float32) * normaliser))
    result = dot(scores.astype(v.dtype), v, (1, 0)) + read(dot(q, memory.astype(q.dtype), (1, 0)))
    out[...] = (result * _ratio(form, sums, logs.log_max)[0]).astype(out.dtype)
    written, kept = logs.kept * k.astype(jnp.float32), logs.carried[-1:]
    m[...] = logs.log_max[-1:]
    n[...] = jnp.where(logs.through, kept * normaliser, 0) + jnp.sum(written, axis=0, keepdims=True)
    c[...] = jnp.where(logs.through, kept * memory, 0) + dot(written.astype(k.dtype), v, (0, 0))
    for to, held in zip(last, (m, n, c), strict=True):
        to[...] = held[...]


def _across(x: Any) -> Any:
    return jnp.sum(x, axis=1, keepdims=True)


def _down(x: Any) -> Any:
    return jnp.sum(x, axis=0, keepdims=True)


def backward_kernel(form: Form, *refs: Any) -> None:
    query, key, value, log_input, log_forget, documents, m, n, c, d_out, *d_last = refs[:13]
    dq, dk, dv, d_input, d_forget, *d_first = refs[13:21]
    held = refs[21:]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for to, given in zip(held, d_last, strict=True):
            to[...] = given[...]

    q, k, v, do, normaliser, memory = query[...], key[...], value[...], d_out[...], n[...], c[...]
    dm, dn, dc = (ref[...] for ref in held)
    kind, wide_q, wide_k = q.dtype, q.astype(jnp.float32), k.astype(jnp.float32)
    logs = _logs(form, log_input[...], log_forget[...], documents[...], m[...])
    weight, carried, kept = logs.weight, logs.carried, logs.carried[-1:]
    reads, writes, through = logs.reads, logs.writes, logs.through
    row, column = places(q.shape[0])

    scores = dot(q, k, (1, 1)) * weight
    sums = _across(scores) + jnp.where(reads, carried * _across(wide_q * normaliser), 0)
    ratio, slope = _ratio(form, sums, logs.log_max)
    of_scores, of_memory = dot(do, v, (1, 1)), jnp.where(reads, dot(do, memory.astype(kind), (1, 1)), 0)
    of_out = ratio * (_across(scores * of_scores) + carried * _across(wide_q * of_memory))  # dO_i . O_i
    d_sums = -of_out * ratio * slope
    d_scores = ratio * of_scores + d_sums
    narrow, before_ratio = (d_scores * weight).astype(kind), (ratio * do).astype(kind)
    from_state = ratio * of_memory + jnp.where(reads, d_sums * normaliser, 0)
    to_state = jnp.where(writes, logs.kept * (dot(v, dc.astype(kind), (1, 1)) + dn), 0)
    dq[...] = (dot(narrow, k, (1, 0)) + carried * from_state).astype(dq.dtype)
    dk[...] = (dot(narrow, q, (0, 0)) + to_state).astype(dk.dtype)
    to_value = jnp.where(writes, logs.kept * dot(k, dc.astype(kind), (1, 0)), 0)
    dv[...] = (dot(scores.astype(kind), before_ratio, (0, 0)) + to_value).astype(dv.dtype)

    written = _across(wide_k * to_state)
    flowing = jnp.sum(memory * dc, keepdims=True) + jnp.sum(normaliser * dn, keepdims=True)
    flowing = jnp.where(through, kept * flowing, 0)
    last = row[:, :1] == q.shape[0] - 1
    d_inside = scores * d_scores
    d_reach = carried * _across(wide_q * from_state) + jnp.where(last, flowing, 0)
    if form.stabilised:
        d_max = -form.eps * ratio * of_out + jnp.where(last, dm - flowing - _down(written), 0)
        d_inside, d_reach = _through_maximum(logs, d_inside, d_reach, d_max)
    d_input[...] = _down(d_inside + jnp.where(row == column, written, 0))
    crossing = dot(d_inside, jnp.where(row < column, 1.0, 0.0), (1, 0)) + d_reach  # [i, s], sums over j < s
    d_forget[...] = _down(jnp.where(row >= column, crossing, 0) + jnp.where(row < column, written, 0))

    gradients = (
        _down(d_reach),
        _down(carried * d_sums * wide_q) + jnp.where(through, kept * dn, 0),
        dot((carried * wide_q).astype(kind), before_ratio, (0, 0)) + jnp.where(through, kept * dc, 0),
    )
    for to, ref, gradient in zip(d_first, held, gradients, strict=True):
        ref[...] = gradient
        to[...] = gradient


def _through_maximum(logs: _Logs, d_inside: Any, d_reach: Any, d_max: Any) -> tuple[Any, Any]:
    """The gradient of a maximum for the earliest that is equal to it, as in the recurrence; -inf has none."""
    length = logs.inside.shape[0]
    column = places(length)[1].astype(jnp.float32)
    d_max = jnp.where(logs.log_max == -jnp.inf, 0, d_max)
    before = logs.reach == logs.log_max
    place = jnp.min(jnp.where(logs.inside == logs.log_max, column, length), axis=1, keepdims=True)
    place = jnp.where(before, length, place)
    return d_inside + jnp.where(column == place, d_max, 0), d_reach + jnp.where(before, d_max, 0)
