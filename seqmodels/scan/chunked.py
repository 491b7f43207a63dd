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
    body: Callable[[Tree, Tree], tuple[Tree, Tree]], carry: Tree, xs: Tree, length: int, chunk: int
) -> tuple[Tree, Tree]:
    """`lax.scan` with a body that takes a chunk of steps; a length that `chunk` does not divide ends in a shorter one.

    The backward pass recomputes what happens inside a chunk from the carry before it.
    """
    body = jax.checkpoint(body, prevent_cse=False)
    whole = length - length % chunk
    parts = []
    if whole:
        split = jax.tree.map(lambda x: x[:whole].reshape(whole // chunk, chunk, *x.shape[1:]), xs)
        if whole == chunk:  # a loop of one trip only hides the program from the compiler
            carry, outputs = body(carry, take(split, 0))
        else:
            carry, outputs = lax.scan(body, carry, split)
            outputs = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), outputs)
        parts.append(outputs)
    if whole < length:
        carry, outputs = body(carry, take(xs, slice(whole, None)))
        parts.append(outputs)
    return carry, _joined(parts)


def _joined(parts: list[Tree]) -> Tree:
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)


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

    With `fold` and `emit`, the chunks of TOKENS_AT_ONCE tokens are folded side by side, only their states follow one
    another, and then all are read side by side.
    """
    state, initial = settle(recurrence, take(inputs, 0), state)
    length = jax.tree.leaves(inputs)[0].shape[0]

    def elementwise(state: Tree, xs: tuple[Tree, Any, Any]) -> tuple[Tree, Tree]:
        outputs, after = associative(recurrence, xs[0], state, xs[1], xs[2])
        return cast_like(after, state), outputs

    def across(state: Tree, span: tuple[jax.Array, Tree]) -> tuple[Tree, Tree]:
        flag, element = span
        before = state if reset is None else select(flag, initial, state)
        return cast_like(act(recurrence, element, before), state), state

    def read(inputs: Tree, state: Tree, reset: jax.Array | None, valid: jax.Array | None) -> Tree:
        assert recurrence.emit is not None
        return zero_invalid(recurrence.emit(inputs, state, _as_bools(reset, inputs)), valid)

    def side_by_side(state: Tree, xs: tuple[Tree, Any, Any], size: int) -> tuple[Tree, Tree]:
        inputs, reset, valid = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), xs)
        spans = jax.vmap(functools.partial(chunk_element, recurrence))(inputs, reset, valid)
        if spans[0].shape[0] == 1:
            state, before = across(state, take(spans, 0))
            before = jax.tree.map(lambda x: x[None], before)
        else:
            state, before = lax.scan(across, state, spans)
        outputs = jax.vmap(read)(inputs, before, reset, valid)
        return state, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), outputs)

    def matmul_form(state: Tree, xs: tuple[Tree, Any, Any]) -> tuple[Tree, Tree]:
        steps = jax.tree.leaves(xs)[0].shape[0]
        whole, parts = steps - steps % chunk, []
        for start, end, size in ((0, whole, chunk), (whole, steps, steps - whole)):
            if start < end:
                state, outputs = side_by_side(state, take(xs, slice(start, end)), size)
                parts.append(outputs)
        return state, _joined(parts)

    if recurrence.emit is None:
        state, outputs = scan_chunks(elementwise, state, (inputs, reset, valid), length, chunk)
    else:
        at_once = chunk * max(1, min(length, TOKENS_AT_ONCE) // chunk)
        state, outputs = scan_chunks(matmul_form, state, (inputs, reset, valid), length, at_once)
    return outputs, state


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
