"""LSTM with a forget gate (Hochreiter & Schmidhuber 1997; Gers et al. 2000), token by token or by Newton's method."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.recurrent import RecurrentCell, RecurrentConfig
from seqmodels.params import Group, param
from seqmodels.typing import Memory

GATES = 4  # input, forget, cell, output


@dataclasses.dataclass(frozen=True)
class LSTMConfig(RecurrentConfig):
    """h of, with a_t = W_a x_t + R_a h_{t-1} + b_a for each gate a,

        c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(z_t),  h_t = sigmoid(o_t) tanh(c_t)

    without peepholes, and without an output projection: h is the output, as published. `forget_bias`: b_f at the start,
    1 as in Jozefowicz et al. (2015); other biases are 0.
    """

    forget_bias: float = 1.0

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> LSTM:
        return LSTM(self, width, rngs=rngs)


class LSTMState(NamedTuple):
    hidden: Float[Array, "*B H V"]
    cell: Float[Array, "*B H V"]


class LSTM(RecurrentCell):
    """See `LSTMConfig`."""

    recurrent_memory = Memory(("hidden", "cell"), heads=True)

    def __init__(self, config: LSTMConfig, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, width, GATES, rngs=rngs)

        def init_bias(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return jnp.zeros(shape, dtype).at[:, 1].set(config.forget_bias)

        shape = (config.heads, GATES, self.size)
        self.bias = param(rngs, shape, init_bias, group=Group.DYNAMICS, axes=("heads", None, None))

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> LSTMState:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        zeros = jnp.zeros((batch, self.config.heads, self.size), jnp.promote_types(dtype, jnp.float32))
        return LSTMState(zeros, zeros)

    def parameters(self) -> tuple[Array, Array]:
        return self.recurrent[...], self.bias[...]

    @staticmethod
    def step(parameters: tuple[Array, Array], driven: Float[Array, "A V"], state: LSTMState) -> LSTMState:
        recurrent, bias = parameters
        i, f, z, o = driven + jnp.einsum("i,igj->gj", state.hidden, recurrent.astype(driven.dtype)) + bias
        cell = jax.nn.sigmoid(f) * state.cell + jax.nn.sigmoid(i) * jnp.tanh(z)
        return LSTMState(jax.nn.sigmoid(o) * jnp.tanh(cell), cell)
