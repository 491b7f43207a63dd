"""Positions inside attention: rotary embeddings and linear biases."""

from __future__ import annotations

import enum
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Positions(enum.StrEnum):
    """How attention knows about order."""

    ROPE = "rope"
    NOPE = "nope"  # not at all, beyond the causal mask (arXiv 2305.19466)
    ALIBI = "alibi"


def rotated_size(head_size: int, fraction: float) -> int:
    """How many leading channels of a head are rotated: `fraction` of them, made even."""
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"the rotated fraction of a head must lie in (0, 1], not {fraction}")
    size = 2 * int(head_size * fraction / 2)
    if size == 0:
        raise ValueError(f"a fraction {fraction} of heads of size {head_size} leaves no pair of channels to rotate")
    return size


def rope(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], *, base: float = 10_000.0, fraction: float = 1.0
) -> Float[Array, "B T H K"]:
    """Rotates channel pairs (i, i + n/2) of the first n = `fraction` K channels by positions * base^(-2i/n).

    arXiv 2104.09864, with halves in place of interleaved pairs; the dot product of two rotated vectors depends on the
    difference of their positions only. Angles are computed in at least float32.
    """
    rotated = rotated_size(x.shape[-1], fraction)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    frequency = base ** (-jnp.arange(0, rotated, 2, dtype=wide) / rotated)
    angle = positions.astype(wide)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x[..., :rotated].astype(wide), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., rotated:]], axis=-1)


def alibi_slopes(heads: int) -> list[float]:
    """One slope per head: 2^(-8 (h+1) / heads) for a power of two, interpolated otherwise (arXiv 2108.12409)."""
    geometric = lambda n: [2.0 ** (-8.0 * (h + 1) / n) for h in range(n)]
    below = 2 ** int(math.log2(heads))
    return geometric(below) + geometric(2 * below)[::2][: heads - below]
