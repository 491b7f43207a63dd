"""Gated linear attention: a matrix state whose keys decay by gates of low rank (arXiv 2312.06635)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import Linear, scaled
from seqmodels.layers.norms import RMSNorm
from seqmodels.layers.short_conv import ShortConv
from seqmodels.operators.family import check_method
from seqmodels.operators.outer import gated_linear_attention
from seqmodels.typing import Context, Memory, MixerConfig


@dataclasses.dataclass(frozen=True)
class GLAConfig(MixerConfig):
    """q, k, v = W_q x, W_k x, W_v x;  log a_t = logsigmoid(W_2 W_1 x_t + b) / temperature;  per head

        S_t = Diag(a_t) S_{t-1} + k_t v_t^T                             [key size, value size]
        o_t = S_t^T q_t / sqrt(key size)
        out = W_o (RMSNorm(o) * SiLU(W_g x))

    Keys have `expand_key` times the model's width over all `heads`, values `expand_value` times; the gates' rank is
    `gate_rank`. The norm is per head, with one scale for all heads. The output projection starts with its variance
    divided by depth. `conv_width`: q, k and v pass a causal convolution over so many tokens and a SiLU first, with
    which associations of neighbours are learned sooner; None as in the paper. `chunk`: tokens per chunk of the scan,
    None for the operator's own choice.
    """

    heads: int = 4
    expand_key: float = 0.5
    expand_value: float = 1.0
    gate_rank: int = 16
    temperature: float = 16.0
    conv_width: int | None = None
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk)
        for field in ("heads", "gate_rank", "conv_width"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        for field in ("expand_key", "expand_value", "temperature"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} must be positive, not {getattr(self, field)}")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> GLA:
        return GLA(self, width, depth=depth, rngs=rngs)


class GLAState(NamedTuple):
    memory: Float[Array, "B H K V"]
    conv: Float[Array, "B W D"] | None = None


def head_sizes(width: int, config: Any) -> tuple[int, int]:
    """Key and value size of each of a config's `heads`; ValueError where they do not come out whole."""
    return head_size(width, config, "expand_key", config.heads), head_size(width, config, "expand_value", config.heads)


def head_size(width: int, config: Any, field: str, heads: int) -> int:
    """Size of one of `heads` that have `config.field` times the width together; ValueError where it is not whole."""
    size = getattr(config, field) * width / heads
    if size < 1 or size != round(size):
        raise ValueError(f"{field}={getattr(config, field)} times the width {width} does not divide into heads={heads}")
    return round(size)


class GLA(nnx.Module):
    """See `GLAConfig`. Gates and states are at least float32, whatever the type of x."""

    recurrent_memory = Memory(("memory",), heads=True)

    def __init__(self, config: GLAConfig, width: int, *, depth: int, rngs: nnx.Rngs):
        self.config = config
        self.key_size, self.value_size = head_sizes(width, config)
        keys, values = config.heads * self.key_size, config.heads * self.value_size
        inner = functools.partial(Linear, width, rngs=rngs, axes=("embed", "heads"))
        self.query = inner(keys)
        self.key = inner(keys)
        self.value = inner(values)
        conv = functools.partial(ShortConv, 2 * keys + values, rngs=rngs, bias=False, variance=1 / 3, axis="heads")
        self.conv = None if config.conv_width is None else conv(config.conv_width)
        self.gate = inner(values)
        self.decay_in = Linear(width, config.gate_rank, rngs=rngs, axes=("embed", None))
        self.decay_out = Linear(config.gate_rank, keys, rngs=rngs, axes=(None, "heads"), bias=True)
        self.norm = RMSNorm(self.value_size, rngs=rngs, eps=1e-5, axis=None)
        self.out = Linear(values, width, rngs=rngs, axes=("heads", "embed"), init=scaled(1.0 / depth))

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> GLAState:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        shape = (batch, self.config.heads, self.key_size, self.value_size)
        conv = None if self.conv is None else self.conv.init_state(batch, dtype)
        return GLAState(jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)), conv)

    def __call__(
        self, x: Float[Array, "B T D"], state: GLAState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], GLAState]:
        config, segments = self.config, context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.memory.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.memory.shape[0]} rows cannot continue x of shape {x.shape}")

        x = jnp.where(segments.valid[..., None], x, 0)
        heads = lambda y: y.reshape(*x.shape[:2], config.heads, -1)
        projected, conv = [self.query(x), self.key(x), self.value(x)], None
        if self.conv is not None:
            mixed, conv = self.conv(jnp.concatenate(projected, axis=-1), state.conv, context)
            ends = (projected[0].shape[-1], 2 * projected[0].shape[-1])
            projected = jnp.split(jax.nn.silu(mixed), ends, axis=-1)
        query, key, value = map(heads, projected)
        low = self.decay_in(x).astype(jnp.promote_types(x.dtype, jnp.float32))
        log_decay = jax.nn.log_sigmoid(self.decay_out(low)) / config.temperature
        y, memory = gated_linear_attention(
            query * self.key_size**-0.5,
            key,
            value,
            heads(log_decay),
            state.memory,
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        y = self.norm(y.astype(x.dtype)).reshape(*x.shape[:2], -1) * jax.nn.silu(self.gate(x))
        return jnp.where(segments.valid[..., None], self.out(y), 0), GLAState(memory, conv)
