"""Mamba: a selective state-space layer whose channels have decays of their own (arXiv 2312.00752)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import Linear, along_last, uniform
from seqmodels.layers.rates import check_ranges, step_biases
from seqmodels.layers.short_conv import ShortConv
from seqmodels.operators.family import check_method
from seqmodels.operators.selective import selective_scan
from seqmodels.params import Group, param
from seqmodels.typing import Context, Memory, MixerConfig


@dataclasses.dataclass(frozen=True)
class Mamba1Config(MixerConfig):
    """[x, z] = W_in u;  x = SiLU(conv(x));  [r, B, C] = W_x x;  dt = softplus(W_dt r + dt_bias);  per channel

        h_t = exp(-exp(a_log) dt_t) h_{t-1} + dt_t B_t x_t              [state_size]
        y_t = C_t . h_t + skip x_t
        out = W_out (y * SiLU(z))

    with B dt for the drive, as the authors' code has it, not the zero-order hold of the paper's equation 4. The inner
    width is `inner_size`, or `expansion` times the model's; r has `dt_rank` numbers, None: width / 16, rounded up.
    `norm_bcdt_eps`: r, B and C are divided by sqrt(mean of squares + eps) first (FalconMamba, 2410.05355).
    `conv_bias`, `bias`: of the convolution, and of W_in and W_out.

    At initialisation exp(a_log) is 1, 2, ..., state_size (S4D-real), softplus(dt_bias) log-uniform in `step_range`,
    skip 1, and matrices uniform in +-1/sqrt(fan-in), W_out also divided by sqrt(depth). Biases of the matrices and of
    the convolution start at 0 (the authors' convolution draws its own like its taps). `chunk`: steps whose states the
    backward pass makes again at once, None for the operator's own choice. No array [T, D, N] is made, but by
    `method="associative"`: beside its inputs and outputs a training step, a token at a time, holds
    4 B D N (T / chunk + chunk) bytes, times up to 1.5 as compiled.
    """

    expansion: float = 2.0
    inner_size: int | None = None
    state_size: int = 16
    conv_width: int = 4
    dt_rank: int | None = None
    conv_bias: bool = True
    bias: bool = False
    norm_bcdt_eps: float | None = None
    step_range: tuple[float, float] = (1e-3, 1e-1)
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk)
        for field in ("inner_size", "state_size", "conv_width", "dt_rank"):
            size = getattr(self, field)
            if size is not None and size < 1:
                raise ValueError(f"{field} must be at least 1, not {size}")
        if self.expansion <= 0:
            raise ValueError(f"expansion must be positive, not {self.expansion}")
        if self.norm_bcdt_eps is not None and self.norm_bcdt_eps <= 0:
            raise ValueError(f"norm_bcdt_eps must be positive, or None for no norm, not {self.norm_bcdt_eps}")
        check_ranges(self, "step_range")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> Mamba1:
        return Mamba1(self, width, depth=depth, rngs=rngs)


class Mamba1State(NamedTuple):
    conv: Float[Array, "B W D"]
    ssm: Float[Array, "B D N"]


def _counting(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """log(1), log(2), ... along the last axis."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


class Mamba1(nnx.Module):
    """See `Mamba1Config`. Step sizes, decays and states are at least float32, whatever the type of x."""

    recurrent_memory = Memory(("ssm",))

    def __init__(self, config: Mamba1Config, width: int, *, depth: int, rngs: nnx.Rngs):
        inner = config.inner_size or round(config.expansion * width)
        rank = config.dt_rank or math.ceil(width / 16)
        self.config = config
        self.inner, self.rank = inner, rank
        init, bias = uniform(), config.bias
        self.input = Linear(width, 2 * inner, rngs=rngs, axes=("embed", "recurrent"), bias=bias, init=init)
        self.conv = ShortConv(inner, config.conv_width, rngs=rngs, bias=config.conv_bias, init=init)
        self.select = Linear(inner, rank + 2 * config.state_size, rngs=rngs, axes=("recurrent", None), init=init)
        self.step = Linear(rank, inner, rngs=rngs, axes=(None, "recurrent"), init=init)
        self.out = Linear(inner, width, rngs=rngs, axes=("recurrent", "embed"), bias=bias, init=uniform(1 / depth))

        channels, dynamics = ("recurrent",), Group.DYNAMICS
        self.a_log = param(rngs, (inner, config.state_size), _counting, group=dynamics, axes=("recurrent", None))
        self.dt_bias = param(rngs, (inner,), step_biases(*config.step_range), group=dynamics, axes=channels)
        self.skip = param(rngs, (inner,), jax.nn.initializers.ones, group=dynamics, axes=channels)

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> Mamba1State:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        ssm = jnp.zeros((batch, self.inner, self.config.state_size), jnp.promote_types(dtype, jnp.float32))
        return Mamba1State(self.conv.init_state(batch, dtype), ssm)

    def __call__(
        self, x: Float[Array, "B T D"], state: Mamba1State | None, context: Context
    ) -> tuple[Float[Array, "B T D"], Mamba1State]:
        config, segments = self.config, context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.ssm.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.ssm.shape[0]} rows cannot continue x of shape {x.shape}")
        x = jnp.where(segments.valid[..., None], x, 0)
        value, z = jnp.split(self.input(x), 2, axis=-1)
        value, conv = self.conv(value, state.conv, context)
        value = jax.nn.silu(value)

        selected = self.select(value).astype(jnp.promote_types(x.dtype, jnp.float32))
        low, b, c = jnp.split(selected, (self.rank, self.rank + config.state_size), axis=-1)
        if config.norm_bcdt_eps is not None:
            low, b, c = (_normalized(y, config.norm_bcdt_eps) for y in (low, b, c))
        dt = self.step(low)
        y, ssm = selective_scan(
            value,
            jax.nn.softplus(dt + along_last(self.dt_bias[...], dt)),
            -jnp.exp(self.a_log[...]),
            b,
            c,
            self.skip[...],
            state.ssm,
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        y = self.out(y * jax.nn.silu(z))
        return jnp.where(segments.valid[..., None], y, 0), Mamba1State(conv, ssm)


def _normalized(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
