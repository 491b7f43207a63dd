"""Maps of low rank around a learnt vector, which make decays and rates depend on the data (RWKV-6 and 7)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import along_last
from seqmodels.params import Group, param
from seqmodels.typing import Initializer


class LowRank(nnx.Module):
    """y = base + f(x A) B, A of `[in_size, rank]`, B of `[rank, out_size]`, in at least float32 whatever the type of x.

    `f`: None for the identity. A starts at zero, so that y starts as `base` (None: left out). All are dynamics: they
    take no weight decay.
    """

    def __init__(
        self,
        in_size: int,
        rank: int,
        out_size: int,
        *,
        rngs: nnx.Rngs,
        base: Initializer | None,
        up: Initializer,
        f: Callable[[Array], Array] | None = None,
        axis: str | None = "heads",
    ):
        zeros, group = jax.nn.initializers.zeros, Group.DYNAMICS
        self.f = f
        self.down = param(rngs, (in_size, rank), zeros, group=group, axes=("embed", None))
        self.up = param(rngs, (rank, out_size), up, group=group, axes=(None, axis))
        self.base = None if base is None else param(rngs, (out_size,), base, group=group, axes=(axis,))

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        inner = wide @ self.down[...].astype(wide.dtype)
        y = (inner if self.f is None else self.f(inner)) @ self.up[...].astype(wide.dtype)
        return y if self.base is None else y + along_last(self.base[...], y)
