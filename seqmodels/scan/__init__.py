"""Scans of a `Recurrence` (a token at a time, associative, chunked, as a tree, sharded) and Newton's of any step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.scan.associative import associative
from seqmodels.scan.auto import METHODS, choose
from seqmodels.scan.chunked import DEFAULT_CHUNK, chunked, span_element
from seqmodels.scan.newton import (
    Jacobian,
    Newton,
    NewtonReport,
    NotConvergedError,
    check_converged,
    newton_scan,
)
from seqmodels.scan.recurrence import Recurrence, Tree, hide_invalid, settle, shapes, take
from seqmodels.scan.sequential import one_step, sequential
from seqmodels.scan.sharded import sharded_carry
from seqmodels.scan.tree import Counter, count_step, counter_prefixes, empty_counter, tree, tree_prefixes

__all__ = [
    "Counter",
    "Jacobian",
    "Newton",
    "NewtonReport",
    "NotConvergedError",
    "Recurrence",
    "check_converged",
    "counter_prefixes",
    "empty_counter",
    "newton_scan",
    "scan",
    "sharded_carry",
    "sharded_scan",
    "step",
    "tree_prefixes",
]


def scan(
    recurrence: Recurrence,
    inputs: Tree,
    state: Tree | None = None,
    *,
    reset: Any = None,
    valid: Any = None,
    method: str = "auto",
    chunk: int | None = None,
) -> tuple[Tree, Tree]:
    """Runs a recurrence over a sequence: `(outputs [T, ...], state)` from inputs `[T, ...]`, any T >= 1.

    `state` None starts from `initial`. `reset` Bool[T]: the state is `initial` before that step; `valid` Bool[T]:
    where False the step leaves the state untouched and its output is zero, whatever its inputs hold.
    `method`: `auto`, `sequential`, `associative`, `chunked` (with `chunk` steps at a time) or `tree`. A `chunk` makes
    `sequential` keep one state for so many steps for the backward pass. Batch and heads come from `jax.vmap`.
    Raises ValueError, with shapes and the way out, where something does not fit.
    """
    reset, valid = _checked(recurrence, inputs, reset, valid, chunk)
    length = jax.tree.leaves(inputs)[0].shape[0]
    method = _method(recurrence, method, length)
    inputs = jax.tree.map(jnp.asarray, inputs)
    inputs = hide_invalid(recurrence, inputs, valid)
    if method == "tree":
        _check_counter(state)
        return tree(recurrence, inputs, state, reset, valid)
    if method == "chunked":
        return chunked(recurrence, inputs, state, reset, valid, int(chunk or DEFAULT_CHUNK))
    if method == "sequential":
        return sequential(recurrence, inputs, state, reset, valid, None if chunk is None else int(chunk))
    return associative(recurrence, inputs, state, reset, valid)


def step(recurrence: Recurrence, inputs_t: Tree, state: Tree | None) -> tuple[Tree, Tree]:
    """One step: `(outputs_t, state)`; `state` None starts. Streaming a sequence so equals `scan`."""
    if not recurrence.associative:
        _check_counter(state)
        return count_step(recurrence, inputs_t, empty_counter(recurrence, inputs_t) if state is None else state)
    state, initial = settle(recurrence, jax.tree.map(jnp.asarray, inputs_t), state)
    return one_step(recurrence, inputs_t, state, initial)


def sharded_scan(
    recurrence: Recurrence,
    inputs: Tree,
    state: Tree | None = None,
    *,
    axis_name: str,
    reset: Any = None,
    valid: Any = None,
    method: str = "auto",
    chunk: int | None = None,
) -> tuple[Tree, Tree]:
    """`scan` inside `shard_map` with time sharded over the mesh axis `axis_name`, in the order of its devices.

    Returns this device's span of outputs and, on every device, the state after the last one. `state` is the one before
    the first device's span, the same on every device. What travels is one element per device, whatever T.
    """
    if not recurrence.associative:
        raise ValueError(
            "sharded_scan re-associates across devices, and this recurrence is not associative: "
            "shard the batch instead, or run scan(method='tree') on one device"
        )
    reset, valid = _checked(recurrence, inputs, reset, valid, chunk)
    visible = hide_invalid(recurrence, inputs, valid)
    span = span_element(recurrence, visible, reset, valid, int(chunk or DEFAULT_CHUNK))
    carry, last = sharded_carry(recurrence, span, take(visible, 0), state, axis_name)
    outputs, _ = scan(recurrence, inputs, carry, reset=reset, valid=valid, method=method, chunk=chunk)
    return outputs, last


def _checked(
    recurrence: Recurrence, inputs: Tree, reset: Any, valid: Any, chunk: Any
) -> tuple[jax.Array | None, jax.Array | None]:
    if not isinstance(recurrence, Recurrence):
        raise TypeError(f"scan runs a seqmodels.Recurrence, not {type(recurrence).__name__}")
    leaves = jax.tree.leaves(inputs)
    lengths = {jnp.shape(x)[0] if jnp.ndim(x) else None for x in leaves}
    if len(lengths) != 1 or lengths & {None, 0}:
        raise ValueError(f"every input needs the same leading time axis of at least 1, not {shapes(inputs)}")
    (length,) = lengths
    if chunk is not None and (not isinstance(chunk, int | np.integer) or chunk < 1):
        raise ValueError(f"chunk is a number of steps of at least 1, not {chunk!r}")
    masks = []
    for name, mask in (("reset", reset), ("valid", valid)):
        if mask is not None:
            mask = jnp.asarray(mask)
            if mask.shape != (length,) or mask.dtype != bool:
                raise ValueError(f"{name} must be bool[{length}], one flag a step of the inputs, not {shapes(mask)}")
        masks.append(mask)
    if valid is not None and recurrence.neutral is None and (recurrence.fold or recurrence.emit):
        raise ValueError(
            "`valid` cannot reach fold and emit without `neutral`: give the recurrence one, "
            "inputs that leave the state untouched (for a linear recurrence a zero drive and a zero log decay)"
        )
    return masks[0], masks[1]


def _check_counter(state: Any) -> None:
    if state is not None and not isinstance(state, Counter):
        raise ValueError(
            f"the state of a non-associative recurrence is a seqmodels.scan.Counter, not {shapes(state)}: "
            "start from None (or empty_counter) and pass on what scan and step return"
        )


def _method(recurrence: Recurrence, method: str, length: int) -> str:
    if method == "pallas":
        raise ValueError(
            "method='pallas' belongs to the operator families (seqmodels.operators), which have kernels; "
            "a bare scan runs 'sequential', 'associative', 'chunked' or 'auto'"
        )
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if not recurrence.associative:
        if method not in ("auto", "tree"):
            raise ValueError(
                f"method={method!r} re-associates, or keeps a single state, and this recurrence is not associative: "
                "use method='tree' (or 'auto'); its streaming form is step()"
            )
        return "tree"
    if method == "tree":
        raise ValueError(
            "method='tree' keeps a fixed parenthesisation for non-associative recurrences; "
            "for an associative one use 'associative' or 'chunked', which give the same result"
        )
    if method == "auto":
        forms = recurrence.fold is not None and recurrence.emit is not None
        return choose(matmul_form=forms, length=length)
    return method
