"""What follows a state-space layer: GELU, and one of the gates that its papers use."""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import Linear


class Output(enum.StrEnum):
    """With g = GELU(y), in its tanh approximation, and W with a bias (S5, arXiv 2208.04933, appendix G)."""

    FULL_GLU = "full_glu"  # (W1 g) * sigmoid(W2 g), the GLU of S4, S4D and LRU
    HALF_GLU1 = "half_glu1"  # g * sigmoid(W g)
    HALF_GLU2 = "half_glu2"  # y * sigmoid(W g)
    GELU = "gelu"  # g


def check_output(kind: str) -> None:
    """Raises ValueError on an unknown output."""
    if kind not in list(Output):
        raise ValueError(f"unknown output {kind!r}; choose one of {', '.join(Output)}")


class GatedOutput(nnx.Module):
    """See `Output`. The full GLU's two maps are one matrix, the value's columns first."""

    def __init__(self, width: int, kind: Output, *, rngs: nnx.Rngs):
        self.kind = Output(kind)
        size = {Output.FULL_GLU: 2 * width, Output.GELU: 0}.get(self.kind, width)
        self.map = Linear(width, size, rngs=rngs, axes=("embed", "heads"), bias=True) if size else None

    def __call__(self, y: Float[Array, "... D"], dtype: jnp.dtype) -> Float[Array, "... D"]:
        """The matrix product has the type `dtype`, as the result has; the rest that of y."""
        g = jax.nn.gelu(y, approximate=True)
        if self.map is None:
            return g.astype(dtype)
        mapped = self.map(g.astype(dtype)).astype(y.dtype)
        gate = jax.nn.sigmoid(mapped[..., -y.shape[-1] :])
        value = {Output.HALF_GLU1: g, Output.HALF_GLU2: y}.get(self.kind, mapped[..., : y.shape[-1]])
        return (value * gate).astype(dtype)
