"""The diagonal recurrence on CPUs: a loop over steps that reads and writes every array where it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Inexact

from seqmodels import compat


@jax.custom_vjp
def diagonal_loop(
    log_decay: Inexact[Array, "B T D"],
    drive: Inexact[Array, "B T D"],
    state: Inexact[Array, "B D"],
    reset: Bool[Array, "B T"] | None,
) -> Inexact[Array, "B T D"]:
    """h_t = exp(log_decay_t) h_{t-1} + drive_t, and h_t = drive_t where `reset`; all of one type, float32 at least.

    `lax.scan` brings every array into the order of its steps before, and every result back after it, and each such copy
    moves as much as the recurrence has to. The gradient keeps what came in and h alone:

        dx_t = dh_t + exp(g_{t+1}) dx_{t+1}        dg_t = dx_t exp(g_t) h_{t-1}
    """
    return _forward(log_decay, drive, state, reset)[0]


def _zeros(like: Array) -> Array:
    return compat.vary_over(jnp.zeros_like(like), compat.varying_axes(like))


def _at(x: Array, step: Any) -> Array:
    return lax.dynamic_index_in_dim(x, step, axis=1, keepdims=False)


def _put(x: Array, part: Array, step: Any) -> Array:
    return lax.dynamic_update_index_in_dim(x, part, step, axis=1)


def _unless_reset(x: Array, reset: Array | None, step: Any) -> Array:
    """`x`, and zero where the recurrence starts again, whatever was there: a factor of zero would leave NaN."""
    return x if reset is None else jnp.where(_at(reset, step)[:, None], 0, x)


def _forward(log_decay: Array, drive: Array, state: Array, reset: Array | None) -> tuple[Array, Any]:
    def step(t: Any, carry: Any) -> Any:
        hidden, out = carry
        hidden = jnp.exp(_at(log_decay, t)) * _unless_reset(hidden, reset, t) + _at(drive, t)
        return hidden, _put(out, hidden, t)

    out = lax.fori_loop(0, drive.shape[1], step, (state, _zeros(drive)))[1]
    return out, (log_decay, state, reset, out)


def _backward(residuals: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    log_decay, state, reset, out = residuals
    last = d_out.shape[1] - 1

    def step(n: Any, carry: Any) -> Any:
        flowing, d_log, d_drive = carry
        t = last - n
        gradient = _at(d_out, t) + flowing
        flowing = _unless_reset(jnp.exp(_at(log_decay, t)) * gradient, reset, t)
        before = _unless_reset(jnp.where(t == 0, state, _at(out, jnp.maximum(t - 1, 0))), reset, t)
        return flowing, _put(d_log, flowing * before, t), _put(d_drive, gradient, t)

    start = (_zeros(d_out[:, 0]), _zeros(d_out), _zeros(d_out))
    flowing, d_log, d_drive = lax.fori_loop(0, last + 1, step, start)
    return d_log, d_drive, flowing, None


diagonal_loop.defvjp(_forward, _backward)
