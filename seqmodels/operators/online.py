"""Gradients of a diagonal recurrence forward in time: real-time recurrent learning (RTRL) with exact, small traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float

from seqmodels.scan.recurrence import select

Parameters = Any
Unit = Callable[[Parameters], tuple[Complex[Array, "N"], Complex[Array, "D N"]]]
Readout = Callable[[Parameters, Complex[Array, "B N"], Float[Array, "B D"]], Float[Array, "B"]]


class Traces(NamedTuple):
    """`hidden` h and its derivatives: `by_rate` to the log of the decay, `by_inward` to the input matrix."""

    hidden: Complex[Array, "B N"]
    by_rate: Complex[Array, "B N"]
    by_inward: Complex[Array, "B D N"]


def empty_traces(batch: int, inputs: int, size: int, dtype: Any = jnp.complex64) -> Traces:
    """Of a recurrence with `size` states over `inputs` channels, before any token."""
    zeros = lambda *shape: jnp.zeros(shape, dtype)
    return Traces(zeros(batch, size), zeros(batch, size), zeros(batch, inputs, size))


def online_step(
    unit: Unit,
    readout: Readout,
    parameters: Parameters,
    traces: Traces,
    x: Float[Array, "B D"],
    *,
    reset: Bool[Array, "B"] | None = None,
    valid: Bool[Array, "B"] | None = None,
) -> tuple[Float[Array, ""], Parameters, Traces]:
    """One step of h_t = exp(rate) h_{t-1} + x_t W and of its gradient: `(loss_t, gradient of loss_t, traces)`.

    `unit(parameters)` gives (rate [N], W [D, N]), `readout(parameters, h_t, x_t)` each row's loss [B]: anything that
    looks at this step alone. Because the recurrence is diagonal, each state depends on its own decay and its own column
    of W only, and the derivatives of h are as many numbers as W has, carried along (arXiv 2305.15947):

        dh_t/drate = exp(rate) (dh_{t-1}/drate + h_{t-1}),    dh_t/dW = exp(rate) dh_{t-1}/dW + x_t

    The sum of the returned gradients over a sequence is what backpropagation through it gives, for as long as the
    parameters stay as they are; memory does not grow with time. `reset`: the row forgets what came before this step;
    `valid` False: its step changes nothing and has no loss.
    """
    (rate, inward), pull = jax.vjp(unit, parameters)
    if reset is not None:
        traces = select(reset, jax.tree.map(jnp.zeros_like, traces), traces)
    x = x if valid is None else jnp.where(valid[:, None], x, 0)
    decay = jnp.exp(rate)[None]
    after = Traces(
        decay * traces.hidden + x.astype(inward.dtype) @ inward,
        decay * (traces.by_rate + traces.hidden),
        decay[:, None] * traces.by_inward + x[..., None],
    )
    after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, traces)
    after = after if valid is None else select(valid, after, traces)

    def loss(parameters: Parameters, hidden: Array) -> Array:
        losses = readout(parameters, hidden, x)
        return jnp.sum(losses if valid is None else jnp.where(valid, losses, 0))

    value, (local, slope) = jax.value_and_grad(loss, (0, 1))(parameters, after.hidden)
    by_rate = jnp.sum(slope * after.by_rate, axis=0)
    by_inward = jnp.einsum("bn,bdn->dn", slope, after.by_inward, precision="highest")
    (through,) = pull((by_rate.astype(rate.dtype), by_inward.astype(inward.dtype)))
    return value, jax.tree.map(jnp.add, local, through), after
