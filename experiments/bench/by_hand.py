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


def bonus(query: Any, key: Any, value: Any, log_decay: Any, bonus: Any) -> Any:
    """RWKV-6: q reads S + diag(u) k v^T, then S' = a S + k v^T; log_decay is [T, K], u [K], or [T, K]."""

    def body(state: Any, x: Any) -> Any:
        query, key, value, log_decay = x
        return jnp.exp(log_decay)[:, None] * state + key[:, None] * value[None], query @ state

    before = jax.lax.scan(body, _empty(key, value), (query, key, value, log_decay))[1]
    return before + _own(query, key, value, bonus)


def _own(query: Any, key: Any, value: Any, bonus: Any) -> Any:
    return jnp.sum(query * jnp.broadcast_to(bonus, key.shape) * key, axis=1, keepdims=True) * value


def _combine(a: Any, b: Any) -> Any:
    return a[0] * b[0], b[0] * a[1] + b[1]


def _states(key: Any, value: Any, log_decay: Any) -> Any:
    """After each step, all of them in memory, of the decays' type."""
    kept = jnp.exp(log_decay.reshape(len(key), -1, 1))
    key, value = key.astype(kept.dtype), value.astype(kept.dtype)
    return jax.lax.associative_scan(_combine, (kept, key[:, :, None] * value[:, None]))[1]


def associative_outer(query: Any, key: Any, value: Any, log_decay: Any) -> Any:
    return jnp.einsum("tk,tkv->tv", query, _states(key, value, log_decay)).astype(value.dtype)


def associative_bonus(query: Any, key: Any, value: Any, log_decay: Any, bonus: Any) -> Any:
    states = _states(key, value, log_decay)
    before = jnp.concatenate([jnp.zeros_like(states[:1]), states[:-1]])
    read = jnp.einsum("tk,tkv->tv", query, before)
    return (read + _own(query, key, value, bonus)).astype(value.dtype)


def associative_mlstm(query: Any, key: Any, value: Any, log_input: Any, log_forget: Any) -> Any:
    """The normaliser is the memory of a value that is always 1."""
    values = jnp.concatenate([value, jnp.ones_like(value[:, :1])], axis=1)
    states = _states(jnp.exp(log_input)[:, None] * key, values, log_forget)
    read = jnp.einsum("tk,tkv->tv", query, states)
    return (read[:, :-1] / jnp.maximum(jnp.abs(read[:, -1:]), 1)).astype(value.dtype)


def delta(query: Any, key: Any, value: Any, beta: Any, log_decay: Any) -> Any:
    """S' = S + beta k (v - S^T k)^T of the decayed S; log_decay is [T], or [T, K]."""

    def body(state: Any, x: Any) -> Any:
        query, key, value, beta, log_decay = x
        state = jnp.exp(log_decay)[..., None] * state
        state = state + beta * key[:, None] * (value - key @ state)[None]
        return state, query @ state

    if log_decay.ndim == 1:
        log_decay = log_decay[:, None]
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


def associative_selective(x: Any, dt: Any, a: Any, b: Any, c: Any) -> Any:
    """The same of all rows, [B, T, D] and [B, T, N], with the states of all steps in memory."""
    elements = jnp.exp(dt[..., None] * a[None, None]), (dt * x)[..., None] * b[:, :, None]
    return jnp.einsum("btdn,btn->btd", jax.lax.associative_scan(_combine, elements, axis=1)[1], c)


def diagonal(log_decay: Any, drive: Any) -> Any:
    """h' = a h + b, real or complex."""

    def body(hidden: Any, x: Any) -> Any:
        hidden = jnp.exp(x[0]) * hidden + x[1]
        return hidden, hidden

    over_time = lambda x: jnp.moveaxis(x, 1, 0)
    start = jnp.zeros_like(drive[:, 0])
    return over_time(jax.lax.scan(body, start, (over_time(log_decay), over_time(drive)))[1])


def associative_diagonal(log_decay: Any, drive: Any) -> Any:
    return jax.lax.associative_scan(_combine, (jnp.exp(log_decay), drive), axis=1)[1]
