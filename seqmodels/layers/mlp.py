"""Multi-layer perceptrons, the channel layer beside a mixer."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import Linear, scaled
from seqmodels.typing import ChannelConfig, Context


class Activation(enum.StrEnum):
    GELU = "gelu"  # the tanh approximation, as in Griffin
    SILU = "silu"
    RELU_SQUARED = "relu_squared"


def activate(kind: Activation, x: Array) -> Array:
    match kind:
        case Activation.GELU:
            return jax.nn.gelu(x, approximate=True)
        case Activation.SILU:
            return jax.nn.silu(x)
        case Activation.RELU_SQUARED:
            return jnp.square(jax.nn.relu(x))


def hidden_width(config: Any, width: int) -> int:
    """`config.hidden_size`, or `config.expansion` times the model's width, rounded up to a multiple of 8."""
    return config.hidden_size or 8 * math.ceil(round(config.expansion * width, 6) / 8)


@dataclasses.dataclass(frozen=True)
class MLPConfig(ChannelConfig):
    """A (gated) MLP: down(act(gate x) * up x), or down(act(up x)) without the gate (arXiv 2002.05202).

    The hidden width is `expansion` times the model's, rounded up to a multiple of 8, or just `hidden_size`. The last
    projection starts with variance 2 / depth over its fan-in (Griffin, arXiv 2402.19427).
    """

    expansion: float = 3.0
    activation: Activation = Activation.GELU
    gated: bool = True
    bias: bool = False
    hidden_size: int | None = None

    def __post_init__(self):
        if self.expansion <= 0:
            raise ValueError(f"expansion must be positive, not {self.expansion}")
        if self.hidden_size is not None and self.hidden_size < 1:
            raise ValueError(
                f"hidden_size must be at least 1, or None for expansion times the width, not {self.hidden_size}"
            )
        if self.activation not in list(Activation):
            raise ValueError(f"unknown activation {self.activation!r}; choose one of {[str(a) for a in Activation]}")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> MLP:
        return MLP(self, width, depth=depth, rngs=rngs)


class MLP(nnx.Module):
    """See `MLPConfig`. Padding is masked on the way in, so what stands there reaches no gradient."""

    def __init__(self, config: MLPConfig, width: int, *, depth: int, rngs: nnx.Rngs):
        self.activation = Activation(config.activation)
        hidden = hidden_width(config, width)
        inner = functools.partial(Linear, width, hidden, rngs=rngs, axes=("embed", "mlp"), bias=config.bias)
        self.up = inner()
        self.gate = inner() if config.gated else None
        self.down = Linear(hidden, width, rngs=rngs, axes=("mlp", "embed"), bias=config.bias, init=scaled(2.0 / depth))

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> tuple[()]:
        return ()

    def __call__(
        self, x: Float[Array, "B T D"], state: tuple[()] | None, context: Context
    ) -> tuple[Float[Array, "B T D"], tuple[()], dict[str, Array]]:
        x = jnp.where(context.segments.valid[..., None], x, 0)
        up = self.up(x)
        hidden = activate(self.activation, up) if self.gate is None else activate(self.activation, self.gate(x)) * up
        return self.down(hidden), (), {}
