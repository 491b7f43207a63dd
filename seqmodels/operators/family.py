"""What the families share: batching, segments, sharding over time, and the choice of the executor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from seqmodels.scan import Recurrence, scan, sharded_scan
from seqmodels.scan.auto import choose
from seqmodels.scan.chunked import DEFAULT_CHUNK, TOKENS_AT_ONCE, scan_chunks, span
from seqmodels.scan.recurrence import settle, take
from seqmodels.typing import Segments

METHODS = ("auto", "sequential", "associative", "chunked", "pallas")
BLOCK_BYTES = 2**22  # inputs of the heads that a CPU works on at once: they and what is made of them stay in its caches
SPAN_BYTES = 2**25  # inputs that a CPU works on at once: with fewer some families get slower, with more memory grows


def check_method(method: str, chunk: int | None = None, *, also: tuple[str, ...] = ()) -> None:
    """Raises ValueError on what no family can run; for configs, before anything is built.

    `also`: methods that this family has beside the common ones.
    """
    if method not in METHODS + also:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS + also)}")
    whole = isinstance(chunk, int | np.integer) and not isinstance(chunk, bool)
    if chunk is not None and (not whole or chunk < 1):
        raise ValueError(f"chunk is a number of steps of at least 1, not {chunk!r}")


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
    in_blocks: bool = False,
) -> tuple[Any, Any]:
    """Runs a family's recurrence over inputs `[B, T, ...]`; `heads` maps one row's scan over its heads.

    `in_blocks`: on CPUs the chunk form takes a few heads at a time; for families of products only, which two cores do
    not share. Raises ValueError where `method` cannot serve the family.
    """
    check_method(method, chunk)
    if method == "pallas":
        raise ValueError(
            f"method='pallas': there is no kernel for the {family} family on {jax.default_backend()} yet; "
            "use 'auto', which takes the XLA form"
        )
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
        run = functools.partial(_in_spans, recurrence, every, chunk=chunk or DEFAULT_CHUNK)
        if in_blocks and jax.default_backend() == "cpu":
            return _in_blocks(run, inputs, state, reset, valid)
        return run(inputs, state, reset, valid)
    return every(row)(inputs, state, reset, valid)


def _in_blocks(run: Callable[..., Any], inputs: Any, state: Any, reset: Any, valid: Any) -> tuple[Any, Any]:
    """`run` for a few heads of a row, or for a few rows, at a time: as many as BLOCK_BYTES of inputs belong to.

    Inputs are [B, T, H, ...] and states [B, H, ...].
    """
    leaves = jax.tree.leaves(inputs)
    rows, length, heads = leaves[0].shape[:3]
    fitting = BLOCK_BYTES * rows * heads // sum(x.size * x.dtype.itemsize for x in leaves)
    many = _divisor(heads, fitting)
    few = _divisor(rows, fitting // heads) if many == heads else 1
    if (few, many) == (rows, heads):
        return run(inputs, state, reset, valid)

    def cut(x: Array) -> Array:
        """[B, H, ...] as [blocks, few, many, ...]."""
        split = x.reshape(rows // few, few, heads // many, many, *x.shape[2:])
        return jnp.swapaxes(split, 1, 2).reshape(-1, few, many, *x.shape[2:])

    def join(x: Array) -> Array:
        split = x.reshape(rows // few, heads // many, *x.shape[1:])
        return jnp.swapaxes(split, 1, 2).reshape(rows, heads, *x.shape[3:])

    def body(_: Any, block: Any) -> Any:
        inputs, state, masks = block
        inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), inputs)
        outputs, state = run(inputs, state, *(None if mask is None else mask[:, 0] for mask in masks))
        return (), (jax.tree.map(lambda y: jnp.moveaxis(y, 2, 1), outputs), state)

    inputs = jax.tree.map(lambda x: cut(jnp.moveaxis(x, 2, 1)), inputs)
    every_head = lambda mask: cut(jnp.broadcast_to(mask[:, None], (rows, heads, length)))
    masks = tuple(None if mask is None else every_head(mask) for mask in (reset, valid))
    outputs, state = lax.scan(body, (), (inputs, jax.tree.map(cut, state), masks))[1]
    return jax.tree.map(lambda y: jnp.moveaxis(join(y), 1, 2), outputs), jax.tree.map(join, state)


def _divisor(whole: int, most: int) -> int:
    """The largest divisor that is at most `most`, and 1 at least."""
    return max(n for n in range(1, whole + 1) if whole % n == 0 and n <= max(1, most))


def _in_spans(
    recurrence: Recurrence, every: Callable[..., Any], inputs: Any, state: Any, reset: Any, valid: Any, *, chunk: int
) -> tuple[Any, Any]:
    """`scan(method="chunked")` of all rows and heads, a span of tokens of all of them at a time.

    A loop over spans inside of `jax.vmap` copies every array into another order first, and its spans fill the memory.
    """
    leaves = jax.tree.leaves((inputs, reset, valid))
    length = leaves[0].shape[1]
    tokens = TOKENS_AT_ONCE
    if jax.default_backend() == "cpu":
        tokens = min(tokens, SPAN_BYTES * length // sum(x.size * x.dtype.itemsize for x in leaves))
    size = chunk * max(1, min(length, tokens) // chunk)

    def first(inputs: Any, state: Any, reset: Any, valid: Any) -> tuple[Any, Any]:
        return jnp.zeros(1), settle(recurrence, take(inputs, 0), state)[0]

    def body(state: Any, xs: Any) -> tuple[Any, Any]:
        run = lambda inputs, state, reset, valid: span(recurrence, inputs, state, reset, valid, chunk)
        return every(run)(xs[0], state, *xs[1:])[::-1]

    state = every(first)(inputs, state, reset, valid)[1]
    state, outputs = scan_chunks(body, state, (inputs, reset, valid), length, size, axis=1)
    return outputs, state
