"""RetNet's retention: linear attention with rotated keys and one fixed decay per head (arXiv 2307.08621)."""

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
from seqmodels.layers.norms import LayerNorm
from seqmodels.layers.positions import rope
from seqmodels.mixers.gla import head_sizes
from seqmodels.operators.family import check_method
from seqmodels.operators.outer import gated_linear_attention
from seqmodels.typing import Context, Memory, MixerConfig


@dataclasses.dataclass(frozen=True)
class RetNetConfig(MixerConfig):
    """q, k = rotated W_q x, W_k x;  v = W_v x;  per head h, with gamma_h = 1 - 2^(-5 - h),

        S_t = gamma_h S_{t-1} + k_t v_t^T                               [key size, value size]
        o_t = S_t^T q_t / sqrt(key size)
        out = W_o (SiLU(W_g x) * GroupNorm(o))

    The rotation is `rope`'s, by the token's position in its own document: with the decay it is the paper's xPos, whose
    scale of keys and queries is gamma. The group norm is one LayerNorm per head; what the paper divides scores by
    (its section 2.4) cancels in it. Keys have `expand_key` times the model's width over all `heads`, values
    `expand_value` times. Initialisation is the authors': Glorot-uniform with gain 2^-2.5, for W_o 2^-1.
    `chunk`: tokens per chunk of the scan, None for the operator's own choice.
    """

    heads: int = 8
    expand_key: float = 1.0
    expand_value: float = 2.0
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk)
        if self.heads < 1:
            raise ValueError(f"heads must be at least 1, not {self.heads}")
        for field in ("expand_key", "expand_value", "rope_base", "norm_eps"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} must be positive, not {getattr(self, field)}")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> RetNet:
        return RetNet(self, width, rngs=rngs)


class RetNetState(NamedTuple):
    memory: Float[Array, "B H K V"]


class RetNet(nnx.Module):
    """See `RetNetConfig`. States are at least float32, whatever the type of x."""

    recurrent_memory = Memory(("memory",), heads=True)

    def __init__(self, config: RetNetConfig, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.key_size, self.value_size = head_sizes(width, config)
        if self.key_size % 2:
            raise ValueError(
                f"keys are rotated in pairs: expand_key={config.expand_key} times the width {width} over "
                f"heads={config.heads} gives an odd size of {self.key_size}"
            )
        keys, values = config.heads * self.key_size, config.heads * self.value_size
        glorot = lambda gain: jax.nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform")
        inner = functools.partial(Linear, width, rngs=rngs, axes=("embed", "heads"), init=glorot(2**-2.5))
        self.query = inner(keys)
        self.key = inner(keys)
        self.value = inner(values)
        self.gate = inner(values)
        self.norm = LayerNorm(values, rngs=rngs, eps=config.norm_eps, groups=config.heads, axis="heads")
        self.out = Linear(values, width, rngs=rngs, axes=("heads", "embed"), init=glorot(0.5))

    @property
    def log_decay(self) -> list[float]:
        """log gamma of every head."""
        return [math.log1p(-(2.0 ** (-5 - head))) for head in range(self.config.heads)]

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> RetNetState:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        shape = (batch, self.config.heads, self.key_size, self.value_size)
        return RetNetState(jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)))

    def __call__(
        self, x: Float[Array, "B T D"], state: RetNetState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], RetNetState]:
        config, segments = self.config, context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.memory.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.memory.shape[0]} rows cannot continue x of shape {x.shape}")

        x = jnp.where(segments.valid[..., None], x, 0)
        heads = lambda y: y.reshape(*x.shape[:2], config.heads, -1)
        rotated = lambda y: rope(heads(y), context.positions, base=config.rope_base)
        log_decay = jnp.array(self.log_decay, jnp.promote_types(x.dtype, jnp.float32))
        y, memory = gated_linear_attention(
            rotated(self.query(x)) * self.key_size**-0.5,
            rotated(self.key(x)),
            heads(self.value(x)),
            jnp.broadcast_to(log_decay, (*x.shape[:2], config.heads)),
            state.memory,
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        y = self.norm(y.astype(x.dtype).reshape(*x.shape[:2], -1)) * jax.nn.silu(self.gate(x))
        return jnp.where(segments.valid[..., None], self.out(y), 0), RetNetState(memory)
