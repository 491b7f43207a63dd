"""The selective scan of Mamba (arXiv 2312.00752): a state of [D, N]; its elements exist inside a chunk only, but with
`associative`, which holds all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqmodels.operators import kernels
from seqmodels.operators.decayed import exact, wide
from seqmodels.operators.diagonal import after_each, since_last_reset
from seqmodels.operators.family import run_family
from seqmodels.scan import Recurrence
from seqmodels.typing import Segments

CHUNK = 64


class Selective(NamedTuple):
    """One step's inputs: `x` [D], its step size `dt` [D], and what writes (`b`) and reads (`c`) the state, [N]."""

    x: Float[Array, "D"]
    dt: Float[Array, "D"]
    b: Float[Array, "N"]
    c: Float[Array, "N"]


class SelectiveElement(NamedTuple):
    """The map h -> exp(elapsed A) h + drive of a span; channels stand last, where a processor's lanes are."""

    elapsed: Float[Array, "D"]
    drive: Float[Array, "N D"]


def selective_recurrence(a: Float[Array, "D N"]) -> Recurrence:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t b_t^T, read as h_t c_t; the state is h^T, of [N, D].

    A span decays by exp(A * the sum of its dt), so an element holds elapsed time, [D], in place of decays, [D, N]. With
    A <= 0 and dt >= 0 exponents are sums of terms <= 0: any step size is exact to rounding.
    """
    rates = wide(a).T
    ones = jnp.ones(len(rates), rates.dtype)

    def decay(elapsed: Array) -> Array:  # an outer product, so that the gradient of `elapsed` is one with `ones`
        return jnp.exp(rates * exact("d,n->nd", elapsed, ones))

    def elements(inputs: Selective) -> SelectiveElement:
        dt = wide(inputs.dt)
        return SelectiveElement(dt, exact("n,d->nd", wide(inputs.b), dt * wide(inputs.x)))

    def act(element: SelectiveElement, state: Array) -> Array:
        return decay(element.elapsed) * state + element.drive

    def fold(inputs: Selective, reset: Bool[Array, "C"]) -> SelectiveElement:
        dt = jnp.where(since_last_reset(reset)[:, None], wide(inputs.dt), 0)
        weighted = jax.vmap(decay)(after_each(dt)) * (dt * wide(inputs.x))[:, None]
        return SelectiveElement(jnp.sum(dt, axis=0), jnp.sum(weighted * wide(inputs.b)[..., None], axis=0))

    return Recurrence(
        elements=elements,
        combine=lambda s, e: SelectiveElement(s.elapsed + e.elapsed, act(e, s.drive)),
        identity=lambda e: jax.tree.map(jnp.zeros_like, e),
        act=act,
        read=lambda h, x: exact("n,nd->d", wide(x.c), h),
        initial=lambda x: jnp.zeros((*x.b.shape, *x.x.shape), jnp.result_type(rates, *x)),
        neutral=lambda x: x._replace(dt=jnp.zeros_like(x.dt)),
        fold=fold,
    )


def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    a: Float[Array, "D N"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    d: Float[Array, "D"] | None = None,
    state: Float[Array, "B D N"] | None = None,
    *,
    segments: Segments | None = None,
    method: str = "auto",
    chunk: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t b_t^T, y_t = h_t c_t + d x_t, for a batch: `(y, state)`.

    A is finite and <= 0, dt >= 0. y has the type of x, the state is at least float32. `segments` None: one document a
    row, which continues `state`. With `sequence_axis`, inside `shard_map`, T is this device's span.

    Elements of [D, N] are made inside a chunk of C steps (`chunk`, 64 by default; kernels have their own) and made
    again in the backward pass, which keeps one state a chunk: beside what comes in and goes out, a forward pass holds
    O(1) states [B, D, N] and a training step T/C + C of them, 4 B D N (T/C + C) bytes, instead of T. `sequential` is
    what `auto` runs on CPU; `chunked` holds C elements instead of one; only `associative`, where it is asked for, holds
    all T.
    Raises ValueError on shapes that do not fit.
    """
    batch, length, channels = x.shape
    size = a.shape[-1]
    given = [jnp.shape(y) for y in (x, dt, a, b, c)]
    fits = [x.shape, x.shape, (channels, size), (batch, length, size), (batch, length, size)]
    if given != fits or (d is not None and d.shape != (channels,)):
        names = "x and dt [B, T, D], a [D, N], b and c [B, T, N], d [D] or None"
        raise ValueError(f"selective_scan takes {names}; not {given} and d {getattr(d, 'shape', None)}")
    if state is not None and state.shape != (batch, channels, size):
        raise ValueError(f"the state [B, D, N] of x {x.shape} and a {a.shape} is not {state.shape}")
    where: Any = {"chunk": chunk, "sequence_axis": sequence_axis}
    kernel = lambda: kernels.selective(x, dt, a, b, c, state, segments=segments, **where)
    served = kernels.serve(method, "selective", kernel, x, dt, b, c, sizes=(channels, size), **where)
    if served is not None:
        y, after = served
    else:
        y, after = run_family(
            "selective",
            selective_recurrence(a),
            Selective(x, dt, b, c),
            None if state is None else state.swapaxes(1, 2),
            segments=segments,
            method=method,
            chunk=CHUNK if chunk is None else chunk,
            sequence_axis=sequence_axis,
        )
        after = after.swapaxes(1, 2)
    if d is not None:
        seen = x if segments is None else jnp.where(segments.valid[..., None], x, 0)  # padding may be NaN
        y = y + wide(d)[None, None] * wide(seen)
    return y.astype(x.dtype), after
