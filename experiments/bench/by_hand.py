"""Recurrences written by hand from their equations: loops over tokens, and associative scans over all states.

Those of matrix states take one head's arrays [T, ...], the diagonal ones [B, T, D].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def _empty(key: Any, value: Any) -> Any:
    return jnp.zeros((key.shape[-1], value.shape[-1]), value.dtype)


def outer(query: Any, key: Any, value: Any, log_decay: Any) -> Any:
    """S' = a S + k v^T, read by q; log_decay is [T], or [T, K]."""

    def body(state: Any, x: Any) -> Any:
        query, key, value, log_decay = x
        state = jnp.exp(log_decay)[..., None] * state + key[:, None] * value[None]
        return state, query @ state

    if log_decay.ndim == 1:
        log_decay = log_decay[:, None]
    return jax.lax.scan(body, _empty(key, value), (query, key, value, log_decay))[1]


def associative_outer(query: Any, key: Any, value: Any, log_decay: Any) -> Any:
    """The same with the states of all steps in memory."""

    def combine(a: Any, b: Any) -> Any:
        return a[0] * b[0], b[0] * a[1] + b[1]

    kept = jnp.exp(log_decay.reshape(len(key), -1, 1))
    _, states = jax.lax.associative_scan(combine, (kept, key[:, :, None] * value[:, None]))
    return jnp.einsum("tk,tkv->tv", query, states)


def delta(query: Any, key: Any, value: Any, beta: Any, log_decay: Any) -> Any:
    def body(state: Any, x: Any) -> Any:
        query, key, value, beta, log_decay = x
        state = jnp.exp(log_decay) * state
        state = state + beta * key[:, None] * (value - key @ state)[None]
        return state, query @ state

    return jax.lax.scan(body, _empty(key, value), (query, key, value, beta, log_decay))[1]


def mlstm(query: Any, key: Any, value: Any, log_input: Any, log_forget: Any) -> Any:
    """Without a stabiliser: gates this small need none."""

    def body(state: Any, x: Any) -> Any:
        query, key, value, log_input, log_forget = x
        memory, normaliser = state
        keep, add = jnp.exp(log_forget), jnp.exp(log_input) * key
        memory, normaliser = keep * memory + add[:, None] * value[None], keep * normaliser + add
        return (memory, normaliser), query @ memory / jnp.maximum(jnp.abs(query @ normaliser), 1)

    start = _empty(key, value), jnp.zeros(key.shape[-1], value.dtype)
    return jax.lax.scan(body, start, (query, key, value, log_input, log_forget))[1]


def selective(x: Any, dt: Any, a: Any, b: Any, c: Any) -> Any:
    """Mamba-1's scan of one row: [T, D] with a [D, N], b and c [T, N]."""

    def body(hidden: Any, step: Any) -> Any:
        x, dt, b, c = step
        hidden = jnp.exp(dt[:, None] * a) * hidden + (dt * x)[:, None] * b[None]
        return hidden, hidden @ c

    return jax.lax.scan(body, jnp.zeros(a.shape, x.dtype), (x, dt, b, c))[1]


def diagonal(log_decay: Any, drive: Any) -> Any:
    """h' = a h + b."""

    def body(hidden: Any, x: Any) -> Any:
        hidden = jnp.exp(x[0]) * hidden + x[1]
        return hidden, hidden

    over_time = lambda x: jnp.moveaxis(x, 1, 0)
    start = jnp.zeros_like(drive[:, 0])
    return over_time(jax.lax.scan(body, start, (over_time(log_decay), over_time(drive)))[1])


def associative_diagonal(log_decay: Any, drive: Any) -> Any:
    combine = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
    return jax.lax.associative_scan(combine, (jnp.exp(log_decay), drive), axis=1)[1]
