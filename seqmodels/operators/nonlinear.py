"""Cells whose state enters its own update nonlinearly (LSTM, GRU, sLSTM): token by token, or by Newton's method."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqmodels import compat
from seqmodels.scan import Newton, NewtonReport, check_converged, newton_scan
from seqmodels.scan.recurrence import cast_like, precise, select, take
from seqmodels.typing import Segments

METHODS = ("sequential", "newton")


def check_cell_method(method: str) -> None:
    """Raises ValueError on what no nonlinear cell can run; for configs, before anything is built."""
    if method not in METHODS:
        raise ValueError(
            f"unknown method {method!r} for a nonlinear cell, whose steps cannot be combined: "
            f"choose one of {', '.join(METHODS)}"
        )


def refuse_sharded_time(cell: str, axis: str | None, instead: str) -> None:
    """Raises ValueError where time is sharded over a mesh axis."""
    if axis is not None:
        raise ValueError(
            f"the time of {cell} cannot be sharded over the mesh axis {axis!r}, because its state enters its own "
            "update nonlinearly: a span of tokens has no element that could be handed on. "
            f"Shard the batch instead, or use {instead}"
        )


def nonlinear_scan(
    step: Callable[[Any, Any, Any], Any],
    parameters: Any,
    inputs: Any,
    state: Any,
    *,
    initial: Any,
    segments: Segments,
    read: Callable[[Any], Any] = lambda state: state,
    method: str = "sequential",
    newton: Newton | None = None,
) -> tuple[Any, Any, NewtonReport | None]:
    """s_t = step(parameters, x_t, s_{t-1}) of every row and head: `(read(s) [B, T, H, ...], state, report)`.

    `step` is written for one head of one sequence, from parameters [H, ...], inputs [B, T, H, ...], states [B, H, ...];
    `initial` is the state of one head before any token. States are at least float32. `report` is None unless `method`
    is newton; outside `jit` that raises `NotConvergedError` where it has not converged, under `jit` it gives NaN.
    """
    check_cell_method(method)
    newton = newton or Newton()
    parameters, inputs, state, initial, segments = compat.vary_alike((parameters, inputs, state, initial, segments))
    run = functools.partial(_newton, newton=newton) if method == "newton" else _sequential

    def head(parameters: Any, inputs: Any, state: Any, segments: Segments) -> Any:
        return run(functools.partial(step, parameters), inputs, state, initial, segments, read)

    heads = jax.vmap(head, in_axes=(0, 1, 0, None), out_axes=((1, 0, 0)))
    outputs, state, report = jax.vmap(heads, in_axes=(None, 0, 0, 0))(parameters, inputs, state, segments)
    if report is not None:
        check_converged(report, newton)
    return outputs, state, report


def _sequential(
    step: Callable[[Any, Any], Any], inputs: Any, state: Any, initial: Any, segments: Segments, read: Any
) -> tuple[Any, Any, None]:
    after = jax.eval_shape(lambda x, s: precise(step(x, s)), take(inputs, 0), precise(state))
    state = jax.tree.map(lambda a, s: a.astype(jnp.promote_types(a.dtype, s.dtype)), state, after)

    def body(state: Any, token: tuple[Any, Any, Any]) -> tuple[Any, Any]:
        inputs, start, valid = token
        before = select(start, initial, state)
        after = cast_like(step(inputs, before), state)
        return select(valid, after, before), read(after)

    state, outputs = jax.lax.scan(body, state, (inputs, segments.start, segments.valid))
    return outputs, state, None


def _newton(
    step: Callable[[Any, Any], Any],
    inputs: Any,
    state: Any,
    initial: Any,
    segments: Segments,
    read: Any,
    *,
    newton: Newton,
) -> tuple[Any, Any, NewtonReport]:
    states, report = newton_scan(
        step, inputs, state, initial=initial, reset=segments.start, valid=segments.valid, newton=newton
    )
    return jax.vmap(read)(states), take(states, -1), report
