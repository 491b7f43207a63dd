"""Kimi Delta Attention: the gated delta rule with a decay of its own for every key (arXiv 2510.26692)."""

from __future__ import annotations

import dataclasses
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
from seqmodels.mixers.gated_deltanet import Eigenvalues, unit
from seqmodels.mixers.gla import head_sizes
from seqmodels.operators.delta import delta_rule
from seqmodels.operators.family import check_method
from seqmodels.params import Group, param
from seqmodels.typing import Context, Memory, MixerConfig


@dataclasses.dataclass(frozen=True)
class KDAConfig(MixerConfig):
    """q, k, v = SiLU(conv(W x)), q and k of unit length per head;  beta_t = sigmoid(W_b x_t), times 2 if SIGNED

        log a_t = -exp(a_log) softplus(F_2 F_1 x_t + dt_bias)           per head and key; a_log per head
        S = Diag(a_t) S_{t-1};   S_t = S + beta_t k_t (v_t - S^T k_t)^T [key size, value size]
        o_t = S_t^T q_t / sqrt(key size)
        out = W_o (RMSNorm(o) * sigmoid(G_2 G_1 x + g))

    Keys have `expand_key` times the model's width over all `heads`, values `expand_value` times; F and G have rank
    `gate_rank`, None for the value size, as published. The norm is per head, with one scale for all heads. At
    initialisation exp(a_log) is uniform in `decay_range`, softplus(dt_bias) log-uniform in `step_range`; the output
    projection has its variance divided by depth.
    """

    heads: int = 4
    expand_key: float = 1.0
    expand_value: float = 1.0
    gate_rank: int | None = None
    conv_width: int = 4
    eigenvalues: Eigenvalues = Eigenvalues.POSITIVE
    decay_range: tuple[float, float] = (1.0, 16.0)
    step_range: tuple[float, float] = (1e-3, 1e-1)
    norm_eps: float = 1e-5
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk)
        for field in ("heads", "gate_rank", "conv_width"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, not {value}")
        for field in ("expand_key", "expand_value", "norm_eps"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} must be positive, not {getattr(self, field)}")
        if self.eigenvalues not in list(Eigenvalues):
            raise ValueError(f"unknown eigenvalues {self.eigenvalues!r}; choose one of {[str(e) for e in Eigenvalues]}")
        check_ranges(self, "decay_range", "step_range")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> KDA:
        return KDA(self, width, depth=depth, rngs=rngs)


class KDAState(NamedTuple):
    conv: Float[Array, "B W D"]
    memory: Float[Array, "B H K V"]


class KDA(nnx.Module):
    """See `KDAConfig`. Gates, decays and states are at least float32, whatever the type of x."""

    recurrent_memory = Memory(("memory",), heads=True)

    def __init__(self, config: KDAConfig, width: int, *, depth: int, rngs: nnx.Rngs):
        self.config = config
        self.key_size, self.value_size = head_sizes(width, config)
        self.keys, values = config.heads * self.key_size, config.heads * self.value_size
        rank = config.gate_rank or self.value_size
        inner = functools.partial(Linear, width, rngs=rngs, axes=("embed", "heads"))
        narrow = functools.partial(Linear, width, rank, rngs=rngs, axes=("embed", None))
        widen = functools.partial(Linear, rank, rngs=rngs, axes=(None, "heads"))
        self.input = inner(2 * self.keys + values)
        # Variance 1/3 over the width is that of the published code, uniform in +-1/sqrt(width).
        self.conv = ShortConv(
            2 * self.keys + values, config.conv_width, rngs=rngs, bias=False, variance=1 / 3, axis="heads"
        )
        self.beta = inner(config.heads)
        self.decay_in, self.decay_out = narrow(), widen(self.keys)
        dynamics = functools.partial(param, rngs, group=Group.DYNAMICS, axes=("heads",))
        self.a_log = dynamics((config.heads,), log_uniform_rates(*config.decay_range))
        self.dt_bias = dynamics((self.keys,), step_biases(*config.step_range))
        self.gate_in, self.gate_out = narrow(), widen(values, bias=True)
        self.norm = RMSNorm(self.value_size, rngs=rngs, eps=config.norm_eps, axis=None)
        self.out = Linear(values, width, rngs=rngs, axes=("heads", "embed"), init=scaled(1.0 / depth))

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> KDAState:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        shape = (batch, self.config.heads, self.key_size, self.value_size)
        return KDAState(self.conv.init_state(batch, dtype), jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)))

    def __call__(
        self, x: Float[Array, "B T D"], state: KDAState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], KDAState]:
        config, segments = self.config, context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.memory.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.memory.shape[0]} rows cannot continue x of shape {x.shape}")

        x = jnp.where(segments.valid[..., None], x, 0)
        heads = lambda y: y.reshape(*x.shape[:2], config.heads, -1)
        mixed, conv = self.conv(self.input(x), state.conv, context)
        query, key, value = jnp.split(jax.nn.silu(mixed), (self.keys, 2 * self.keys), axis=-1)
        beta, log_decay = self._gates(x)
        y, memory = delta_rule(
            unit(heads(query)) * self.key_size**-0.5,
            unit(heads(key)),
            heads(value),
            beta,
            log_decay,
            state.memory,
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        y = self.norm(y.astype(x.dtype)).reshape(*x.shape[:2], -1)
        y = y * jax.nn.sigmoid(self.gate_out(self.gate_in(x)))
        return jnp.where(segments.valid[..., None], self.out(y), 0), KDAState(conv, memory)

    def _gates(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T H"], Float[Array, "B T H K"]]:
        """beta and log a, at least float32."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        beta = jax.nn.sigmoid(self.beta(x).astype(wide))
        if self.config.eigenvalues == Eigenvalues.SIGNED:
            beta = 2 * beta
        step = self.decay_out(self.decay_in(x).astype(wide))
        step = jax.nn.softplus(step + along_last(self.dt_bias[...], step))
        step = step.reshape(*x.shape[:2], self.config.heads, self.key_size)
        return beta, -jnp.exp(self.a_log[...]).astype(wide)[None, None, :, None] * step
