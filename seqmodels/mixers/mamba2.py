"""Mamba-2: a selective state-space layer with one scalar decay per head (arXiv 2405.21060)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import Linear, along_last, uniform
from seqmodels.layers.norms import RMSNorm
from seqmodels.layers.rates import check_ranges, log_uniform_rates, step_biases
from seqmodels.layers.short_conv import ShortConv
from seqmodels.operators.family import check_method
from seqmodels.operators.outer import gated_linear_attention
from seqmodels.params import Group, param
from seqmodels.typing import Context, Memory, MixerConfig


@dataclasses.dataclass(frozen=True)
class Mamba2Config(MixerConfig):
    """[z, x, B, C, dt] = W_in u;  x, B, C = SiLU(conv([x, B, C]));  dt = softplus(dt + dt_bias);  per head

        S_t = exp(-exp(a_log) dt_t) S_{t-1} + B_t (dt_t x_t)^T          [state_size, head_size]
        y_t = S_t^T C_t + skip x_t
        out = W_out RMSNorm(y * SiLU(z))

    Inner width `expansion` times the model's, in heads of `head_size`; B and C are shared by the heads of each of
    `groups` groups. The norm's mean runs over each of `norm_groups` parts of the inner width; None is `groups`, as in
    the authors' code. `step_limit`: bounds within which dt is kept. `bias`: of W_in and W_out. At initialisation
    exp(a_log) is uniform in `decay_range`, softplus(dt_bias) log-uniform in `step_range`, skip 1, and matrices uniform
    in +-1/sqrt(fan-in), the convolution's taps too, W_out also divided by sqrt(depth). Biases start at 0 (the authors'
    convolution draws its own like its taps). `chunk`: tokens per chunk of the scan, None for the operator's own choice.
    """

    expansion: float = 2.0
    head_size: int = 64
    state_size: int = 128
    groups: int = 1
    norm_groups: int | None = None
    conv_width: int = 4
    conv_bias: bool = True
    bias: bool = False
    norm_eps: float = 1e-5
    step_limit: tuple[float, float] | None = None
    decay_range: tuple[float, float] = (1.0, 16.0)
    step_range: tuple[float, float] = (1e-3, 1e-1)
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk)
        for field in ("head_size", "state_size", "groups", "conv_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        for field in ("expansion", "norm_eps"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} must be positive, not {getattr(self, field)}")
        if self.step_limit is not None and not 0 <= self.step_limit[0] < self.step_limit[1]:
            raise ValueError(f"step_limit needs 0 <= low < high, or None for no limit, not {self.step_limit}")
        check_ranges(self, "decay_range", "step_range")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> Mamba2:
        return Mamba2(self, width, depth=depth, rngs=rngs)


class Mamba2State(NamedTuple):
    conv: Float[Array, "B W D"]
    ssm: Float[Array, "B H K V"]


class Mamba2(nnx.Module):
    """See `Mamba2Config`. Step sizes, decays and states are at least float32, whatever the type of x."""

    recurrent_memory = Memory(("ssm",), heads=True)

    def __init__(self, config: Mamba2Config, width: int, *, depth: int, rngs: nnx.Rngs):
        inner = round(config.expansion * width)
        if inner % config.head_size:
            raise ValueError(f"the inner width {inner} does not divide into heads of head_size={config.head_size}")
        heads = inner // config.head_size
        if heads % config.groups:
            raise ValueError(f"{heads} heads do not divide into groups={config.groups}; choose a divisor")
        self.config = config
        self.inner, self.heads = inner, heads
        shared = config.groups * config.state_size
        self.sizes = (inner, inner + 2 * shared, heads)  # z; x, B, C; dt
        linear = functools.partial(Linear, rngs=rngs, bias=config.bias)
        self.input = linear(width, sum(self.sizes), axes=("embed", "recurrent"), init=uniform())
        self.conv = ShortConv(self.sizes[1], config.conv_width, rngs=rngs, bias=config.conv_bias, init=uniform())

        per_head = functools.partial(param, rngs, (heads,), group=Group.DYNAMICS, axes=("heads",))
        self.a_log = per_head(log_uniform_rates(*config.decay_range))
        self.dt_bias = per_head(step_biases(*config.step_range))
        self.skip = per_head(jax.nn.initializers.ones)
        norm_groups = config.groups if config.norm_groups is None else config.norm_groups
        self.norm = RMSNorm(inner, rngs=rngs, eps=config.norm_eps, groups=norm_groups, axis="recurrent")
        self.out = linear(inner, width, axes=("recurrent", "embed"), init=uniform(1 / depth))

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> Mamba2State:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        shape = (batch, self.heads, self.config.state_size, self.config.head_size)
        ssm = jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
        return Mamba2State(self.conv.init_state(batch, dtype), ssm)

    def __call__(
        self, x: Float[Array, "B T D"], state: Mamba2State | None, context: Context
    ) -> tuple[Float[Array, "B T D"], Mamba2State]:
        config, segments = self.config, context.segments
        batch, length = x.shape[:2]
        state = self.init_state(batch, dtype=x.dtype) if state is None else state
        if state.ssm.shape[0] != batch:
            raise ValueError(f"a state of {state.ssm.shape[0]} rows cannot continue x of shape {x.shape}")

        x = jnp.where(segments.valid[..., None], x, 0)
        z, mixed, dt = jnp.split(self.input(x), (self.sizes[0], sum(self.sizes[:2])), axis=-1)
        mixed, conv = self.conv(mixed, state.conv, context)
        shared = config.groups * config.state_size
        value, key, query = jnp.split(jax.nn.silu(mixed), (self.inner, self.inner + shared), axis=-1)
        value = value.reshape(batch, length, self.heads, config.head_size)
        key, query = (a.reshape(batch, length, config.groups, config.state_size) for a in (key, query))

        dt = dt.astype(jnp.promote_types(x.dtype, jnp.float32))
        dt = jax.nn.softplus(dt + along_last(self.dt_bias[...], dt))
        dt = dt if config.step_limit is None else jnp.clip(dt, *config.step_limit)
        y, ssm = gated_linear_attention(
            query,
            key,
            value * dt[..., None].astype(x.dtype),
            -along_last(jnp.exp(self.a_log[...]), dt) * dt,
            state.ssm,
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        y = y.astype(x.dtype) + self.skip[...].astype(x.dtype)[None, None, :, None] * value
        y = self.out(self.norm(y.reshape(batch, length, self.inner) * jax.nn.silu(z)))
        return jnp.where(segments.valid[..., None], y, 0), Mamba2State(conv, ssm)
