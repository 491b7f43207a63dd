"""Linear maps over the last axis: dense and block-diagonal. Parameters are float32, products have the input's type."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.params import Group, param
from seqmodels.typing import Initializer

LECUN = jax.nn.initializers.lecun_normal()


def scaled(variance: float) -> Initializer:
    """LeCun-normal with its variance multiplied: how outputs into the residual stream are kept small in deep models."""
    return jax.nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal")


def uniform(share: float = 1.0) -> Initializer:
    """Uniform in +-sqrt(share / fan-in), a variance of share / 3: with 1, what torch's linear maps start with."""
    return jax.nn.initializers.variance_scaling(share / 3, "fan_in", "uniform")


def along_last(vector: Float[Array, "D"], like: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """A vector with the leading axes that it needs to meet `like`, in the type of `like`."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def product(x: Float[Array, "... I"], kernel: Float[Array, "I O"]) -> Float[Array, "... O"]:
    """x @ kernel with all leading axes as one. The gradient of the kernel is then a product of two matrices, which XLA
    multiplies as they lie; over several axes it first writes a transposed copy of the gradient of y, and on CPUs
    evaluates all that leads to that (an activation's derivative) in its strided order, at 20 times the time."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[1])


class Linear(nnx.Module):
    """y = x W (+ b) over the last axis, W of `[in_size, out_size]`."""

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        rngs: nnx.Rngs,
        axes: tuple[str | None, str | None] = ("embed", "mlp"),
        bias: bool = False,
        init: Initializer | None = None,
    ):
        self.kernel = param(rngs, (in_size, out_size), init or LECUN, group=Group.MATRIX, axes=axes)
        zeros = jax.nn.initializers.zeros
        self.bias = param(rngs, (out_size,), zeros, group=Group.BIAS, axes=axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y = product(x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + along_last(self.bias[...], y)


class BlockDiagonalLinear(nnx.Module):
    """y = x W (+ b) with W of `blocks` equal square blocks on the diagonal (gates of the RG-LRU, arXiv 2402.19427)."""

    def __init__(
        self,
        size: int,
        blocks: int,
        *,
        rngs: nnx.Rngs,
        axis: str | None = "recurrent",
        init: Initializer | None = None,
        bias: bool = True,
        group: Group = Group.MATRIX,
        bias_group: Group = Group.BIAS,
    ):
        if size % blocks:
            raise ValueError(f"a width of {size} does not divide into {blocks} equal blocks; choose a divisor")
        block = size // blocks
        init = init or jax.nn.initializers.lecun_normal(batch_axis=0)
        self.kernel = param(rngs, (blocks, block, block), init, group=group, axes=(axis, None, None))
        zeros = jax.nn.initializers.zeros
        self.bias = param(rngs, (size,), zeros, group=bias_group, axes=(axis,)) if bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        kernel = self.kernel[...].astype(x.dtype)
        blocked = x.reshape(*x.shape[:-1], *kernel.shape[:2])
        y = jnp.einsum("...hi,hij->...hj", blocked, kernel).reshape(x.shape)
        return y if self.bias is None else y + along_last(self.bias[...], y)
