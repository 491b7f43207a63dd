"""RWKV's channel mixes: MLPs of squared relus over a token and its predecessor (arXiv 2305.13048, 2503.14456)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import Linear
from seqmodels.layers.mlp import Activation, activate
from seqmodels.layers.token_shift import lerp, no_token, shares, token_shift
from seqmodels.params import Group, param
from seqmodels.typing import ChannelConfig, Context, Initializer

VERSIONS = (4, 6, 7)


@dataclasses.dataclass(frozen=True)
class RWKVChannelConfig(ChannelConfig):
    """k = W_k(m_k x_t + (1 - m_k) x_{t-1});  y = W_v relu(k)^2, for versions 4 and 6 times a receptance gate

        sigmoid(W_r(m_r x_t + (1 - m_r) x_{t-1}))

    `time_mix_key` and `time_mix_receptance` hold the m (the code of versions 6 and 7 holds 1 - m). `hidden_size`: None
    is 4 times the width. As published, W_v and W_r start at zero, W_k orthogonal (version 4: times sqrt(hidden_size /
    width) where that is above 1) or, in version 7, uniform within 1 / (2 sqrt(width)); m_k with the power
    (1 - layer / depth) of a channel's rank (`shares`), to the fourth in version 7.
    """

    version: int = 7
    hidden_size: int | None = None

    def __post_init__(self):
        if self.version not in VERSIONS:
            raise ValueError(f"there is no channel mix of version {self.version!r}; choose one of {VERSIONS}")
        if self.hidden_size is not None and self.hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, not {self.hidden_size}; None is 4 times the width")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> RWKVChannel:
        return RWKVChannel(self, width, layer=layer, depth=depth, rngs=rngs)


class RWKVChannelState(NamedTuple):
    last: Float[Array, "B D"]


class RWKVChannel(nnx.Module):
    """See `RWKVChannelConfig`. The state is the last token; padding yields zero."""

    def __init__(self, config: RWKVChannelConfig, width: int, *, layer: int, depth: int, rngs: nnx.Rngs):
        self.width = width
        hidden = config.hidden_size or 4 * width
        mix = functools.partial(param, rngs, (width,), group=Group.DYNAMICS, axes=("embed",))
        zeros = jax.nn.initializers.zeros
        if config.version == 7:
            share = shares(layer, depth, (1 - layer / depth) ** 3)
            key: Initializer = uniform(0.5 * width**-0.5)
        else:
            gain = max(1.0, hidden / width) ** 0.5 if config.version == 4 else 1.0
            share, key = shares(layer, depth), jax.nn.initializers.orthogonal(gain)
        self.time_mix_key = mix(share)
        self.key = Linear(width, hidden, rngs=rngs, axes=("embed", "mlp"), init=key)
        self.value = Linear(hidden, width, rngs=rngs, axes=("mlp", "embed"), init=zeros)
        gated = config.version != 7
        square = functools.partial(Linear, width, width, rngs=rngs, axes=("embed", None), init=zeros)
        self.time_mix_receptance = mix(share) if gated else None
        self.receptance = square() if gated else None

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> RWKVChannelState:
        return RWKVChannelState(no_token(batch, self.width, dtype))

    def __call__(
        self, x: Float[Array, "B T D"], state: RWKVChannelState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], RWKVChannelState, dict[str, Array]]:
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        x = jnp.where(context.segments.valid[..., None], x, 0)
        previous, last = token_shift(x, state.last, context)
        key = self.key(lerp(x, previous, self.time_mix_key[...]))
        y = self.value(activate(Activation.RELU_SQUARED, key))
        if self.receptance is not None and self.time_mix_receptance is not None:
            y = jax.nn.sigmoid(self.receptance(lerp(x, previous, self.time_mix_receptance[...]))) * y
        return y, RWKVChannelState(last), {}


def uniform(bound: float) -> Initializer:
    """Uniform in [-bound, bound]."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
