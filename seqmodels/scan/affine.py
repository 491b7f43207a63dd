"""The affine scan d_t = A_t d_{t-1} + b_t that a Newton iteration is, with dense or diagonal A."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from seqmodels.scan.associative import associative
from seqmodels.scan.auto import choose
from seqmodels.scan.chunked import DEFAULT_CHUNK, chunked
from seqmodels.scan.recurrence import Recurrence
from seqmodels.scan.sequential import sequential


def affine_scan(matrix: Float[Array, "T N *N"], drive: Float[Array, "T N"], method: str) -> Float[Array, "T N"]:
    """d_t = matrix_t d_{t-1} + drive_t from d = 0, matrices [N, N] or their diagonals [N]; `method` as in `scan`."""
    dense = matrix.ndim == 3
    # An accelerator's short products would turn into errors of gradients.
    times = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST) if dense else jnp.multiply

    def identity(element: tuple[Array, Array]) -> tuple[Array, Array]:
        ones = jnp.eye(element[0].shape[0], dtype=matrix.dtype) if dense else jnp.ones_like(element[0])
        return ones, jnp.zeros_like(element[1])

    recurrence = Recurrence(
        elements=lambda x: x,
        combine=lambda a, b: (times(b[0], a[0]), times(b[0], a[1]) + b[1]),
        identity=identity,
        act=lambda e, s: times(e[0], s) + e[1],
    )
    method = choose(matmul_form=False, length=drive.shape[0]) if method == "auto" else method
    arguments = (recurrence, (matrix, drive), jnp.zeros_like(drive[0]), None, None)
    if method == "chunked":
        return chunked(*arguments, DEFAULT_CHUNK)[0]
    return (sequential if method == "sequential" else associative)(*arguments)[0]
