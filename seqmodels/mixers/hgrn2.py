"""HGRN2: gated linear attention whose keys are 1 - forget gate, the gates bounded from below (arXiv 2404.07904)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.across import ACROSS, AcrossLayers
from seqmodels.layers.linear import Linear, scaled
from seqmodels.layers.norms import RMSNorm
from seqmodels.operators.family import check_method
from seqmodels.operators.outer import gated_linear_attention
from seqmodels.typing import Context, Memory, MixerConfig


@dataclasses.dataclass(frozen=True)
class HGRN2Config(MixerConfig):
    """q = SiLU(W_q x), v = W_v x;  a_t = bound + (1 - bound) sigmoid(W_f x_t), one per key;  per head

        S_t = Diag(a_t) S_{t-1} + (1 - a_t) v_t^T                       [head_size, head_size]
        o_t = S_t^T q_t
        out = W_o RMSNorm(o)

    Lower bounds grow with depth, per channel (HGRN, arXiv 2311.04823): with one parameter Gamma [layers, width] of all
    HGRN2 layers of a stack, that of layer i is sum of softmax(Gamma)_j over 0 < j <= i, the softmax being over layers;
    the first layer's is 0, as is that of a layer outside a `Stack`, and of all with `bounds=False`. Gamma starts at 0.
    The norm runs over all heads together. The output projection starts with its variance divided by depth.
    `chunk`: tokens per chunk of the scan, None for the operator's own choice.
    """

    head_size: int = 128
    bounds: bool = True
    norm_eps: float = 1e-5
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk)
        if self.head_size < 1:
            raise ValueError(f"head_size must be at least 1, not {self.head_size}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be positive, not {self.norm_eps}")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> HGRN2:
        return HGRN2(self, width, depth=depth, rngs=rngs)

    def across_layers(self, width: int) -> AcrossLayers | None:
        if not self.bounds:
            return None
        return AcrossLayers("hgrn2_bounds", (width,), ("heads",), jax.nn.initializers.zeros, lower_bounds)


class Bounds(NamedTuple):
    """A lower bound in [0, 1), and 1 - bound, which keeps its digits where the bound is near 1."""

    bound: Float[Array, "..."]
    rest: Float[Array, "..."]


def lower_bounds(gamma: Float[Array, "L D"]) -> Bounds:
    """Of all layers, see `HGRN2Config`."""
    share = jax.nn.softmax(gamma, axis=0)
    later = share.at[0].set(0)
    above = jnp.cumsum(later[:0:-1], axis=0)[::-1]  # of the layers after each
    return Bounds(jnp.cumsum(later, axis=0), share[:1] + jnp.concatenate([above, jnp.zeros_like(share[:1])]))


def bounded_gate(x: Float[Array, "B T D"], bounds: Bounds | None) -> tuple[Array, Array]:
    """log a and 1 - a for a = bound + (1 - bound) sigmoid(x); None is a bound of 0.

    Neither is a difference of near numbers: 1 - a = rest sigmoid(-x); log a is log1p of minus that where a > 1/2, and
    elsewhere, where x <= 0, log(bound + e^x) - log(1 + e^x).
    """
    if bounds is None:
        return jax.nn.log_sigmoid(x), jax.nn.sigmoid(-x)
    bound, rest = (jnp.broadcast_to(b.astype(x.dtype), x.shape) for b in bounds)
    key = rest * jax.nn.sigmoid(-x)
    open_gate, below = key < 0.5, jnp.minimum(x, 0)  # each branch stays finite where the other is taken
    log_bound = jnp.where(bound > 0, jnp.log(jnp.where(bound > 0, bound, 1)), -jnp.inf)
    small = jnp.logaddexp(log_bound, below) - jnp.log1p(jnp.exp(below))
    return jnp.where(open_gate, jnp.log1p(-jnp.where(open_gate, key, 0)), small), key


class HGRN2State(NamedTuple):
    memory: Float[Array, "B H K V"]


class HGRN2(nnx.Module):
    """See `HGRN2Config`. Gates and states are at least float32, whatever the type of x."""

    recurrent_memory = Memory(("memory",), heads=True)

    def __init__(self, config: HGRN2Config, width: int, *, depth: int, rngs: nnx.Rngs):
        if width % config.head_size:
            raise ValueError(f"a width of {width} does not divide into heads of head_size={config.head_size}")
        self.config = config
        self.heads = width // config.head_size
        inner = functools.partial(Linear, width, width, rngs=rngs, axes=("embed", "heads"))
        self.query = inner()
        self.forget = inner()
        self.value = inner()
        self.norm = RMSNorm(width, rngs=rngs, eps=config.norm_eps, axis="heads")
        self.out = Linear(width, width, rngs=rngs, axes=("heads", "embed"), init=scaled(1.0 / depth))

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> HGRN2State:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        shape = (batch, self.heads, self.config.head_size, self.config.head_size)
        return HGRN2State(jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)))

    def __call__(
        self, x: Float[Array, "B T D"], state: HGRN2State | None, context: Context
    ) -> tuple[Float[Array, "B T D"], HGRN2State]:
        config, segments = self.config, context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.memory.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.memory.shape[0]} rows cannot continue x of shape {x.shape}")

        x = jnp.where(segments.valid[..., None], x, 0)
        heads = lambda y: y.reshape(*x.shape[:2], self.heads, -1)
        forget = self.forget(x).astype(jnp.promote_types(x.dtype, jnp.float32))
        log_decay, key = bounded_gate(forget, context.shared.get(ACROSS))
        y, memory = gated_linear_attention(
            heads(jax.nn.silu(self.query(x))),
            heads(key.astype(x.dtype)),
            heads(self.value(x)),
            heads(log_decay),
            state.memory,
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        y = self.norm(y.astype(x.dtype).reshape(*x.shape[:2], -1))
        return jnp.where(segments.valid[..., None], self.out(y), 0), HGRN2State(memory)
