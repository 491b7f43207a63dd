"""Inverses of unit lower triangular matrices, which the chunk forms of delta rules are solved with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels import compat
from seqmodels.operators.decayed import exact


@jax.custom_jvp
def inverse_of_unit_lower(lower: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """(I + lower)^-1 for a strictly lower triangular matrix, in the type of `lower`.

    Forward substitution in blocks of 16 rows, which are then merged pairwise: [[a, 0], [c, b]]^-1 = [[a^-1, 0],
    [-b^-1 c a^-1, b^-1]]. All blocks at once in matrix products, where LAPACK's solver (jax on CPU) is a thousand
    times slower as soon as products underflow, which strong decays make them do.
    """
    length = lower.shape[0]
    padded = 1 << (length - 1).bit_length()
    size = min(16, padded)
    lower = jnp.pad(lower, (0, padded - length))
    blocks = _diagonal_blocks(lower, size)

    def substitute(inverse: Array, t: Array) -> tuple[Array, None]:
        row = jnp.eye(size, dtype=lower.dtype)[t][None] - jnp.sum(blocks[:, t, :, None] * inverse, axis=1)
        return inverse.at[:, t].set(row), None

    nothing = compat.vary_over(jnp.zeros_like(blocks), compat.varying_axes(blocks))
    inverse, _ = jax.lax.scan(substitute, nothing, jnp.arange(size))
    while size < padded:
        size *= 2
        first, second = inverse[0::2], inverse[1::2]
        below = _diagonal_blocks(lower, size)[:, size // 2 :, : size // 2]
        corner = -exact("nij,njk->nik", second, exact("nij,njk->nik", below, first))
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=2)
        inverse = jnp.concatenate([upper, jnp.concatenate([corner, second], axis=2)], axis=1)
    return inverse[0, :length, :length]


def _diagonal_blocks(x: Float[Array, "C C"], size: int) -> Float[Array, "N S S"]:
    count = x.shape[0] // size
    return jnp.moveaxis(jnp.diagonal(x.reshape(count, size, count, size), axis1=0, axis2=2), 2, 0)


@inverse_of_unit_lower.defjvp
def _inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = inverse_of_unit_lower(*primals)
    return inverse, -inverse @ tangents[0] @ inverse
