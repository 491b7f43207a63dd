"""Complex matrices between real streams and complex states, stored and multiplied as pairs of real ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Complex, Float

from seqmodels.params import Group, param
from seqmodels.typing import Initializer


class IntoComplex(nnx.Module):
    """B x, with B = real + i imaginary of `[in_size, out_size]`; in at least float32 and complex64."""

    def __init__(
        self, in_size: int, out_size: int, *, rngs: nnx.Rngs, real: Initializer, imaginary: Initializer, group: Group
    ):
        axes, shape = ("embed", "state"), (in_size, out_size)
        self.real = param(rngs, shape, real, group=group, axes=axes)
        self.imaginary = param(rngs, shape, imaginary, group=group, axes=axes)

    def __call__(self, x: Float[Array, "... D"]) -> Complex[Array, "... N"]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        both = jnp.concatenate([self.real[...], self.imaginary[...]], axis=-1).astype(x.dtype)
        return jax.lax.complex(*jnp.split(x @ both, 2, axis=-1))


class OutOfComplex(nnx.Module):
    """Re(C h), with C = real + i imaginary of `[in_size, out_size]`; in the precision of h."""

    def __init__(
        self, in_size: int, out_size: int, *, rngs: nnx.Rngs, real: Initializer, imaginary: Initializer, group: Group
    ):
        axes, shape = ("state", "embed"), (in_size, out_size)
        self.real = param(rngs, shape, real, group=group, axes=axes)
        self.imaginary = param(rngs, shape, imaginary, group=group, axes=axes)

    def __call__(self, h: Complex[Array, "... N"]) -> Float[Array, "... D"]:
        both = jnp.concatenate([self.real[...], -self.imaginary[...]], axis=0).astype(h.real.dtype)
        return jnp.concatenate([h.real, h.imag], axis=-1) @ both


def as_complex(real: Float[Array, "..."], imaginary: Float[Array, "..."]) -> Complex[Array, "..."]:
    """Two real arrays as one complex one, at least complex64."""
    wide = jnp.promote_types(jnp.result_type(real, imaginary), jnp.float32)
    return jax.lax.complex(real.astype(wide), imaginary.astype(wide))


def zeros_complex(shape: tuple[int, ...], dtype: jnp.dtype) -> Complex[Array, "..."]:
    """A state for streams of a real type: complex64, or complex128 for float64."""
    return jnp.zeros(shape, jnp.promote_types(dtype, jnp.complex64))
