"""Real and complex numbers alike, as planes: (real,) or (real, imaginary)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Planes = tuple[Any, ...]


def planes_of(x: jax.Array) -> Planes:
    return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)


def joined(planes: Planes, like: Any) -> jax.Array:
    """The numbers themselves again, in the type `like`."""
    return planes[0].astype(like) if len(planes) == 1 else jax.lax.complex(*planes).astype(like)


def wide(planes: Planes) -> Planes:
    return tuple(x.astype(jnp.float32) for x in planes)


def times(a: Planes, b: Planes) -> Planes:
    if len(a) == 1:
        return (a[0] * b[0],)
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def plus(a: Planes, b: Planes) -> Planes:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def pick(chosen: Any, a: Planes, b: Any) -> Planes:
    """`a` where chosen; elsewhere `b`, planes too or one number."""
    return tuple(jnp.where(chosen, x, y) for x, y in zip(a, b if isinstance(b, tuple) else (b,) * len(a), strict=True))


def exp(log: Planes) -> Planes:
    size = jnp.exp(log[0])
    return (size,) if len(log) == 1 else (size * jnp.cos(log[1]), size * jnp.sin(log[1]))
