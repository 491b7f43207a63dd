"""Gated DeltaNet: a matrix state that decays and is corrected by the delta rule (arXiv 2412.06464)."""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import Linear, along_last, scaled
from seqmodels.layers.norms import RMSNorm
from seqmodels.layers.rates import check_ranges, log_uniform_rates, step_biases
from seqmodels.layers.short_conv import ShortConv
from seqmodels.mixers.gla import head_size
from seqmodels.operators.family import check_method
from seqmodels.operators.householder import delta_product
from seqmodels.params import Group, param
from seqmodels.typing import Context, Memory, MixerConfig


class Eigenvalues(enum.StrEnum):
    """The range of I - beta k k^T along k: beta in [0, 1], or in [0, 2], which can count (2411.12537)."""

    POSITIVE = "positive"
    SIGNED = "signed"


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
    """q, k, v = SiLU(conv(W x)), q and k of unit length per head;  beta_t = sigmoid(W_b x_t), times 2 if SIGNED

        a_t = exp(-exp(a_log) softplus(W_a x_t + dt_bias))              per head
        S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T      [key size, value size]
        o_t = S_t^T q_t / sqrt(key size)
        out = W_o (RMSNorm(o) * SiLU(W_g x))

    Keys have `expand_key` times the model's width over all `heads`, values `expand_value` times, unless `key_size` or
    `value_size` give the size of one head. `value_heads`, a multiple of `heads` and None for as many, share the queries
    and keys of `heads`: head h has those of h // (value_heads / heads) (Qwen3-Next); all else is per value head.

    `decay=False` leaves a_t at 1 and `output_gate=False` the gate out: with both this is DeltaNet (`DeltaNetConfig`).
    The norm is per head, with one scale for all heads. At initialisation exp(a_log) is uniform in `decay_range`,
    softplus(dt_bias) log-uniform in `step_range`; the output projection has its variance divided by depth.
    """

    heads: int = 6
    value_heads: int | None = None
    expand_key: float = 0.75
    expand_value: float = 1.5
    key_size: int | None = None
    value_size: int | None = None
    conv_width: int = 4
    eigenvalues: Eigenvalues = Eigenvalues.POSITIVE
    decay: bool = True
    output_gate: bool = True
    decay_range: tuple[float, float] = (1.0, 16.0)
    step_range: tuple[float, float] = (1e-3, 1e-1)
    norm_eps: float = 1e-5
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk)
        for field in ("heads", "value_heads", "key_size", "value_size", "conv_width"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, not {value}")
        for field in ("expand_key", "expand_value", "norm_eps"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} must be positive, not {getattr(self, field)}")
        if self.value_heads is not None and self.value_heads % self.heads:
            raise ValueError(f"value_heads={self.value_heads} must be a multiple of heads={self.heads}")
        if self.eigenvalues not in list(Eigenvalues):
            raise ValueError(f"unknown eigenvalues {self.eigenvalues!r}; choose one of {[str(e) for e in Eigenvalues]}")
        check_ranges(self, "decay_range", "step_range")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> GatedDeltaNet:
        return GatedDeltaNet(self, width, depth=depth, rngs=rngs)


class GatedDeltaNetState(NamedTuple):
    conv: Float[Array, "B W D"]
    memory: Float[Array, "B H K V"]


class GatedDeltaNet(nnx.Module):
    """See `GatedDeltaNetConfig`. Gates, decays and states are at least float32, whatever the type of x.

    With several `steps` every token has so many keys, values and betas, and decays once (`DeltaProductConfig`).
    """

    recurrent_memory = Memory(("memory",), heads=True)

    def __init__(self, config: GatedDeltaNetConfig, width: int, *, depth: int, rngs: nnx.Rngs, steps: int = 1):
        self.config = config
        self.steps = steps
        self.heads = config.value_heads or config.heads
        self.key_size = config.key_size or head_size(width, config, "expand_key", config.heads)
        self.value_size = config.value_size or head_size(width, config, "expand_value", self.heads)
        self.keys, self.values = config.heads * self.key_size, self.heads * self.value_size
        inner = functools.partial(Linear, width, rngs=rngs, axes=("embed", "heads"))
        mixed = self.keys + steps * (self.keys + self.values)  # a query, and keys and values of every step
        self.input = inner(mixed)
        # Variance 1/3 over the width is that of the published code, uniform in +-1/sqrt(width).
        self.conv = ShortConv(mixed, config.conv_width, rngs=rngs, bias=False, variance=1 / 3, axis="heads")
        self.beta = inner(steps * self.heads)
        self.step = inner(self.heads) if config.decay else None
        if config.decay:
            per_head = functools.partial(param, rngs, (self.heads,), group=Group.DYNAMICS, axes=("heads",))
            self.a_log = per_head(log_uniform_rates(*config.decay_range))
            self.dt_bias = per_head(step_biases(*config.step_range))
        self.gate = inner(self.values) if config.output_gate else None
        self.norm = RMSNorm(self.value_size, rngs=rngs, eps=config.norm_eps, axis=None)
        self.out = Linear(self.values, width, rngs=rngs, axes=("heads", "embed"), init=scaled(1.0 / depth))

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> GatedDeltaNetState:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        shape = (batch, self.heads, self.key_size, self.value_size)
        memory = jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
        return GatedDeltaNetState(self.conv.init_state(batch, dtype), memory)

    def __call__(
        self, x: Float[Array, "B T D"], state: GatedDeltaNetState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], GatedDeltaNetState]:
        config, segments = self.config, context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.memory.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.memory.shape[0]} rows cannot continue x of shape {x.shape}")

        x = jnp.where(segments.valid[..., None], x, 0)
        shaped = lambda y, *shape: y.reshape(*x.shape[:2], *shape)
        mixed, conv = self.conv(self.input(x), state.conv, context)
        query, key, value = jnp.split(jax.nn.silu(mixed), (self.keys, (1 + self.steps) * self.keys), axis=-1)
        beta, log_decay = self._gates(x)
        y, memory = delta_product(
            unit(shaped(query, -1, self.key_size)) * self.key_size**-0.5,
            unit(shaped(key, self.steps, -1, self.key_size)),
            shaped(value, self.steps, -1, self.value_size),
            beta,
            log_decay,
            state.memory,
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        y = self.norm(y.astype(x.dtype)).reshape(*x.shape[:2], -1)
        if self.gate is not None:
            y = y * jax.nn.silu(self.gate(x))
        return jnp.where(segments.valid[..., None], self.out(y), 0), GatedDeltaNetState(conv, memory)

    def _gates(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N H"], Float[Array, "B T H"] | None]:
        """beta and log a, at least float32."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        beta = jax.nn.sigmoid(self.beta(x).astype(wide)).reshape(*x.shape[:2], self.steps, self.heads)
        if self.config.eigenvalues == Eigenvalues.SIGNED:
            beta = 2 * beta
        if self.step is None:
            return beta, None
        step = self.step(x).astype(wide)
        step = jax.nn.softplus(step + along_last(self.dt_bias[...], step))
        return beta, -along_last(jnp.exp(self.a_log[...]), step) * step


def unit(x: Float[Array, "... K"], *, eps: float = 1e-6) -> Float[Array, "... K"]:
    """x / sqrt(|x|^2 + eps) along the last axis, computed in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    power = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(power + eps)).astype(x.dtype)
