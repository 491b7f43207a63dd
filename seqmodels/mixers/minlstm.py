"""minLSTM: an LSTM whose gates see the input alone and share the weight of 1 between them (arXiv 2410.01201)."""

from __future__ import annotations

import dataclasses
import functools

import jax
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.elementwise import ElementwiseCell, ElementwiseConfig, positive, wide
from seqmodels.layers.linear import Linear, along_last
from seqmodels.params import Group, param


@dataclasses.dataclass(frozen=True)
class MinLSTMConfig(ElementwiseConfig):
    """out(h), with, element by element (section 3.2; the candidate as in the log-space form of the appendix)

        f_t = sigmoid(W_f x_t + b_f),  i_t = sigmoid(W_i x_t + b_i)
        h_t = f_t / (f_t + i_t) h_{t-1} + i_t / (f_t + i_t) g(W_h x_t)
        g(u) = u + 1/2 where u >= 0, else sigmoid(u)

    Both weights are sigmoids of log f_t - log i_t, and the decay's log is taken in closed form. `positive` False takes
    the candidate as it is. A document starts from h = 0. `forget_bias`: b_f at the start, which the paper finds to
    speed training where it is large; b_i starts at 0.
    """

    positive: bool = True
    forget_bias: float = 0.0

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> MinLSTM:
        return MinLSTM(self, width, rngs=rngs)


class MinLSTM(ElementwiseCell):
    """See `MinLSTMConfig`."""

    config: MinLSTMConfig

    def __init__(self, config: MinLSTMConfig, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, width, rngs=rngs)
        inner = functools.partial(Linear, width, self.size, rngs=rngs, axes=("embed", "recurrent"))
        self.forget = inner()
        self.input = inner()
        self.candidate = inner()
        bias = functools.partial(param, rngs, (self.size,), group=Group.DYNAMICS, axes=("recurrent",))
        self.forget_bias = bias(jax.nn.initializers.constant(config.forget_bias))
        self.input_bias = bias(jax.nn.initializers.zeros)

    def recurrence(self, x: Float[Array, "B T I"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        forget, gate, candidate = (wide(layer(x)) for layer in (self.forget, self.input, self.candidate))
        forget += along_last(self.forget_bias[...], forget)
        gate += along_last(self.input_bias[...], gate)
        lead = jax.nn.log_sigmoid(gate) - jax.nn.log_sigmoid(forget)  # log(i / f)
        candidate = positive(candidate) if self.config.positive else candidate
        return -jax.nn.softplus(lead), jax.nn.sigmoid(lead) * candidate
