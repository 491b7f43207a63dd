"""`lax.scan` over chunks: several at a time with `fold` and `emit`, or an associative scan inside each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqmodels.scan.associative import associative, reduce_elements
from seqmodels.scan.recurrence import (
    Recurrence,
    Tree,
    act,
    cast_like,
    hide_invalid,
    resetting,
    select,
    settle,
    settle_element,
    take,
    zero_invalid,
)

DEFAULT_CHUNK = 64
# A chunk alone is too little work for a device, or for two cores; and what is kept for more tokens than these is no
# longer small beside their inputs.
TOKENS_AT_ONCE = 1024


def scan_chunks(
    body: Callable[[Tree, Tree], tuple[Tree, Tree]], carry: Tree, xs: Tree, length: int, chunk: int, axis: int = 0
) -> tuple[Tree, Tree]:
    """`lax.scan` with a body that takes a chunk of steps; a length that `chunk` does not divide ends in a shorter one.

    Steps are along `axis`. The backward pass recomputes what happens inside a chunk from the carry before it.
    """
    body = jax.checkpoint(body, prevent_cse=False)
    whole = length - length % chunk
    cut = lambda start, end: jax.tree.map(lambda x: lax.slice_in_dim(x, start, end, axis=axis), xs)
    parts = []
    if whole:
        if whole == chunk:  # a loop of one trip only hides the program from the compiler
            carry, outputs = body(carry, cut(0, whole))
        else:
            split = lambda x: x.reshape(*x.shape[:axis], whole // chunk, chunk, *x.shape[axis + 1 :])
            join = lambda y: y.reshape(*y.shape[:axis], whole, *y.shape[axis + 2 :])
            carry, outputs = lax.scan(
                body, carry, jax.tree.map(lambda x: jnp.moveaxis(split(x), axis, 0), cut(0, whole))
            )
            outputs = jax.tree.map(lambda y: join(jnp.moveaxis(y, 0, axis)), outputs)
        parts.append(outputs)
    if whole < length:
        carry, outputs = body(carry, cut(whole, length))
        parts.append(outputs)
    return carry, _joined(parts, axis)


def _joined(parts: list[Tree], axis: int = 0) -> Tree:
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *ys: jnp.concatenate(ys, axis), *parts)


def _as_bools(reset: jax.Array | None, inputs: Tree) -> jax.Array:
    return jnp.zeros(jax.tree.leaves(inputs)[0].shape[:1], bool) if reset is None else reset


def chunk_element(recurrence: Recurrence, inputs: Tree, reset: jax.Array | None, valid: jax.Array | None) -> Tree:
    """`(flag, element)` of one chunk: the element since its last reset, and whether it holds one."""
    reset = _as_bools(reset, inputs)
    if recurrence.fold is None:
        return reduce_elements(recurrence, inputs, reset, valid)
    return jnp.any(reset), settle_element(recurrence, recurrence.fold(inputs, reset))


def chunked(
    recurrence: Recurrence,
    inputs: Tree,
    state: Tree | None,
    reset: jax.Array | None,
    valid: jax.Array | None,
    chunk: int,
) -> tuple[Tree, Tree]:
    """Outputs and state chunk by chunk; inputs are already free of padding values.

    With `fold` and `emit`, TOKENS_AT_ONCE tokens are a span.
    """
    state, initial = settle(recurrence, take(inputs, 0), state)
    length = jax.tree.leaves(inputs)[0].shape[0]

    def elementwise(state: Tree, xs: tuple[Tree, Any, Any]) -> tuple[Tree, Tree]:
        outputs, after = associative(recurrence, xs[0], state, xs[1], xs[2])
        return cast_like(after, state), outputs

    def matmul_form(state: Tree, xs: tuple[Tree, Any, Any]) -> tuple[Tree, Tree]:
        return _span(recurrence, initial, state, xs, chunk)

    if recurrence.emit is None:
        state, outputs = scan_chunks(elementwise, state, (inputs, reset, valid), length, chunk)
    else:
        at_once = chunk * max(1, min(length, TOKENS_AT_ONCE) // chunk)
        state, outputs = scan_chunks(matmul_form, state, (inputs, reset, valid), length, at_once)
    return outputs, state


def span(
    recurrence: Recurrence,
    inputs: Tree,
    state: Tree | None,
    reset: jax.Array | None,
    valid: jax.Array | None,
    chunk: int,
) -> tuple[Tree, Tree]:
    """`chunked` with `fold` and `emit` for inputs that are few enough to take all at once, none of it recomputed."""
    state, initial = settle(recurrence, take(inputs, 0), state)
    inputs = hide_invalid(recurrence, inputs, valid)
    state, outputs = _span(recurrence, initial, state, (inputs, reset, valid), chunk)
    return outputs, state


def _span(
    recurrence: Recurrence, initial: Tree, state: Tree, xs: tuple[Tree, Any, Any], chunk: int
) -> tuple[Tree, Tree]:
    """All chunks are folded side by side, their states follow one another, then all are read side by side."""
    reads = recurrence.emit
    assert reads is not None
    resets = xs[1] is not None

    def across(state: Tree, element: tuple[jax.Array, Tree]) -> tuple[Tree, Tree]:
        before = select(element[0], initial, state) if resets else state
        return cast_like(act(recurrence, element[1], before), state), state

    def read(inputs: Tree, state: Tree, reset: jax.Array | None, valid: jax.Array | None) -> Tree:
        return zero_invalid(reads(inputs, state, _as_bools(reset, inputs)), valid)

    def side_by_side(state: Tree, xs: tuple[Tree, Any, Any], size: int) -> tuple[Tree, Tree]:
        if recurrence.sweep is not None and jax.tree.leaves(xs)[0].shape[0] == size:
            inputs, reset, valid = xs
            after, outputs = recurrence.sweep(inputs, state, _as_bools(reset, inputs))
            return cast_like(after, state), zero_invalid(outputs, valid)
        inputs, reset, valid = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), xs)
        elements = jax.vmap(functools.partial(chunk_element, recurrence))(inputs, reset, valid)
        if elements[0].shape[0] == 1:
            state, before = across(state, take(elements, 0))
            before = jax.tree.map(lambda x: x[None], before)
        else:
            state, before = lax.scan(across, state, elements)
        outputs = jax.vmap(read)(inputs, before, reset, valid)
        return state, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), outputs)

    steps = jax.tree.leaves(xs)[0].shape[0]
    whole, parts = steps - steps % chunk, []
    for start, end, size in ((0, whole, chunk), (whole, steps, steps - whole)):
        if start < end:
            state, outputs = side_by_side(state, take(xs, slice(start, end)), size)
            parts.append(outputs)
    return state, _joined(parts)


def span_element(
    recurrence: Recurrence, inputs: Tree, reset: jax.Array | None, valid: jax.Array | None, chunk: int
) -> Tree:
    """`(flag, element)` of a span of any length, chunk by chunk."""
    length = jax.tree.leaves(inputs)[0].shape[0]
    combine = resetting(recurrence)
    first = min(chunk, length)
    head = jax.tree.map(lambda x: x[:first], (inputs, reset, valid))
    span = chunk_element(recurrence, *head)
    if first == length:
        return span

    def body(span: Tree, xs: tuple[Tree, Any, Any]) -> tuple[Tree, None]:
        return cast_like(combine(span, chunk_element(recurrence, *xs)), span), None

    rest = jax.tree.map(lambda x: x[first:], (inputs, reset, valid))
    return scan_chunks(body, span, rest, length - first, chunk)[0]
