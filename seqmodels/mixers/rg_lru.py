"""Griffin's recurrent block: a short convolution and the real-gated linear recurrent unit (arXiv 2402.19427)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from seqmodels.layers.carry import token_positions
from seqmodels.layers.linear import BlockDiagonalLinear, Linear, along_last, scaled
from seqmodels.layers.short_conv import ShortConv
from seqmodels.operators.diagonal import diagonal_scan
from seqmodels.operators.family import check_method
from seqmodels.params import Group, param
from seqmodels.typing import Context, Memory, MixerConfig

DECAY_SCALE = 8.0
"""The paper's c in a_t = a^(c r_t)."""
MAX_SQRT_GRADIENT = 1000.0


@dataclasses.dataclass(frozen=True)
class RGLRUConfig(MixerConfig):
    """out( GeLU(W_y x) * RG-LRU(conv(W_x x)) ), with

        r_t = sigmoid(W_a u_t + b_a),  i_t = sigmoid(W_i u_t + b_i)      block-diagonal, `blocks` blocks
        log a_t = -8 r_t softplus(decay)
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)                    multiplier 1 at a document's first token

    `recurrent_size`: channels of the recurrence; None is 4/3 of the width (the paper's), rounded up to a multiple of 8
    and of `blocks`. `min_decay, max_decay`: the bounds of a^8 at initialisation, drawn uniformly as in the paper; the
    authors' code draws a itself from that range instead. The output starts with variance 2 / depth over its fan-in.
    """

    recurrent_size: int | None = None
    blocks: int = 8
    conv_width: int = 4
    min_decay: float = 0.9
    max_decay: float = 0.999
    bias: bool = False
    method: str = "auto"

    def __post_init__(self):
        check_method(self.method)
        for field in ("blocks", "conv_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.recurrent_size is not None and self.recurrent_size % self.blocks:
            raise ValueError(f"recurrent_size={self.recurrent_size} does not divide into {self.blocks} blocks")
        if not 0 < self.min_decay < self.max_decay < 1:
            raise ValueError(f"decays need 0 < min_decay < max_decay < 1, not {self.min_decay}, {self.max_decay}")

    def channels(self, width: int) -> int:
        """How many channels the recurrence of a model of that width has."""
        multiple = math.lcm(8, self.blocks)
        return self.recurrent_size or multiple * math.ceil(4 * width / (3 * multiple))

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> RGLRU:
        return RGLRU(self, width, depth=depth, rngs=rngs)


class RGLRUState(NamedTuple):
    """`length`: how many tokens the carried document has had; the first one is not scaled by sqrt(1 - a^2)."""

    conv: Float[Array, "B W D"]
    hidden: Float[Array, "B D"]
    length: Int[Array, "B"]


@jax.custom_jvp
def bounded_sqrt(x: Array) -> Array:
    """sqrt(x) whose derivative is cut at 1000: that of sqrt(1 - a^2) is infinite as a -> 1."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    root = jnp.sqrt(x)
    return root, tangent / (2 * jnp.maximum(root, 0.5 / MAX_SQRT_GRADIENT))


class RGLRU(nnx.Module):
    """See `RGLRUConfig`. Gates, decays and the hidden state are at least float32, whatever the type of x."""

    recurrent_memory = Memory(("hidden",), companions={"length": 1})  # a carried h is scaled already

    def __init__(self, config: RGLRUConfig, width: int, *, depth: int, rngs: nnx.Rngs):
        self.config = config
        self.size = size = config.channels(width)
        inner = functools.partial(Linear, width, size, rngs=rngs, axes=("embed", "recurrent"), bias=config.bias)
        self.gate = inner()
        self.input = inner()
        self.conv = ShortConv(size, config.conv_width, rngs=rngs)
        # The paper exempts the unit's own parameters from weight decay.
        own = functools.partial(
            BlockDiagonalLinear, size, config.blocks, rngs=rngs, group=Group.DYNAMICS, bias_group=Group.DYNAMICS
        )
        self.recurrence_gate = own()
        self.input_gate = own()

        def init_decay(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            power = jax.random.uniform(key, shape, dtype, config.min_decay, config.max_decay)
            # log a = log(power) / 8 = -softplus(decay)
            return jnp.log(jnp.expm1(-jnp.log(power) / DECAY_SCALE))

        self.decay = param(rngs, (size,), init_decay, group=Group.DYNAMICS, axes=("recurrent",))
        self.out = Linear(
            size, width, rngs=rngs, axes=("recurrent", "embed"), bias=config.bias, init=scaled(2.0 / depth)
        )

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> RGLRUState:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        hidden = jnp.zeros((batch, self.size), jnp.promote_types(dtype, jnp.float32))
        return RGLRUState(self.conv.init_state(batch, dtype), hidden, jnp.zeros((batch,), jnp.int32))

    def __call__(
        self, x: Float[Array, "B T D"], state: RGLRUState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], RGLRUState]:
        segments = context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.length.shape != x.shape[:1]:
            raise ValueError(f"a state of {state.length.shape[0]} rows cannot continue x of shape {x.shape}")
        position, length = token_positions(segments, state.length, context.sequence_axis)

        x = jnp.where(segments.valid[..., None], x, 0)
        u, conv = self.conv(self.input(x), state.conv, context)
        log_decay, drive = self._recurrence(u, first=position == 0)
        hidden, last = diagonal_scan(
            log_decay,
            drive,
            state.hidden,
            segments=segments,
            method=self.config.method,
            sequence_axis=context.sequence_axis,
        )
        gate = jax.nn.gelu(self.gate(x), approximate=True)
        y = self.out(hidden.astype(x.dtype) * gate)
        return jnp.where(segments.valid[..., None], y, 0), RGLRUState(conv, last, length)

    def _recurrence(self, u: Float[Array, "B T D"], *, first: Array) -> tuple[Array, Array]:
        """`(log a_t, sqrt(1 - a_t^2) i_t u_t)`, at least float32."""
        u = u.astype(jnp.promote_types(u.dtype, jnp.float32))
        recurrence_gate, input_gate = jax.nn.sigmoid(self.recurrence_gate(u)), jax.nn.sigmoid(self.input_gate(u))
        log_decay = -DECAY_SCALE * recurrence_gate * along_last(jax.nn.softplus(self.decay[...]), u)
        multiplier = jnp.where(first[..., None], 1, bounded_sqrt(-jnp.expm1(2 * log_decay)))
        return log_decay, multiplier * input_gate * u
