"""RWKV-4's time mix: an exponentially weighted average of values with a receptance gate (arXiv 2305.13048)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import Linear
from seqmodels.layers.token_shift import lerp, no_token, shares, token_shift
from seqmodels.operators.family import check_method
from seqmodels.operators.wkv import WKVState, empty_wkv, wkv_scan
from seqmodels.params import Group, param
from seqmodels.typing import Context, Memory, MixerConfig


@dataclasses.dataclass(frozen=True)
class RWKV4Config(MixerConfig):
    """With m_* x_t + (1 - m_*) x_{t-1} in the place of x for each of r, k, v (equations 11 to 16):

        out_t = W_o (sigmoid(r_t) * wkv_t)
        wkv_t = (sum over i < t of e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same without v)

    per channel, with w = exp(time_decay) and u = time_first. Parameters are named and laid out as in transformers'
    `RwkvSelfAttention`. `recurrent_size`: channels of the average (its attention_hidden_size), None is the width. As
    published, W_k, W_r and W_o start at zero, W_v orthogonal, decays and shares by layer and channel.
    """

    recurrent_size: int | None = None
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk)
        if self.recurrent_size is not None and self.recurrent_size < 2:
            raise ValueError(f"recurrent_size must be at least 2, not {self.recurrent_size}; None is the model's width")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> RWKV4:
        return RWKV4(self, width, layer=layer, depth=depth, rngs=rngs)


class RWKV4State(NamedTuple):
    """`last`: the last token; `average`: its (log_max, numerator, denominator), log_max -inf before any token."""

    last: Float[Array, "B D"]
    average: WKVState


class RWKV4(nnx.Module):
    """See `RWKV4Config`. Decays, the average and states are at least float32, whatever the type of x."""

    recurrent_memory = Memory(("average.numerator",), companions={"average.denominator": 1, "average.log_max": 0})

    def __init__(self, config: RWKV4Config, width: int, *, layer: int, depth: int, rngs: nnx.Rngs):
        self.config, self.width = config, width
        self.size = size = config.recurrent_size or width
        progress = layer / max(depth - 1, 1)

        def init_decay(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return 8 * jnp.linspace(0, 1, size, dtype=dtype) ** (0.7 + 1.3 * progress) - 5

        def init_first(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return math.log(0.3) + 0.5 * ((jnp.arange(size, dtype=dtype) + 1) % 3 - 1)

        own = functools.partial(param, rngs, (size,), group=Group.DYNAMICS, axes=("recurrent",))
        self.time_decay, self.time_first = own(init_decay), own(init_first)
        mix = functools.partial(param, rngs, (width,), group=Group.DYNAMICS, axes=("embed",))
        self.time_mix_key = mix(shares(layer, depth))
        self.time_mix_value = mix(shares(layer, depth, offset=0.3 * progress))
        self.time_mix_receptance = mix(shares(layer, depth, 0.5))
        zeros, orthogonal = jax.nn.initializers.zeros, jax.nn.initializers.orthogonal(max(1.0, size / width) ** 0.5)
        inner = functools.partial(Linear, width, size, rngs=rngs, axes=("embed", "recurrent"))
        self.key, self.value, self.receptance = inner(init=zeros), inner(init=orthogonal), inner(init=zeros)
        self.out = Linear(size, width, rngs=rngs, axes=("recurrent", "embed"), init=zeros)

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> RWKV4State:
        """No token; `capacity` does not matter, the state is as large after any number of tokens."""
        return RWKV4State(no_token(batch, self.width, dtype), empty_wkv((batch,), self.size, dtype))

    def __call__(
        self, x: Float[Array, "B T D"], state: RWKV4State | None, context: Context
    ) -> tuple[Float[Array, "B T D"], RWKV4State]:
        config, segments = self.config, context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        x = jnp.where(segments.valid[..., None], x, 0)
        previous, last = token_shift(x, state.last, context)
        mixed = lambda share: lerp(x, previous, share[...])
        receptance = jax.nn.sigmoid(self.receptance(mixed(self.time_mix_receptance)))
        average, after = wkv_scan(
            self.key(mixed(self.time_mix_key)),
            self.value(mixed(self.time_mix_value)),
            -jnp.exp(self.time_decay[...]),
            self.time_first[...],
            state.average,
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        return jnp.where(segments.valid[..., None], self.out(receptance * average), 0), RWKV4State(last, after)
