"""Mamba-3: a selective state-space layer with the trapezoidal rule, a rotating state and drives of rank R."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import Linear, along_last, uniform
from seqmodels.layers.norms import RMSNorm
from seqmodels.layers.positions import rotated_size
from seqmodels.layers.rates import check_ranges, step_biases
from seqmodels.layers.short_conv import with_history
from seqmodels.operators.family import check_method
from seqmodels.operators.rotation import running_angles
from seqmodels.operators.trapezoid import LastToken, trapezoidal_scan
from seqmodels.params import Group, param
from seqmodels.typing import Context, Memory, MixerConfig


@dataclasses.dataclass(frozen=True)
class Mamba3Config(MixerConfig):
    """arXiv 2603.15569:  [z, x, B, C, dt, A, trap, angle] = W_in u;  per head of `head_size` channels

        dt = softplus(dt + dt_bias);  A = -max(heavy_tail(A), decay_floor);  lambda = sigmoid(trap)
        phi_t = phi_{t-1} + pi tanh(angle_t) dt_t modulo 2 pi           [rotated pairs of the state]
        k_t, q_t = Rot(phi_t)(RMSNorm(B_t) + bias_B), Rot(phi_t)(RMSNorm(C_t) + bias_C)
        S_t = exp(dt_t A_t) (S_{t-1} + (1 - lambda_t) dt_t k_{t-1} x_{t-1}^T) + lambda_t dt_t k_t x_t^T
        y_t = S_t^T q_t + skip x_t;  out = W_out (y * SiLU(z))

    heavy_tail(a) = 1 + a for a >= 0, 1 / (1 - a) below. Rot turns pairs of neighbours, the first `rotated_fraction` of
    `state_size` (the authors' MIMO turns pairs of halves, which is another order of the channels); angles are shared by
    heads, B and C by the heads of each of `groups`. With `rank` R > 1 (MIMO) there are R keys and queries; x, z and y
    have R copies, weighted per head and channel, and outputs are summed over R. `output_norm`: RMSNorm of each head's y
    before the gate. There is no convolution.

    At initialisation biases of B and C are 1, softplus(dt_bias) is log-uniform in `step_range`, skip 1, weights of the
    copies 1/R, 1, 1/R, and matrices uniform in +-1/sqrt(fan-in), W_out also divided by sqrt(depth). `chunk`: tokens per
    chunk of the scan, None for the operator's own choice.
    """

    expansion: float = 2.0
    head_size: int = 64
    state_size: int = 128
    groups: int = 1
    rank: int = 1
    rotated_fraction: float = 0.5
    output_norm: bool = False
    decay_floor: float = 1e-4
    step_range: tuple[float, float] = (1e-3, 1e-1)
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk)
        for field in ("head_size", "state_size", "groups", "rank"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        for field in ("expansion", "decay_floor"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} must be positive, not {getattr(self, field)}")
        rotated_size(self.state_size, self.rotated_fraction)
        check_ranges(self, "step_range")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> Mamba3:
        return Mamba3(self, width, depth=depth, rngs=rngs)


class Mamba3State(NamedTuple):
    """Angles in turns, memory, and key and value of the last token."""

    turns: Float[Array, "B H S"]
    memory: Float[Array, "B H K V"]
    key: Float[Array, "B H R K"]
    value: Float[Array, "B H V"]


class Mamba3(nnx.Module):
    """See `Mamba3Config`. Step sizes, decays, angles and states are at least float32, whatever the type of x."""

    recurrent_memory = Memory(("memory",), heads=True, companions={"turns": 0})

    def __init__(self, config: Mamba3Config, width: int, *, depth: int, rngs: nnx.Rngs):
        inner = round(config.expansion * width)
        if inner % config.head_size:
            raise ValueError(f"the inner width {inner} does not divide into heads of head_size={config.head_size}")
        heads, rank = inner // config.head_size, config.rank
        if heads % config.groups:
            raise ValueError(f"{heads} heads do not divide into groups={config.groups}; choose a divisor")
        self.config, self.inner, self.heads = config, inner, heads
        self.angles = rotated_size(config.state_size, config.rotated_fraction) // 2
        shared = rank * config.groups * config.state_size
        self.sizes = (inner, inner, shared, shared, heads, heads, heads, self.angles)
        self.input = Linear(width, sum(self.sizes), rngs=rngs, axes=("embed", "recurrent"), init=uniform())
        self.out = Linear(inner, width, rngs=rngs, axes=("recurrent", "embed"), init=uniform(1 / depth))
        self.norm_b = RMSNorm(config.state_size, rngs=rngs, eps=1e-5, axis=None)
        self.norm_c = RMSNorm(config.state_size, rngs=rngs, eps=1e-5, axis=None)
        self.norm = RMSNorm(inner, rngs=rngs, eps=1e-5, groups=heads, axis="recurrent") if config.output_norm else None

        ones = jax.nn.initializers.ones
        axes = ("heads", None, None)
        bias = functools.partial(param, rngs, (heads, rank, config.state_size), ones, group=Group.BIAS, axes=axes)
        self.bias_b, self.bias_c = bias(), bias()
        per_head = functools.partial(param, rngs, (heads,), group=Group.DYNAMICS, axes=("heads",))
        self.dt_bias = per_head(step_biases(*config.step_range))
        self.skip = per_head(ones)
        copies = functools.partial(param, rngs, (heads, rank, config.head_size), group=Group.MATRIX, axes=axes)
        share = jax.nn.initializers.constant(1 / rank)
        self.copies_x, self.copies_z, self.copies_y = (
            copies(init) if rank > 1 else None for init in (share, ones, share)
        )

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> Mamba3State:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        key, value = self.config.state_size, self.config.head_size
        sizes = ((self.angles,), (key, value), (self.config.rank, key), (value,))
        kind = jnp.promote_types(dtype, jnp.float32)
        return Mamba3State(*(jnp.zeros((batch, self.heads, *size), kind) for size in sizes))

    def __call__(
        self, x: Float[Array, "B T D"], state: Mamba3State | None, context: Context
    ) -> tuple[Float[Array, "B T D"], Mamba3State]:
        config, valid = self.config, context.segments.valid
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.memory.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.memory.shape[0]} rows cannot continue x of shape {x.shape}")
        options: dict[str, Any] = {"segments": context.segments, "sequence_axis": context.sequence_axis}
        options["method"] = config.method
        x = jnp.where(valid[..., None], x, 0)
        ends = [sum(self.sizes[: n + 1]) for n in range(len(self.sizes) - 1)]
        z, value, b, c, *gates = jnp.split(self.input(x), ends, axis=-1)
        dt, decay, share, angle = (gate.astype(jnp.promote_types(x.dtype, jnp.float32)) for gate in gates)
        dt = jax.nn.softplus(dt + along_last(self.dt_bias[...], dt))
        decay, share = -jnp.maximum(heavy_tail(decay), config.decay_floor), jax.nn.sigmoid(share)

        turns = 0.5 * jnp.tanh(angle)[:, :, None] * dt[..., None]  # [B, T, H, S]
        flat = lambda y, batch_axes: y.reshape(*y.shape[:batch_axes], -1)
        angle, last_turns = running_angles(flat(turns, 2), flat(state.turns, 1), **options)
        angle = 2 * math.pi * angle.reshape(turns.shape)
        key = self._rotated(self.norm_b, b, self.bias_b, angle)
        query = self._rotated(self.norm_c, c, self.bias_c, angle)
        value, z = (y.reshape(*x.shape[:2], self.heads, config.head_size) for y in (value, z))
        copies = _copies(value, self.copies_x)
        y, memory = trapezoidal_scan(
            query,
            key,
            copies,
            log_decay=dt * decay,
            now=dt * share,
            before=dt * (1 - share),
            memory=state.memory,
            last=LastToken(state.key, _copies(state.value, self.copies_x)),
            chunk=config.chunk,
            **options,
        )
        y = y + self.skip[...].astype(x.dtype)[None, None, :, None, None] * copies
        last = lambda y, before: with_history(flat(y, 2), flat(before, 1)[:, None], context)[2].reshape(before.shape)
        after = Mamba3State(
            last_turns.reshape(state.turns.shape), memory, last(key, state.key), last(value, state.value)
        )
        return jnp.where(valid[..., None], self._output(y, z), 0), after

    def _rotated(self, norm: RMSNorm, x: Array, bias: nnx.Param, angle: Float[Array, "B T H S"]) -> Array:
        """[B, T, rank * groups * state_size] as [B, T, H, R, K]: normalised, with each head's bias, and turned."""
        config = self.config
        x = norm(x.reshape(*x.shape[:2], config.rank, config.groups, config.state_size))
        x = jnp.repeat(jnp.swapaxes(x, 2, 3), self.heads // config.groups, axis=2)
        wide = x.astype(angle.dtype) + bias[...].astype(angle.dtype)[None, None]
        size = 2 * self.angles
        cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
        even, odd = wide[..., 0:size:2], wide[..., 1:size:2]
        turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        return jnp.concatenate([turned.reshape(*wide.shape[:-1], size), wide[..., size:]], axis=-1).astype(x.dtype)

    def _output(self, y: Float[Array, "B T H R V"], z: Float[Array, "B T H V"]) -> Float[Array, "B T D"]:
        if self.norm is not None:  # of each copy, over all channels
            rows = jnp.moveaxis(y, 3, 2)
            rows = self.norm(rows.reshape(*rows.shape[:3], self.inner)).reshape(rows.shape)
            y = jnp.moveaxis(rows, 2, 3)
        y = y * jax.nn.silu(_copies(z, self.copies_z))
        if self.copies_y is not None:
            y = y * self.copies_y[...].astype(y.dtype)[None, None]
        return self.out(jnp.sum(y, axis=3).reshape(*y.shape[:2], self.inner))


def _copies(x: Float[Array, "*B H V"], weights: nnx.Param | None) -> Float[Array, "*B H R V"]:
    """x once for each rank, weighted."""
    if weights is None:
        return x[..., None, :]
    return x[..., None, :] * weights[...].astype(x.dtype).reshape((1,) * (x.ndim - 2) + weights.shape)


def heavy_tail(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 + x for x >= 0, 1 / (1 - x) below: positive, and smooth at 0."""
    return jnp.maximum(x, 0) + 1 / (1 - jnp.minimum(x, 0))
