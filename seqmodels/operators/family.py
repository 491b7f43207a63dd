"""What the families share: batching, segments, sharding over time, and the choice of the executor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.compat import on_cpu
from seqmodels.operators.chunk_loop import chunk_loop
from seqmodels.scan import Recurrence, scan, sharded_scan
from seqmodels.scan.auto import choose
from seqmodels.scan.chunked import DEFAULT_CHUNK, TOKENS_AT_ONCE, scan_chunks, span
from seqmodels.scan.recurrence import settle, take
from seqmodels.typing import Segments

METHODS = ("auto", "sequential", "associative", "chunked", "pallas")
BLOCK_BYTES = 2**23  # states and inputs of chunks that a CPU works on at once, with what is made of them


def check_method(method: str, chunk: int | None = None, *, also: tuple[str, ...] = ()) -> None:
    """Raises ValueError on what no family can run; for configs, before anything is built.

    `also`: methods that this family has beside the common ones.
    """
    if method not in METHODS + also:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS + also)}")
    whole = isinstance(chunk, int | np.integer) and not isinstance(chunk, bool)
    if chunk is not None and (not whole or chunk < 1):
        raise ValueError(f"chunk is a number of steps of at least 1, not {chunk!r}")


def check_sizes(family: str, *arrays: Any) -> None:
    """Raises ValueError on an axis without entries."""
    for x in arrays:
        if 0 in x.shape:
            raise ValueError(f"the {family} family takes at least one row, step, head and channel, not {x.shape}")


def each_head(row: Callable[..., Any]) -> Callable[..., Any]:
    """For `heads` below: inputs [T, H, ...] and states [H, ...], every head a scan of its own."""

    def one_row(inputs: Any, state: Any, reset: Any, valid: Any) -> Any:
        head = lambda inputs, state: row(inputs, state, reset, valid)
        return jax.vmap(head, in_axes=(1, 0), out_axes=(1, 0))(inputs, state)

    return one_row


def run_family(
    family: str,
    recurrence: Recurrence,
    inputs: Any,
    state: Any,
    *,
    segments: Segments | None,
    method: str,
    chunk: int | None,
    sequence_axis: str | None,
    heads: Any = None,
) -> tuple[Any, Any]:
    """Runs a family's recurrence over inputs `[B, T, ...]`; `heads` maps one row's scan over its heads.

    Raises ValueError where `method` cannot serve the family.
    """
    check_method(method, chunk)
    if method == "pallas":
        raise ValueError(
            f"method='pallas': no kernel runs this operator, a recurrence of the {family} family; use 'auto', which "
            "takes the XLA form"
        )
    check_sizes(family, *jax.tree.leaves(inputs))
    length = jax.tree.leaves(inputs)[0].shape[1]
    if method == "auto":
        method = choose(matmul_form=True, length=length, family=family)

    def row(inputs: Any, state: Any, reset: Any, valid: Any) -> tuple[Any, Any]:
        options = {"reset": reset, "valid": valid, "method": method, "chunk": chunk}
        if sequence_axis is not None:
            return sharded_scan(recurrence, inputs, state, axis_name=sequence_axis, **options)
        return scan(recurrence, inputs, state, **options)

    every = lambda row: jax.vmap(row if heads is None else heads(row))
    reset, valid = (None, None) if segments is None else segments
    if method == "chunked" and recurrence.emit is not None and sequence_axis is None:
        chunk = chunk or DEFAULT_CHUNK
        return _in_spans(recurrence, every, inputs, state, reset, valid, chunk=chunk, heads=heads is not None)
    return every(row)(inputs, state, reset, valid)


def _in_spans(
    recurrence: Recurrence,
    every: Callable[..., Any],
    inputs: Any,
    state: Any,
    reset: Any,
    valid: Any,
    *,
    chunk: int,
    heads: bool,
) -> tuple[Any, Any]:
    """`scan(method="chunked")` of all rows and heads, a span of tokens of all of them at a time; on CPUs as many as
    belong to BLOCK_BYTES.

    A loop over spans inside of `jax.vmap` copies every array into another order first, and its spans fill the memory.
    """
    length = jax.tree.leaves(inputs)[0].shape[1]

    def first(inputs: Any, state: Any, reset: Any, valid: Any) -> tuple[Any, Any]:
        return jnp.zeros(1), settle(recurrence, take(inputs, 0), state)[0]

    def body(state: Any, xs: Any) -> tuple[Any, Any]:
        run = lambda inputs, state, reset, valid: span(recurrence, inputs, state, reset, valid, chunk)
        return every(run)(xs[0], state, *xs[1:])[::-1]

    state = every(first)(inputs, state, reset, valid)[1]
    xs = (inputs, reset, valid)
    if on_cpu():
        state, outputs = chunk_loop(body, state, xs, **_at_once(recurrence, state, inputs, chunk, heads=heads))
    else:
        size = chunk * max(1, min(length, TOKENS_AT_ONCE) // chunk)
        state, outputs = scan_chunks(body, state, xs, length, size, axis=1)
    return outputs, state


def _at_once(recurrence: Recurrence, state: Any, inputs: Any, chunk: int, *, heads: bool) -> dict[str, Any]:
    """Of how many rows, tokens and heads states and inputs have BLOCK_BYTES: a chunk of some rows and heads, or where
    those of all are fewer several chunks, if these are taken side by side."""
    leaves = jax.tree.leaves(inputs)
    rows, length = leaves[0].shape[:2]
    across = leaves[0].shape[2] if heads else 1
    taken = lambda xs: sum(x.size * x.dtype.itemsize for x in xs)
    every = taken(jax.tree.leaves(state)) + taken(leaves) * min(chunk, length) // length  # of one chunk
    fitting = BLOCK_BYTES * rows * across // every
    many = _divisor(across, fitting)
    few = _divisor(rows, fitting // across) if many == across else 1
    tokens = chunk * max(1, min(BLOCK_BYTES // every, TOKENS_AT_ONCE // chunk))
    if recurrence.sweep is not None:
        tokens = chunk
    return {"rows": few, "chunk": tokens, "heads": many if heads else None}


def _divisor(whole: int, most: int) -> int:
    """The largest divisor that is at most `most`, and 1 at least."""
    return max(n for n in range(1, whole + 1) if whole % n == 0 and n <= max(1, most))
