"""RWKV-6's time mix: a matrix state with decays and token shifts that depend on the data (arXiv 2404.05892)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import Linear
from seqmodels.layers.low_rank import LowRank
from seqmodels.layers.norms import LayerNorm
from seqmodels.layers.rwkv_channel import uniform
from seqmodels.layers.token_shift import lerp, no_token, shares, token_shift
from seqmodels.operators.family import check_method
from seqmodels.operators.outer import gated_linear_attention
from seqmodels.params import Group, param
from seqmodels.typing import Context, Initializer, Memory, MixerConfig

MIXED = ("decay", "key", "value", "receptance", "gate")


@dataclasses.dataclass(frozen=True)
class RWKV6Config(MixerConfig):
    """With the data-dependent token shift x_* = x_t + (x_{t-1} - x_t) * (mu_* + tanh(x' A_*) B_*), where
    x' = x_t + (x_{t-1} - x_t) * mu, for each of decay, key, value, receptance and gate:

        log a_t = -exp(w + tanh(x_w W_1) W_2);   r, k, v = W x_*        per head of `head_size` channels
        o_t = (S_{t-1} + Diag(u) k_t v_t^T)^T r_t;   S_t = Diag(a_t) S_{t-1} + k_t v_t^T
        out = W_o (GroupNorm(o) * SiLU(W_g x_g))

    `mix_rank` is that of each A_* B_*, `decay_rank` that of W_1 W_2; the group norm is per head. As published, A_*, W_1
    and W_o start at zero, B_* and W_2 uniform within 0.01, W_r and W_v orthogonal, W_k and W_g 0.1 times orthogonal,
    and mu_*, w, u and the norm's scale by layer and channel.
    """

    head_size: int = 64
    mix_rank: int = 32
    decay_rank: int = 64
    norm_eps: float = 64e-5
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk)
        for field in ("head_size", "mix_rank", "decay_rank"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be positive, not {self.norm_eps}")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> RWKV6:
        return RWKV6(self, width, layer=layer, depth=depth, rngs=rngs)


class RWKV6State(NamedTuple):
    last: Float[Array, "B D"]
    memory: Float[Array, "B H K V"]


def heads_of(width: int, head_size: int) -> int:
    """How many heads; ValueError where the width does not divide."""
    if width % head_size:
        raise ValueError(f"the width {width} does not divide into heads of head_size={head_size}; choose a divisor")
    return width // head_size


def head_norm(width: int, heads: int, *, layer: int, depth: int, eps: float, rngs: nnx.Rngs) -> LayerNorm:
    """A group norm over heads whose scale starts at ((layer + 1) / depth)^0.7, as that of RWKV-6 and 7 does."""
    norm = LayerNorm(width, rngs=rngs, eps=eps, groups=heads, axis="heads")
    norm.scale[...] = jnp.full((width,), ((layer + 1) / depth) ** 0.7)
    return norm


def looking_back(layer: int, depth: int, power: float = 1.0, offset: float = 0.0) -> Initializer:
    """How much of the token before: what `shares` leaves."""
    init = shares(layer, depth, power, offset)
    return lambda *inputs: 1 - init(*inputs)


class RWKV6(nnx.Module):
    """See `RWKV6Config`. Decays and states are at least float32, whatever the type of x."""

    recurrent_memory = Memory(("memory",), heads=True)

    def __init__(self, config: RWKV6Config, width: int, *, layer: int, depth: int, rngs: nnx.Rngs):
        self.config, self.width = config, width
        self.heads = heads_of(width, config.head_size)
        progress, small = layer / max(depth - 1, 1), uniform(0.01)
        mu = functools.partial(looking_back, layer, depth)

        def init_mix(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            inits = {"value": mu(offset=0.3 * progress), "receptance": mu(0.5), "gate": mu(0.5)}
            return jnp.stack([inits.get(name, mu())(key, shape[1:], dtype) for name in MIXED])

        def init_decay(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return 5 * jnp.linspace(0, 1, width, dtype=dtype) ** (0.7 + 1.3 * progress) - 6

        def init_bonus(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            zigzag = 0.1 * ((jnp.arange(width, dtype=dtype) + 1) % 3 - 1)
            return (progress * jnp.linspace(1, 0, width, dtype=dtype) + zigzag).reshape(shape)

        dynamics = functools.partial(param, rngs, group=Group.DYNAMICS)
        zeros, orthogonal = jax.nn.initializers.zeros, jax.nn.initializers.orthogonal
        self.mix_base = dynamics((width,), mu(), axes=("embed",))
        self.mix = dynamics((len(MIXED), width), init_mix, axes=(None, "embed"))
        self.mix_down = dynamics((width, len(MIXED) * config.mix_rank), zeros, axes=("embed", None))
        self.mix_up = dynamics((len(MIXED), config.mix_rank, width), small, axes=(None, None, "embed"))
        self.decay = LowRank(width, config.decay_rank, width, rngs=rngs, base=init_decay, up=small, f=jnp.tanh)
        self.bonus = dynamics((self.heads, config.head_size), init_bonus, axes=("heads", None))
        inner = functools.partial(Linear, width, width, rngs=rngs, axes=("embed", "heads"))
        self.key, self.value = inner(init=orthogonal(0.1)), inner(init=orthogonal())
        self.receptance, self.gate = inner(init=orthogonal()), inner(init=orthogonal(0.1))
        self.norm = head_norm(width, self.heads, layer=layer, depth=depth, eps=config.norm_eps, rngs=rngs)
        self.out = Linear(width, width, rngs=rngs, axes=("heads", "embed"), init=zeros)

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> RWKV6State:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        size = self.config.head_size
        memory = jnp.zeros((batch, self.heads, size, size), jnp.promote_types(dtype, jnp.float32))
        return RWKV6State(no_token(batch, self.width, dtype), memory)

    def __call__(
        self, x: Float[Array, "B T D"], state: RWKV6State | None, context: Context
    ) -> tuple[Float[Array, "B T D"], RWKV6State]:
        config, segments = self.config, context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        x = jnp.where(segments.valid[..., None], x, 0)
        previous, last = token_shift(x, state.last, context)
        for_decay, for_key, for_value, for_receptance, for_gate = self._mixed(x, previous)
        heads = lambda y: y.reshape(*x.shape[:2], self.heads, -1)
        y, memory = gated_linear_attention(
            heads(self.receptance(for_receptance)),
            heads(self.key(for_key)),
            heads(self.value(for_value)),
            heads(-jnp.exp(self.decay(for_decay))),
            state.memory,
            bonus=self.bonus[...],
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        y = self.norm(y.astype(memory.dtype).reshape(x.shape)) * jax.nn.silu(self.gate(for_gate))
        return jnp.where(segments.valid[..., None], self.out(y.astype(x.dtype)), 0), RWKV6State(last, memory)

    def _mixed(self, x: Float[Array, "B T D"], previous: Float[Array, "B T D"]) -> tuple[Array, ...]:
        """x_* for each of `MIXED`."""
        kind = x.dtype
        x, previous = (a.astype(jnp.promote_types(kind, jnp.float32)) for a in (x, previous))
        base = lerp(previous, x, self.mix_base[...])
        low = jnp.tanh(base @ self.mix_down[...].astype(x.dtype)).reshape(*x.shape[:2], len(MIXED), -1)
        moved = jnp.einsum("btmr,mrd->mbtd", low, self.mix_up[...].astype(x.dtype))
        share = moved + self.mix[...].astype(x.dtype)[:, None, None]
        return tuple((x + (previous - x) * one).astype(kind) for one in share)
