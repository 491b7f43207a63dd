"""Normalisation over the last axis, computed in at least float32 and returned in the input's type."""

from __future__ import annotations

import dataclasses
import enum
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import along_last
from seqmodels.params import Group, param


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale (arXiv 1910.07467), the mean over each of `groups`; scale starts at 1.

    `zero_centred`: times 1 + scale, and scale starts at 0.
    """

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        eps: float = 1e-6,
        groups: int = 1,
        zero_centred: bool = False,
        axis: str | None = "embed",
    ):
        if width % groups:
            raise ValueError(f"a width of {width} does not divide into groups={groups}")
        self.eps = eps
        self.groups = groups
        self.offset = float(zero_centred)
        init = jax.nn.initializers.constant(1.0 - self.offset)
        self.scale = param(rngs, (width,), init, group=Group.NORM, axes=(axis,))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        grouped = wide.reshape(*x.shape[:-1], self.groups, -1)
        power = jnp.mean(jnp.square(grouped), axis=-1, keepdims=True)
        y = (grouped * jax.lax.rsqrt(power + self.eps)).reshape(x.shape)
        return (y * (self.offset + along_last(self.scale[...], y))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """y = (x - mean) / sqrt(var + eps) * scale + bias (arXiv 1607.06450); biased variance.

    Mean and variance run over each of `groups` (heads); `bias` False leaves the bias out.
    """

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        eps: float = 1e-5,
        groups: int = 1,
        bias: bool = True,
        axis: str | None = "embed",
    ):
        if width % groups:
            raise ValueError(f"a width of {width} does not divide into groups={groups}")
        self.eps = eps
        self.groups = groups
        own = functools.partial(param, rngs, (width,), group=Group.NORM, axes=(axis,))
        self.scale = own(jax.nn.initializers.ones)
        self.bias = own(jax.nn.initializers.zeros) if bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(*x.shape[:-1], self.groups, -1)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        y = y.reshape(x.shape)
        y = y * along_last(self.scale[...], y)
        return (y if self.bias is None else y + along_last(self.bias[...], y)).astype(x.dtype)


class NormKind(enum.StrEnum):
    RMS = "rms"
    LAYER = "layer"


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """An RMSNorm, or a LayerNorm with or without a bias. `zero_centred`: the RMSNorm multiplies by 1 + scale."""

    kind: NormKind = NormKind.RMS
    eps: float = 1e-6
    zero_centred: bool = False
    bias: bool = True

    def __post_init__(self):
        if self.kind not in list(NormKind):
            raise ValueError(f"unknown norm {self.kind!r}; choose one of {[str(kind) for kind in NormKind]}")
        if self.eps <= 0:
            raise ValueError(f"a norm's eps must be positive, not {self.eps}")
        if self.zero_centred and self.kind != NormKind.RMS:
            raise ValueError("zero_centred belongs to kind='rms': a LayerNorm's scale starts at 1")

    def make(self, width: int, *, rngs: nnx.Rngs, axis: str | None = "embed") -> RMSNorm | LayerNorm:
        if self.kind == NormKind.RMS:
            return RMSNorm(width, rngs=rngs, eps=self.eps, zero_centred=self.zero_centred, axis=axis)
        return LayerNorm(width, rngs=rngs, eps=self.eps, bias=self.bias, axis=axis)
