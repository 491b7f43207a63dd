"""GRU (arXiv 1406.1078, 1412.3555), token by token or by Newton's method."""

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

GATES = 3  # reset, update, new


@dataclasses.dataclass(frozen=True)
class GRUConfig(RecurrentConfig):
    """h of, with R_a h for h_{t-1} times each gate's matrix,

        r_t = sigmoid(W_r x_t + R_r h + b_r),  u_t = sigmoid(W_u x_t + R_u h + b_u)
        h_t = u_t h_{t-1} + (1 - u_t) tanh(W_n x_t + b_n + r_t (R_n h + b_h))

    The reset gate is applied after the product, as in cuDNN and in what is built on it, where 1406.1078 has
    R_n (r_t h); u_t keeps the old state, as there. h is the output, without a projection. Biases start at 0.
    """

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> GRU:
        return GRU(self, width, rngs=rngs)


class GRUState(NamedTuple):
    hidden: Float[Array, "*B H V"]


class GRU(RecurrentCell):
    """See `GRUConfig`."""

    recurrent_memory = Memory(("hidden",), heads=True)

    def __init__(self, config: GRUConfig, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, width, GATES, rngs=rngs)
        zeros, group = jax.nn.initializers.zeros, Group.DYNAMICS
        self.bias = param(rngs, (config.heads, GATES, self.size), zeros, group=group, axes=("heads", None, None))
        self.new_bias = param(rngs, (config.heads, self.size), zeros, group=group, axes=("heads", None))

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> GRUState:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        return GRUState(jnp.zeros((batch, self.config.heads, self.size), jnp.promote_types(dtype, jnp.float32)))

    def parameters(self) -> tuple[Array, Array, Array]:
        return self.recurrent[...], self.bias[...], self.new_bias[...]

    @staticmethod
    def step(parameters: tuple[Array, Array, Array], driven: Float[Array, "A V"], state: GRUState) -> GRUState:
        recurrent, bias, new_bias = parameters
        mixed = jnp.einsum("i,igj->gj", state.hidden, recurrent.astype(driven.dtype))
        driven = driven + bias
        reset, update = jax.nn.sigmoid(driven[:2] + mixed[:2])
        new = jnp.tanh(driven[2] + reset * (mixed[2] + new_bias))
        return GRUState(update * state.hidden + (1 - update) * new)
