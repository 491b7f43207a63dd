"""One token at a time: the oracle, decoding, and small states on CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqmodels.scan.chunked import scan_chunks
from seqmodels.scan.recurrence import Recurrence, Tree, advance, cast_like, select, settle, take


def one_step(
    recurrence: Recurrence, inputs_t: Tree, state: Tree, initial: Tree, reset: Any = None, valid: Any = None
) -> tuple[Tree, Tree]:
    """`(outputs_t, state)` of one step from a settled state; an invalid step leaves the state and outputs zero."""
    if reset is not None:
        state = select(reset, initial, state)
    after = cast_like(advance(recurrence, inputs_t, state), state)
    if valid is not None:
        after = select(valid, after, state)
    outputs = recurrence.read(state if recurrence.read_before else after, inputs_t)
    if valid is not None:
        outputs = select(valid, outputs, jax.tree.map(jnp.zeros_like, outputs))
    return outputs, after


def sequential(
    recurrence: Recurrence,
    inputs: Tree,
    state: Tree | None,
    reset: jax.Array | None,
    valid: jax.Array | None,
    chunk: int | None = None,
) -> tuple[Tree, Tree]:
    """`lax.scan` over tokens; inputs are already free of padding values.

    The backward pass keeps what each step needs. With a `chunk` it keeps one state for every `chunk` steps instead, and
    runs those steps again, keeping their states only: less memory, and faster where a step's elements are large.
    """
    state, initial = settle(recurrence, take(inputs, 0), state)

    def body(state: Tree, step: tuple[Tree, Any, Any]) -> tuple[Tree, Tree]:
        inputs_t, reset_t, valid_t = step
        outputs, state = one_step(recurrence, inputs_t, state, initial, reset_t, valid_t)
        return state, outputs

    steps = (inputs, reset, valid)
    if chunk is None:
        state, outputs = lax.scan(body, state, steps)
    else:
        light = jax.checkpoint(body, prevent_cse=False)
        span = lambda state, steps: lax.scan(light, state, steps)
        state, outputs = scan_chunks(span, state, steps, jax.tree.leaves(inputs)[0].shape[0], chunk)
    return outputs, state
