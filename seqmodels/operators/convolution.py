"""Convolutions along time that keep documents apart, and the carried state's part in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact, Int

from seqmodels.scan import Recurrence, sharded_carry
from seqmodels.scan.recurrence import act, select
from seqmodels.typing import Segments

CONVOLUTION = "convolution"
"""The method that time-invariant recurrences have beside those of every family."""
DIRECT = 16
"""Lags within blocks of so many steps are summed one by one; longer ones go through Fourier transforms."""


def causal_convolution(
    x: Inexact[Array, "B T D"], kernel: Inexact[Array, "T D"], document: Int[Array, "B T"] | None = None
) -> Inexact[Array, "B T D"]:
    """y_t = sum over s <= t of kernel_{t-s} x_s, over the steps s of t's own document; O(T log^2 T) a channel.

    `document` numbers documents in ascending order. Time is halved again and again: every pair s < t is parted by the
    middle of exactly one block, and the block's left half reaches its right half by a circular convolution of the
    block's length (what wraps around falls on the left half, which is dropped). Only the document across a middle can
    reach over it, so that a mask on either side keeps documents apart exactly, with no correction to subtract, and an
    output's rounding comes from its own past alone: the future has no gradient. One transform of twice the length
    costs about half as much and can do neither.
    """
    batch, length = x.shape[:2]
    document = jnp.zeros((batch, length), jnp.int32) if document is None else document
    y = _direct(x, kernel, document)
    if length <= DIRECT:
        return y
    along, taps = jnp.moveaxis(x, 1, 2), jnp.moveaxis(kernel, 0, 1)
    far, half = jnp.zeros_like(jnp.moveaxis(y, 1, 2)), DIRECT
    while half < length:
        far = far + _across_middles(along, taps, document, half)
        half *= 2
    return y + jnp.moveaxis(far, 2, 1)


def _direct(x: Array, kernel: Array, document: Array) -> Array:
    """The pairs inside blocks of DIRECT steps."""
    length = x.shape[1]
    time = jnp.arange(length)
    tap = lambda lag: kernel[lag][None, None]
    y = tap(0) * x
    for lag in range(1, min(DIRECT, length)):
        own = (document[:, lag:] == document[:, :-lag]) & (time[lag:] % DIRECT >= lag)[None]
        y = y.at[:, lag:].add(jnp.where(own[..., None], tap(lag) * x[:, :-lag], 0))
    return y


def _across_middles(x: Array, kernel: Array, document: Array, half: int) -> Array:
    """From the left half to the right half of every block of 2 `half` steps, [B, D, T]."""
    length, block = x.shape[-1], 2 * half
    blocks = -(-length // block)
    pad = lambda a, size: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, max(size - a.shape[-1], 0))])
    split = lambda a: pad(a, blocks * block).reshape(*a.shape[:-1], blocks, block)
    x, document = split(x), split(document)
    own = (document == document[..., half - 1 : half])[:, None]
    left = jnp.where(own, x, 0)[..., :half]
    real = not (jnp.iscomplexobj(x) or jnp.iscomplexobj(kernel))
    forward, inverse = (jnp.fft.rfft, jnp.fft.irfft) if real else (jnp.fft.fft, jnp.fft.ifft)
    spectrum = forward(left, n=block) * forward(pad(kernel[:, :block], block))[None, :, None]
    right = jnp.where(own[..., half:], inverse(spectrum, n=block)[..., half:], 0)
    y = jnp.concatenate([jnp.zeros_like(right), right], axis=-1)
    return y.reshape(*y.shape[:2], blocks * block)[..., :length]


def convolve_documents(
    x: Inexact[Array, "B T D"],
    kernel: Inexact[Array, "T D"],
    state: Inexact[Array, "B ..."],
    *,
    fold: Callable[[Array], Array],
    extend: Callable[[Array], Array],
    element: Callable[[Array, Array], Any],
    recurrence: Recurrence,
    segments: Segments | None,
    sequence_axis: str | None,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B ..."]]:
    """A time-invariant recurrence as a convolution: `(y [B, T, D], state)`, the carried state by a term of its own.

    `fold(recent)` is the state after inputs `[B, T, D]` that run backwards from the last one (zeros beyond a
    document's first); `extend(state)` is what a state contributes to the outputs `[B, T, D]` of the steps after it;
    `element(steps, folded)` an element of `recurrence`. x is zero in the padding.
    """
    segments = Segments.whole(*x.shape[:2], fresh=False) if segments is None else segments
    y = causal_convolution(x, kernel, segments.ids)
    recent, steps = _backwards(x, segments)
    span = element(steps.astype(x.real.dtype), fold(recent))
    carry, last = _carry(recurrence, jnp.any(segments.start, axis=1), span, state, sequence_axis)
    carried = (segments.ids == 0) & segments.valid
    return y + jnp.where(carried[..., None], extend(carry), 0), last


def _backwards(x: Array, segments: Segments) -> tuple[Array, Int[Array, "B"]]:
    """The last document's inputs from the last one back to the first, then zeros; and how many they are."""
    length, ids = x.shape[1], segments.ids
    own = segments.valid & (ids == ids[:, -1:])
    end = length - 1 - jnp.argmax(own[:, ::-1], axis=1)
    index = end[:, None] - jnp.arange(length)[None]
    there = (index >= 0) & jnp.take_along_axis(own, jnp.maximum(index, 0), axis=1)
    recent = jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=1)
    return jnp.where(there[..., None], recent, 0), jnp.sum(own, axis=1)


def _carry(
    recurrence: Recurrence, starts: Bool[Array, "B"], span: Any, state: Array, axis: str | None
) -> tuple[Array, Array]:
    """The state before this device's span, and the one after the last device's."""
    if axis is None:
        after = jax.vmap(lambda element, before: act(recurrence, element, before))
        return state, after(span, select(starts, jnp.zeros_like(state), state))
    spans = recurrence._replace(elements=lambda element: element, update=None)  # whole spans are its inputs
    one = lambda flag, element, before: sharded_carry(spans, (flag, element), element, before, axis)
    return jax.vmap(one)(starts, span, state)
