"""Where state-space layers start: HiPPO-LegS and its normal part, the S4D lines, and the two discretisations."""

from __future__ import annotations

import enum
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

from seqmodels.typing import Initializer


class Discretization(enum.StrEnum):
    """How x' = A x + B u becomes a recurrence with steps of size dt."""

    ZOH = "zoh"  # u held over the step: exp(dt A), A^-1 (exp(dt A) - I) B
    BILINEAR = "bilinear"  # trapezoidal: (I - dt/2 A)^-1 (I + dt/2 A), (I - dt/2 A)^-1 dt B


class Start(enum.StrEnum):
    """Eigenvalues that S4D starts from (arXiv 2206.11893, section 4)."""

    LEGS = "legs"  # the normal part of HiPPO-LegS
    LIN = "lin"  # -1/2 + i pi n
    INV = "inv"  # -1/2 + i N/pi (N / (2n + 1) - 1)


class NormalPart(NamedTuple):
    """HiPPO-LegS = V (Lambda - P P^*) V^*, with the half of Lambda whose imaginary parts are positive.

    `eigenvalues` [N/2]; `vectors` [N, N/2], the columns of V (orthonormal); `low_rank` [N/2], V^* P; `inward` [N/2],
    V^* B. The other half of everything is the complex conjugate.
    """

    eigenvalues: np.ndarray
    vectors: np.ndarray
    low_rank: np.ndarray
    inward: np.ndarray


def hippo_legs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-LegS `(A [N, N], B [N])`: A_nk = -sqrt((2n+1)(2k+1)) for k < n, -(n+1) for k = n; B_n = sqrt(2n+1)."""
    order = np.arange(size)
    inward = np.sqrt(2.0 * order + 1)
    return -np.tril(np.outer(inward, inward), -1) - np.diag(order + 1.0), inward


def normal_part(size: int) -> NormalPart:
    """HiPPO-LegS as normal plus low rank, P_n = sqrt(n + 1/2) (arXiv 2111.00396, appendix C); `size` N is even.

    A + P P^T is -1/2 on the diagonal and skew-symmetric elsewhere, so its eigenvectors are those of a Hermitian matrix.
    """
    if size < 2 or size % 2:
        raise ValueError(f"HiPPO's eigenvalues come in conjugate pairs: the state size is even, not {size}")
    transition, inward = hippo_legs(size)
    low_rank = np.sqrt(np.arange(size) + 0.5)
    skew = transition + np.outer(low_rank, low_rank) + 0.5 * np.eye(size)
    frequencies, vectors = np.linalg.eigh(-1j * skew)
    half = slice(size // 2, None)  # ascending: the negative half comes first
    vectors = vectors[:, half]
    return NormalPart(-0.5 + 1j * frequencies[half], vectors, vectors.conj().T @ low_rank, vectors.conj().T @ inward)


def diagonal_start(start: Start, size: int) -> np.ndarray:
    """N/2 eigenvalues of one S4D channel of state size N, one of each conjugate pair."""
    if size < 2 or size % 2:
        raise ValueError(f"eigenvalues come in conjugate pairs: the state size is even, not {size}")
    order = np.arange(size // 2)
    match start:
        case Start.LEGS:
            return normal_part(size).eigenvalues
        case Start.LIN:
            return -0.5 + 1j * math.pi * order
        case Start.INV:
            return -0.5 + 1j * size / math.pi * (size / (2 * order + 1) - 1)


def discretize(
    eigenvalues: Inexact[Array, "... N"], step: Inexact[Array, "..."], method: Discretization
) -> tuple[Inexact[Array, "... N"], Inexact[Array, "... N"]]:
    """`(log of the decay, factor of B)` of a diagonal A over steps of size `step`, which broadcasts to A's shape.

    Where Re A < 0 the decay has a modulus below 1. No entry of A may be 0.
    """
    if method == Discretization.ZOH:
        rate = eigenvalues * step
        return rate, expm1(rate) / eigenvalues
    half = eigenvalues * (step / 2)
    # log((1 + s) / (1 - s)) without the rounding of 1 + s: a slow decay is a small difference from 1
    square = lambda z: jnp.square(z.real) + jnp.square(z.imag)
    modulus = 0.5 * jnp.log1p(4 * half.real / square(1 - half))
    return jax.lax.complex(modulus, jnp.arctan2(2 * half.imag, 1 - square(half))), step / (1 - half)


def expm1(z: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """exp(z) - 1 for complex z, to rounding where z is small."""
    real, imaginary = jnp.expm1(z.real), z.imag
    versine = 2 * jnp.square(jnp.sin(imaginary / 2))  # 1 - cos
    return jax.lax.complex(real - (real + 1) * versine, (real + 1) * jnp.sin(imaginary))


def log_uniform(low: float, high: float) -> Initializer:
    """log(u), log-uniform: what log step sizes start from."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))

    return init


def constant(value: Any) -> Initializer:
    """An array (or what broadcasts to the shape) as an initial value."""
    return lambda key, shape, dtype=jnp.float32: jnp.broadcast_to(jnp.asarray(value, dtype), shape)
