"""Log-linear Mamba-2: a state for every level of a Fenwick tree over positions (arXiv 2506.04761)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from seqmodels.layers.carry import token_positions
from seqmodels.layers.linear import Linear, along_last, uniform
from seqmodels.layers.norms import RMSNorm
from seqmodels.layers.rates import check_ranges, log_uniform_rates, step_biases
from seqmodels.layers.short_conv import ShortConv
from seqmodels.operators.family import check_method
from seqmodels.operators.log_linear import log_linear_attention
from seqmodels.params import Group, param
from seqmodels.typing import Context, MixerConfig


@dataclasses.dataclass(frozen=True)
class LogLinearMamba2Config(MixerConfig):
    """[z, x, B, C, dt, dl] = W_in u;  x, B, C = SiLU(conv([x, B, C]));  dt = softplus(dt + dt_bias);  per head

        lambda_t^(l) = softplus(level_l dl_tl)                          of every level l
        S_t^(l) = sum over s in bucket l of t: exp(-exp(a_log) (dt_{s+1} + .. + dt_t)) B_s (dt_s x_s)^T
        y_t = sum over l of lambda_t^(l) S_t^(l)^T C_t + skip x_t
        out = W_out RMSNorm(y * SiLU(z))

    Bucket 0 is the token itself; the others cut what came before it in its document into the largest aligned blocks,
    as the bits of its position do (`operators.log_linear`). With all lambda at 1 this is Mamba-2 (`Mamba2Config`, which
    explains the other fields); C has no factor 1 / sqrt(state size) here either.

    `levels` serve documents of up to 2^(levels - 1) tokens (15: 16384, as published), wherever these start in a row;
    tokens beyond have NaN outputs, and a state made for more `capacity` is refused. At initialisation `level` is 1, the
    rest as Mamba-2's.
    """

    expansion: float = 2.0
    head_size: int = 64
    state_size: int = 128
    groups: int = 1
    levels: int = 15
    conv_width: int = 4
    norm_eps: float = 1e-5
    decay_range: tuple[float, float] = (1.0, 16.0)
    step_range: tuple[float, float] = (1e-3, 1e-1)
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk)
        for field in ("head_size", "state_size", "groups", "conv_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if not 2 <= self.levels <= 31:
            raise ValueError(f"levels={self.levels} must lie in [2, 31]: documents have up to 2^(levels - 1) tokens")
        for field in ("expansion", "norm_eps"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} must be positive, not {getattr(self, field)}")
        check_ranges(self, "decay_range", "step_range")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> LogLinearMamba2:
        return LogLinearMamba2(self, width, depth=depth, rngs=rngs)


class LogLinearState(NamedTuple):
    """`memory`: the buckets that the next token sees. `length`: tokens of the document so far."""

    conv: Float[Array, "B W D"]
    memory: Float[Array, "B H N K V"]
    length: Int[Array, "B"]


class LogLinearMamba2(nnx.Module):
    """See `LogLinearMamba2Config`. Steps, decays, weights and states are at least float32, whatever the type of x."""

    def __init__(self, config: LogLinearMamba2Config, width: int, *, depth: int, rngs: nnx.Rngs):
        inner = round(config.expansion * width)
        if inner % config.head_size:
            raise ValueError(f"the inner width {inner} does not divide into heads of head_size={config.head_size}")
        heads = inner // config.head_size
        if heads % config.groups:
            raise ValueError(f"{heads} heads do not divide into groups={config.groups}; choose a divisor")
        self.config = config
        self.inner, self.heads = inner, heads
        mixed = inner + 2 * config.groups * config.state_size
        self.cuts = (inner, inner + mixed, inner + mixed + heads)  # z; x, B, C; dt; dl
        size = self.cuts[-1] + heads * config.levels
        self.input = Linear(width, size, rngs=rngs, axes=("embed", "recurrent"), init=uniform())
        self.conv = ShortConv(mixed, config.conv_width, rngs=rngs, init=uniform())

        dynamics = functools.partial(param, rngs, group=Group.DYNAMICS)
        self.a_log = dynamics((heads,), log_uniform_rates(*config.decay_range), axes=("heads",))
        self.dt_bias = dynamics((heads,), step_biases(*config.step_range), axes=("heads",))
        ones = jax.nn.initializers.ones
        self.skip = dynamics((heads,), ones, axes=("heads",))
        self.level = dynamics((heads, config.levels), ones, axes=("heads", None))
        self.norm = RMSNorm(inner, rngs=rngs, eps=config.norm_eps, groups=config.groups, axis="recurrent")
        self.out = Linear(inner, width, rngs=rngs, axes=("recurrent", "embed"), init=uniform(1 / depth))

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> LogLinearState:
        """Zeros, for documents of 2^(levels - 1) tokens; of more where `capacity` asks for it, which no call accepts.

        So whoever compares a state with the capacity that it should have (`generate`) finds out beforehand.
        """
        buckets = self.config.levels - 1
        if capacity is not None:
            buckets = max(buckets, (capacity - 1).bit_length())
        shape = (batch, self.heads, buckets, self.config.state_size, self.config.head_size)
        memory = jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
        return LogLinearState(self.conv.init_state(batch, dtype), memory, jnp.zeros((batch,), jnp.int32))

    def __call__(
        self, x: Float[Array, "B T D"], state: LogLinearState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], LogLinearState]:
        config, segments = self.config, context.segments
        batch, time = x.shape[:2]
        self._check(x, state)
        before = self.init_state(batch, dtype=x.dtype) if state is None else state
        position, length = token_positions(segments, before.length, context.sequence_axis)

        x = jnp.where(segments.valid[..., None], x, 0)
        z, mixed, dt, dl = jnp.split(self.input(x), self.cuts, axis=-1)
        mixed, conv = self.conv(mixed, before.conv, context)
        shared = config.groups * config.state_size
        value, key, query = jnp.split(jax.nn.silu(mixed), (self.inner, self.inner + shared), axis=-1)
        value = value.reshape(batch, time, self.heads, config.head_size)
        key, query = (a.reshape(batch, time, config.groups, config.state_size) for a in (key, query))
        dt, dl = (a.astype(jnp.promote_types(x.dtype, jnp.float32)) for a in (dt, dl))
        dt = jax.nn.softplus(dt + along_last(self.dt_bias[...], dt))
        scale = jax.nn.softplus(along_last(self.level[...].reshape(-1), dl) * dl)
        y, memory = log_linear_attention(
            query,
            key,
            value * dt[..., None].astype(x.dtype),
            scale.reshape(batch, time, self.heads, config.levels),
            -along_last(jnp.exp(self.a_log[...]), dt) * dt,
            None if state is None else before.memory,
            position=position,
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        y = y.astype(x.dtype) + self.skip[...].astype(x.dtype)[None, None, :, None] * value
        y = self.out(self.norm(y.reshape(batch, time, self.inner) * jax.nn.silu(z)))
        return jnp.where(segments.valid[..., None], y, 0), LogLinearState(conv, memory, length)

    def _check(self, x: Array, state: LogLinearState | None) -> None:
        if state is None:
            return
        if state.length.shape != x.shape[:1]:
            raise ValueError(f"a state of {state.length.shape[0]} rows cannot continue x of shape {x.shape}")
        if (buckets := state.memory.shape[2]) != self.config.levels - 1:
            raise ValueError(
                f"a state for documents of 2^{buckets} tokens needs levels={buckets + 1}, and this layer has "
                f"levels={self.config.levels}: raise it, or ask init_state for less capacity"
            )
