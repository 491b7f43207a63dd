"""RWKV-7's time mix: a matrix state that a generalised delta rule rewrites, key by key (arXiv 2503.14456)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from seqmodels.layers.linear import Linear
from seqmodels.layers.low_rank import LowRank
from seqmodels.layers.rwkv_channel import uniform
from seqmodels.layers.stack import STATE
from seqmodels.layers.token_shift import lerp, no_token, token_shift
from seqmodels.mixers.gated_deltanet import unit
from seqmodels.mixers.rwkv6 import head_norm, heads_of, looking_back
from seqmodels.operators.delta import diagonal_plus_rank_one
from seqmodels.operators.family import check_method
from seqmodels.params import Group, param
from seqmodels.typing import Context, Initializer, Memory, MixerConfig

FIRST = "rwkv7"
"""`context.shared[FIRST]`: the `FirstValues` of the stack's first RWKV-7 layer."""
# The power of (n / width)^(power (1 - layer / depth)) in what each part starts with of the current token.
POWERS = {"receptance": 0.2, "decay": 0.9, "key": 0.7, "value": 0.7, "rate": 0.9, "gate": 0.2}
TINY = 1e-24  # torch's normalize divides by max(|k|, 1e-12)


@dataclasses.dataclass(frozen=True)
class RWKV7Config(MixerConfig):
    """With x_* = x_t + (x_{t-1} - x_t) * mu_* for each of r, w, k, v, a, g, per head of `head_size` channels:

        log w = -e^{-1/2} sigmoid(w0 + tanh(x_w W_1) W_2);   a = sigmoid(a0 + x_a A_1 A_2);   g = sigmoid(x_g G_1) G_2
        v = W_v x_v + (v_first - W_v x_v) sigmoid(v0 + x_v V_1 V_2)     v_first: W_v x_v of the first RWKV-7 layer
        kappa = k * xi / |k * xi|;   k <- k (1 + (a - 1) * alpha)
        S_t = (Diag(w) - (a * kappa) kappa^T) S_{t-1} + k v^T;   y = S_t^T r            [key size, value size]
        out = W_o ((GroupNorm(y) + (sum r * k * rho) v) * g)

    Ranks: None is the published size, a multiple of 32 near 1.8 sqrt(width) (`decay_rank`, `rate_rank`), 1.3
    sqrt(width) (`value_rank`) and 0.6 width^0.8 (`gate_rank`). The group norm is per head. Initial values are those of
    the authors' code: first matrices of low rank and W_o at zero, second ones 0.1 times orthogonal, W_r and W_v uniform
    within 1 / (2 sqrt(width)), W_k within a tenth of that, vectors by layer and channel. Without a Stack around it a
    mixer is its own first layer.
    """

    head_size: int = 64
    decay_rank: int | None = None
    rate_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None
    norm_eps: float = 64e-5
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk)
        for field in ("head_size", "decay_rank", "rate_rank", "value_rank", "gate_rank"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, not {value}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be positive, not {self.norm_eps}")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> RWKV7:
        return RWKV7(self, width, layer=layer, depth=depth, rngs=rngs)


class RWKV7State(NamedTuple):
    last: Float[Array, "B D"]
    memory: Float[Array, "B H K V"]


class FirstValues(NamedTuple):
    """`known` False: no layer has published yet, and `values` mean nothing."""

    values: Float[Array, "B T D"]
    known: Bool[Array, ""]


def published_rank(factor: float, width: int, power: float) -> int:
    return max(32, 32 * round(factor * width**power / 32))


class RWKV7(nnx.Module):
    """See `RWKV7Config`. Decays, rates and states are at least float32, whatever the type of x."""

    recurrent_memory = Memory(("memory",), heads=True)

    def __init__(self, config: RWKV7Config, width: int, *, layer: int, depth: int, rngs: nnx.Rngs):
        self.config, self.width = config, width
        self.heads = heads_of(width, config.head_size)
        linear = jnp.linspace(-0.5, 0.5, width)
        ramp = jnp.tile(jnp.linspace(-1, 1, config.head_size), self.heads)
        zigzag = ramp * jnp.abs(ramp)
        progress = layer / max(depth - 1, 1)
        decay = 6 * jnp.linspace(0, 1, width) ** (1 + progress**0.3) - 6 + 0.5 + 2.5 * zigzag

        mix = functools.partial(param, rngs, (width,), group=Group.DYNAMICS, axes=("embed",))
        self.mix = nnx.Dict({name: mix(looking_back(layer, depth, power)) for name, power in POWERS.items()})
        low = functools.partial(LowRank, width, out_size=width, rngs=rngs, up=jax.nn.initializers.orthogonal(0.1))
        sizes = {"decay": (1.8, 0.5), "rate": (1.8, 0.5), "value": (1.3, 0.5), "gate": (0.6, 0.8)}
        ranks = {
            name: getattr(config, f"{name}_rank") or published_rank(factor, width, power)
            for name, (factor, power) in sizes.items()
        }
        self.decay = low(ranks["decay"], base=_fixed(decay), f=jnp.tanh)
        self.rate = low(ranks["rate"], base=_fixed(-0.19 + 0.3 * zigzag + 0.4 * linear))
        self.first = low(ranks["value"], base=_fixed(0.73 - 0.4 * linear))
        self.gate = low(ranks["gate"], base=None, f=jax.nn.sigmoid)

        per_head = functools.partial(param, rngs, group=Group.DYNAMICS)
        shape, axes = (self.heads, config.head_size), ("heads", None)
        self.removal = per_head(shape, _fixed(0.71 - 0.1 * linear), axes=axes)  # the paper's xi, k_k in the code
        self.replacement = per_head(shape, _fixed(jnp.full(width, 1.02)), axes=axes)  # alpha, k_a
        self.bonus = per_head(shape, _fixed(jnp.full(width, -0.04)), axes=axes)  # rho, r_k
        inner = functools.partial(Linear, width, width, rngs=rngs, axes=("embed", "heads"))
        bound = 0.5 * width**-0.5
        self.receptance, self.value = inner(init=uniform(bound)), inner(init=uniform(bound))
        self.key = inner(init=uniform(0.1 * bound))
        self.norm = head_norm(width, self.heads, layer=layer, depth=depth, eps=config.norm_eps, rngs=rngs)
        zeros = jax.nn.initializers.zeros
        self.out = Linear(width, width, rngs=rngs, axes=("heads", "embed"), init=zeros)

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> RWKV7State:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        size = self.config.head_size
        memory = jnp.zeros((batch, self.heads, size, size), jnp.promote_types(dtype, jnp.float32))
        return RWKV7State(no_token(batch, self.width, dtype), memory)

    def publish(self, x: Float[Array, "B T D"], context: Context) -> Context:
        """The values of the first layer that has any, for the later ones."""
        x = jnp.where(context.segments.valid[..., None], x, 0)
        previous, _ = self._shift(x, context.shared.get(STATE), context)
        own = FirstValues(self.value(self._mixed(x, previous, "value")), jnp.ones((), bool))
        first = context.shared.get(FIRST, own)
        own = own._replace(values=jnp.where(first.known, first.values, own.values))
        return context.replace(shared={**context.shared, FIRST: own})

    def __call__(
        self, x: Float[Array, "B T D"], state: RWKV7State | None, context: Context
    ) -> tuple[Float[Array, "B T D"], RWKV7State]:
        config, segments = self.config, context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        x = jnp.where(segments.valid[..., None], x, 0)
        previous, last = self._shift(x, state, context)
        mixed = functools.partial(self._mixed, x, previous)
        heads = lambda y: y.reshape(*x.shape[:2], self.heads, -1)
        per_head = lambda parameter, like: parameter[...].astype(like.dtype)[None, None]

        log_decay = heads(-math.exp(-0.5) * jax.nn.sigmoid(self.decay(mixed("decay"))))
        rate = heads(jax.nn.sigmoid(self.rate(mixed("rate"))))
        value = self.value(mixed("value"))
        first = context.shared[FIRST].values if FIRST in context.shared else value
        value = heads(value + (first - value) * jax.nn.sigmoid(self.first(mixed("value")))).astype(x.dtype)
        receptance, key = heads(self.receptance(mixed("receptance"))), heads(self.key(mixed("key"))).astype(rate.dtype)
        kappa = unit(key * per_head(self.removal, key), eps=TINY)
        key = key * (1 + (rate - 1) * per_head(self.replacement, rate))
        y, memory = diagonal_plus_rank_one(
            receptance,
            key.astype(x.dtype),
            value,
            (-rate * kappa).astype(x.dtype),
            kappa.astype(x.dtype),
            log_decay,
            state.memory,
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        now = jnp.sum(receptance * key * per_head(self.bonus, key), axis=-1, keepdims=True) * value
        y = self.norm(y.astype(log_decay.dtype).reshape(x.shape)) + now.reshape(x.shape)
        y = self.out((y * self.gate(mixed("gate"))).astype(x.dtype))
        return jnp.where(segments.valid[..., None], y, 0), RWKV7State(last, memory)

    def _shift(self, x: Array, state: RWKV7State | None, context: Context) -> tuple[Array, Array]:
        return token_shift(x, no_token(x.shape[0], self.width, x.dtype) if state is None else state.last, context)

    def _mixed(self, x: Array, previous: Array, name: str) -> Array:
        return lerp(previous, x, self.mix[name][...])


def _fixed(values: Array) -> Initializer:
    return lambda key, shape, dtype: values.astype(dtype).reshape(shape)
