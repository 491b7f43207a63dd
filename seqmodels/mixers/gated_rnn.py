"""The element-wise gated RNN with an output gate, as QRNN pools over tokens (arXiv 1611.01576): a linear scan."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.elementwise import ElementwiseCell, ElementwiseConfig, wide
from seqmodels.layers.linear import Linear, along_last
from seqmodels.params import Group, param


@dataclasses.dataclass(frozen=True)
class GatedRNNConfig(ElementwiseConfig):
    """out(o_t c_t), with, element by element (1611.01576, `fo`-pooling, with filters of one token)

        f_t = sigmoid(W_f x_t + b_f),  o_t = sigmoid(W_o x_t)
        c_t = f_t c_{t-1} + (1 - f_t) tanh(W_z x_t)

    or, with `input_gate` (`ifo`-pooling): c_t = f_t c_{t-1} + sigmoid(W_i x_t) tanh(W_z x_t).
    It is the element-wise gated RNN, diag(a_t) c + b_t, of prefix-scannable models (2506.10918). minGRU differs: its
    candidate is positive or plain instead of tanh, and it has no output gate. SRU (1709.02755) has this cell and adds
    a highway around it, which here is the residual stream. QRNN has no `out`: it comes with `expansion`. `forget_bias`
    is b_f at the start; 1 remembers, as in an LSTM.
    """

    input_gate: bool = False
    forget_bias: float = 1.0

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> GatedRNN:
        return GatedRNN(self, width, rngs=rngs)


class GatedRNN(ElementwiseCell):
    """See `GatedRNNConfig`."""

    def __init__(self, config: GatedRNNConfig, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, width, rngs=rngs)
        inner = functools.partial(Linear, width, self.size, rngs=rngs, axes=("embed", "recurrent"))
        self.forget = inner()
        self.input = inner() if config.input_gate else None
        self.candidate = inner()
        self.output = inner()
        init = jax.nn.initializers.constant(config.forget_bias)
        self.forget_bias = param(rngs, (self.size,), init, group=Group.DYNAMICS, axes=("recurrent",))

    def recurrence(self, x: Float[Array, "B T I"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        forget = wide(self.forget(x))
        forget += along_last(self.forget_bias[...], forget)
        gate = -forget if self.input is None else wide(self.input(x))
        return jax.nn.log_sigmoid(forget), jax.nn.sigmoid(gate) * jnp.tanh(wide(self.candidate(x)))

    def read(self, hidden: Float[Array, "B T D"], x: Float[Array, "B T I"]) -> Float[Array, "B T D"]:
        return jax.nn.sigmoid(wide(self.output(x))) * hidden
