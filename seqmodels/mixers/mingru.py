"""minGRU: a GRU whose gate and candidate see the input alone, so that its time is a linear scan (arXiv 2410.01201)."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.elementwise import ElementwiseCell, ElementwiseConfig, positive, wide
from seqmodels.layers.linear import Linear


@dataclasses.dataclass(frozen=True)
class MinGRUConfig(ElementwiseConfig):
    """out(h), with, element by element (section 3.1; the candidate as in the log-space form of the appendix)

        z_t = sigmoid(W_z x_t + b_z),  h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t)
        g(u) = u + 1/2 where u >= 0, else sigmoid(u)

    The decay reaches the scan as log(1 - z_t) = -softplus(.), so a closed gate keeps all its digits. `positive` False
    takes the candidate W_h x_t as it is (the paper's plain form). A document starts from h = 0, where the paper's code
    starts from g(0). `expansion` is the paper's state expansion, `out` the projection back from it.
    """

    positive: bool = True

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> MinGRU:
        return MinGRU(self, width, rngs=rngs)


class MinGRU(ElementwiseCell):
    """See `MinGRUConfig`."""

    config: MinGRUConfig

    def __init__(self, config: MinGRUConfig, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, width, rngs=rngs)
        self.gate = Linear(width, self.size, rngs=rngs, axes=("embed", "recurrent"), bias=True)
        self.candidate = Linear(width, self.size, rngs=rngs, axes=("embed", "recurrent"))

    def recurrence(self, x: Float[Array, "B T I"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        gate, candidate = wide(self.gate(x)), wide(self.candidate(x))
        candidate = positive(candidate) if self.config.positive else candidate
        return -jax.nn.softplus(gate), jax.nn.sigmoid(gate) * candidate
