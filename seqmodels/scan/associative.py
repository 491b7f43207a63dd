"""`lax.associative_scan` over elements: logarithmic depth, one element per token in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from seqmodels.scan.recurrence import (
    Recurrence,
    Tree,
    act,
    cast_like,
    element_of,
    resetting,
    select,
    settle,
    take,
    zero_invalid,
)


def lifted_elements(recurrence: Recurrence, inputs: Tree, valid: jax.Array | None) -> Tree:
    """Every step's element `[T, ...]`, the identity at invalid steps."""
    elements = jax.vmap(lambda x: element_of(recurrence, x))(inputs)
    if valid is None:
        return elements
    return select(valid, elements, jax.vmap(recurrence.identity)(elements))


def associative(
    recurrence: Recurrence, inputs: Tree, state: Tree | None, reset: jax.Array | None, valid: jax.Array | None
) -> tuple[Tree, Tree]:
    """All prefixes at once, each acting on the state; inputs are already free of padding values."""
    state, initial = settle(recurrence, take(inputs, 0), state)
    elements = lifted_elements(recurrence, inputs, valid)
    if reset is None:
        prefixes = lax.associative_scan(jax.vmap(recurrence.combine), elements)
        states = jax.vmap(lambda e: cast_like(act(recurrence, e, state), state))(prefixes)
    else:
        flags, prefixes = lax.associative_scan(jax.vmap(resetting(recurrence)), (reset, elements))
        states = jax.vmap(lambda f, e: cast_like(act(recurrence, e, select(f, initial, state)), state))(flags, prefixes)
    seen = states
    if recurrence.read_before:
        seen = jax.tree.map(lambda s, h: jnp.concatenate([s[None], h[:-1]]), state, states)
        if reset is not None:
            seen = select(reset, jax.tree.map(lambda s: s[None], initial), seen)
    outputs = jax.vmap(recurrence.read)(seen, inputs)
    return zero_invalid(outputs, valid), take(states, -1)


def reduce_elements(recurrence: Recurrence, inputs: Tree, reset: jax.Array, valid: jax.Array | None) -> Tree:
    """`(flag, element)` of a whole span by pairwise combination, logarithmic in depth."""
    combine = jax.vmap(resetting(recurrence))
    spans = (reset, lifted_elements(recurrence, inputs, valid))
    length = reset.shape[0]
    while length > 1:
        even = length - length % 2
        pairs = combine(take(spans, slice(0, even, 2)), take(spans, slice(1, even, 2)))
        if length % 2:
            pairs = jax.tree.map(lambda a, b: jnp.concatenate([a, b[-1:]]), pairs, spans)
        spans, length = pairs, (length + 1) // 2
    return take(spans, 0)
