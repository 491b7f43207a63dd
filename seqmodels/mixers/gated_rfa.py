"""Gated random feature attention: random Fourier features of a Gaussian kernel under one gate (arXiv 2103.02143)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import Linear
from seqmodels.operators.family import check_method
from seqmodels.operators.outer import normalised_linear_attention
from seqmodels.params import Group, param
from seqmodels.typing import Context, Memory, MixerConfig

UNIT = 1e-6
"""Added to a squared length before queries and keys are divided by it."""


@dataclasses.dataclass(frozen=True)
class GatedRFAConfig(MixerConfig):
    """q, k of unit length per head, v from W x;  g_t = sigmoid(W_g x_t + b), one per head;  w_i = sigma * w~_i

        phi(x) = [sin(w_1 x) .. sin(w_n x), cos(w_1 x) .. cos(w_n x)] / sqrt(n)
        S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T                    [2 n, value size]
        z_t = g_t z_{t-1} + (1 - g_t) phi(k_t)
        o_t = S_t^T phi(q_t) / max(z_t^T phi(q_t), norm_eps);  out = W_o o

    with n = `features`: phi(q) phi(k) estimates exp(-|sigma * (q - k)|^2 / 2), and may be negative. sigma, per head and
    channel, is learned and starts at 1. The directions w~ are unit normals that never change: drawn from `seed`, other
    ones for each head, the same in every layer, they are constants and no parameters. `norm_eps` keeps the quotient
    bounded where few random features estimate a small sum of weights. `chunk`: tokens per chunk of the scan, None for
    the operator's own choice.

    The gate is the paper's (section 3.3); the authors' code (Noahs-ARK/RFA) is public without it, and differs in this:
    - all four projections have biases there (that of W_o starts at 0), here only the gate has one; kernels start alike,
      Glorot-uniform with gain 1/sqrt(2), the gate's LeCun-normal;
    - lengths: x / (|x| + 1e-3) there, x / sqrt(|x|^2 + 1e-6) here;
    - features are times 0.1 for any n there, times 1/sqrt(n) as in the paper here;
    - z^T phi(q) is kept above 1 there (in the form with a mask: its absolute value above 1e-3). With the features of
      here that is 100 / n, while gated weights sum to 1 at most: so `norm_eps`, which negative sums meet as well;
    - training draws other directions for every layer and head at every step there, from a pool that may be orthogonal,
      evaluation the first of the pool for all layers; here they stay;
    - a temperature divides the directions there (1 by default), here it is part of sigma.
    """

    heads: int = 8
    features: int = 64
    norm_eps: float = 1e-2
    seed: int = 0
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk)
        for field in ("heads", "features"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be positive, not {self.norm_eps}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> GatedRFA:
        return GatedRFA(self, width, rngs=rngs)


class GatedRFAState(NamedTuple):
    memory: Float[Array, "B H K V"]
    normaliser: Float[Array, "B H K"]


class GatedRFA(nnx.Module):
    """See `GatedRFAConfig`. Features, gates and states are at least float32, whatever the type of x."""

    recurrent_memory = Memory(("memory",), heads=True, companions={"normaliser": 1})

    def __init__(self, config: GatedRFAConfig, width: int, *, rngs: nnx.Rngs):
        if width % config.heads:
            raise ValueError(f"a width of {width} does not divide into heads={config.heads}; choose a divisor")
        self.config = config
        self.head_size = width // config.heads
        glorot = jax.nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
        inner = functools.partial(Linear, width, rngs=rngs, axes=("embed", "heads"))
        self.query = inner(width, init=glorot)
        self.key = inner(width, init=glorot)
        self.value = inner(width, init=glorot)
        self.gate = inner(config.heads, bias=True)
        shape = (config.heads, self.head_size)
        self.sigma = param(rngs, shape, jax.nn.initializers.ones, group=Group.DYNAMICS, axes=("heads", None))
        self.out = Linear(width, width, rngs=rngs, axes=("heads", "embed"), init=glorot)

    @property
    def directions(self) -> np.ndarray:
        """w~, of shape [heads, features, head size]."""
        config = self.config
        return np.random.default_rng(config.seed).standard_normal((config.heads, config.features, self.head_size))

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> GatedRFAState:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        keys = (batch, self.config.heads, 2 * self.config.features)
        zeros = functools.partial(jnp.zeros, dtype=jnp.promote_types(dtype, jnp.float32))
        return GatedRFAState(zeros((*keys, self.head_size)), zeros(keys))

    def _features(self, x: Float[Array, "B T H K"]) -> Float[Array, "B T H 2*N"]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + UNIT)
        projection = jnp.asarray(self.directions, x.dtype) * self.sigma[...].astype(x.dtype)[:, None]
        angle = jnp.einsum("bthk,hnk->bthn", x, projection)
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1) * self.config.features**-0.5

    def __call__(
        self, x: Float[Array, "B T D"], state: GatedRFAState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], GatedRFAState]:
        config, segments = self.config, context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.memory.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.memory.shape[0]} rows cannot continue x of shape {x.shape}")

        x = jnp.where(segments.valid[..., None], x, 0)
        heads = lambda y: y.reshape(*x.shape[:2], config.heads, -1)
        gate = self.gate(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        total, weight, after = normalised_linear_attention(
            self._features(heads(self.query(x))).astype(x.dtype),
            (self._features(heads(self.key(x))) * jax.nn.sigmoid(-gate)[..., None]).astype(x.dtype),
            heads(self.value(x)),
            jax.nn.log_sigmoid(gate),
            state,
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        y = (total / jnp.maximum(weight, config.norm_eps)).reshape(*x.shape[:2], -1)
        return jnp.where(segments.valid[..., None], self.out(y), 0), GatedRFAState(*after)
