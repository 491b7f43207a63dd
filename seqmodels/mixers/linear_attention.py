"""Linear attention: softmax's kernel replaced by the product of two feature maps (arXiv 2006.16236)."""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import Linear, scaled
from seqmodels.layers.norms import RMSNorm
from seqmodels.mixers.gla import head_sizes
from seqmodels.operators.family import check_method
from seqmodels.operators.outer import gated_linear_attention, normalised_linear_attention
from seqmodels.typing import Context, Memory, MixerConfig


class FeatureMap(enum.StrEnum):
    """phi, entry by entry."""

    ELU = "elu"  # elu(x) + 1, the paper's
    RELU = "relu"
    IDENTITY = "identity"

    def __call__(self, x: Array) -> Array:
        if self == FeatureMap.ELU:  # exp(x) for x <= 0, without the detour by exp(x) - 1
            return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))
        return jax.nn.relu(x) if self == FeatureMap.RELU else x


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig(MixerConfig):
    """q, k, v = W_q x, W_k x, W_v x;  per head

        S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t)       [key size, value size], [key size]
        o_t = S_t^T phi(q_t) / (z_t^T phi(q_t) + norm_eps)
        out = W_o o

    `normaliser=False` leaves z out and brings o_t = S_t^T phi(q_t) to a common size by an RMSNorm per head with one
    scale for all heads (arXiv 2210.10340); features that change sign (`identity`) need it, their weights may sum to 0.
    Keys have `expand_key` times the model's width over all `heads`, values `expand_value` times. The output projection
    starts with its variance divided by depth. `chunk`: tokens per chunk of the scan, None for the operator's choice.
    """

    heads: int = 8
    expand_key: float = 1.0
    expand_value: float = 1.0
    features: FeatureMap = FeatureMap.ELU
    normaliser: bool = True
    norm_eps: float = 1e-6
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk)
        if self.heads < 1:
            raise ValueError(f"heads must be at least 1, not {self.heads}")
        for field in ("expand_key", "expand_value", "norm_eps"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} must be positive, not {getattr(self, field)}")
        if self.features not in list(FeatureMap):
            raise ValueError(f"unknown features {self.features!r}; choose one of {[str(f) for f in FeatureMap]}")
        if self.normaliser and self.features == FeatureMap.IDENTITY:
            raise ValueError("weights of identity features may sum to zero: set normaliser=False, or choose others")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> LinearAttention:
        return LinearAttention(self, width, depth=depth, rngs=rngs)


class LinearAttentionState(NamedTuple):
    """`normaliser` is None where the config leaves it out."""

    memory: Float[Array, "B H K V"]
    normaliser: Float[Array, "B H K"] | None


class LinearAttention(nnx.Module):
    """See `LinearAttentionConfig`. States are at least float32, whatever the type of x."""

    recurrent_memory = Memory(("memory",), heads=True, companions={"normaliser": 1})

    def __init__(self, config: LinearAttentionConfig, width: int, *, depth: int, rngs: nnx.Rngs):
        self.config = config
        self.key_size, self.value_size = head_sizes(width, config)
        self.features = FeatureMap(config.features)
        keys, values = config.heads * self.key_size, config.heads * self.value_size
        inner = functools.partial(Linear, width, rngs=rngs, axes=("embed", "heads"))
        self.query = inner(keys)
        self.key = inner(keys)
        self.value = inner(values)
        self.norm = None if config.normaliser else RMSNorm(self.value_size, rngs=rngs, eps=config.norm_eps, axis=None)
        self.out = Linear(values, width, rngs=rngs, axes=("heads", "embed"), init=scaled(1.0 / depth))

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> LinearAttentionState:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        keys = (batch, self.config.heads, self.key_size)
        zeros = functools.partial(jnp.zeros, dtype=jnp.promote_types(dtype, jnp.float32))
        return LinearAttentionState(zeros((*keys, self.value_size)), zeros(keys) if self.norm is None else None)

    def __call__(
        self, x: Float[Array, "B T D"], state: LinearAttentionState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], LinearAttentionState]:
        config, segments = self.config, context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.memory.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.memory.shape[0]} rows cannot continue x of shape {x.shape}")

        x = jnp.where(segments.valid[..., None], x, 0)
        heads = lambda y: y.reshape(*x.shape[:2], config.heads, -1)
        query, key = (self.features(heads(project(x))) for project in (self.query, self.key))
        options: dict[str, Any] = {
            "segments": segments,
            "method": config.method,
            "chunk": config.chunk,
            "sequence_axis": context.sequence_axis,
        }
        value = heads(self.value(x))
        if self.norm is None:
            carried: Any = state
            total, weight, after = normalised_linear_attention(query, key, value, None, carried, **options)
            y, state = total / (weight + config.norm_eps), LinearAttentionState(*after)
        else:
            y, memory = gated_linear_attention(query, key, value, None, state.memory, **options)
            y, state = self.norm(y), LinearAttentionState(memory, None)
        y = self.out(y.astype(x.dtype).reshape(*x.shape[:2], -1))
        return jnp.where(segments.valid[..., None], y, 0), state
