"""mLSTM: a matrix memory with exponential gates (xLSTM, arXiv 2405.04517; the block of xLSTM-7B, 2503.13427)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import BlockDiagonalLinear, Linear, along_last
from seqmodels.layers.norms import LayerNorm
from seqmodels.layers.short_conv import ShortConv
from seqmodels.operators.exponential import ExponentialState, empty_state, mlstm_scan
from seqmodels.operators.family import check_method
from seqmodels.params import Group, param
from seqmodels.typing import Context, Initializer, Memory, MixerConfig


@dataclasses.dataclass(frozen=True)
class MLSTMConfig(MixerConfig):
    """By default the block of xLSTM-7B:

        q, k, v = W_q x, W_k x, W_v x                                      per head, q divided by sqrt(key size)
        log i, f = cap(W_i x + b_i), cap(W_f x + b_f)                      cap(a) = gate_cap tanh(a / gate_cap)
        C_t = sigmoid(f) C_{t-1} + i k v^T,  n_t = sigmoid(f) n_{t-1} + i k
        h = norm(C_t^T q / max(|n_t^T q|, 1)),  out = W_out(sigmoid(W_o x) * h)   a LayerNorm per head

    With `conv_width`, the NeurIPS block, whose published sizes `MLSTMConfig.original()` gives: u, z = W_u x, W_z x;
    c = SiLU(conv(u)); q, k = W_q c, W_k c and v = W_v u in blocks of `block_size` channels; gates from [q, k, v];
    out = W_out((h + skip * c) * SiLU(z)). The former is the default as the later and simpler one: it trains three times
    as fast, for 1 to 4 % of perplexity at equal size (2503.13427).

    Values, and c, have `expansion` times the model's width, in `heads`; `key_size` None is half a head of values (with
    a convolution the whole, and nothing else is possible). At initialisation gates do not see their input: W_i, W_f
    are 0, b_i is drawn with mean and deviation `input_bias`, b_f linear in `forget_bias` over the heads. The output
    starts with deviation 2 / (depth sqrt(width)), other maps with variance 2 / (5 width). `chunk`: tokens per chunk of
    the scan, None for the operator's own choice.
    """

    heads: int = 4
    expansion: float = 1.0
    key_size: int | None = None
    conv_width: int | None = None
    block_size: int = 4
    gate_cap: float | None = 15.0
    input_bias: tuple[float, float] = (-10.0, 0.0)
    forget_bias: tuple[float, float] = (3.0, 6.0)
    norm_eps: float = 1e-6
    method: str = "auto"
    chunk: int | None = None

    @classmethod
    def original(cls, **changes: Any) -> MLSTMConfig:
        """The block of the NeurIPS paper, with its sizes and initial values."""
        published: dict[str, Any] = {"expansion": 2.0, "conv_width": 4, "gate_cap": None, "norm_eps": 1e-5}
        return cls(**(published | {"input_bias": (0.0, 0.1)} | changes))

    def __post_init__(self):
        check_method(self.method, self.chunk)
        for field in ("heads", "key_size", "conv_width", "block_size"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        for field in ("expansion", "gate_cap", "norm_eps"):
            if getattr(self, field) is not None and getattr(self, field) <= 0:
                raise ValueError(f"{field} must be positive, not {getattr(self, field)}")
        if self.conv_width is not None and self.key_size is not None:
            raise ValueError(
                f"key_size={self.key_size}: with conv_width={self.conv_width} keys come from square blocks and are as "
                "large as values; leave key_size at None"
            )

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> MLSTM:
        return MLSTM(self, width, depth=depth, rngs=rngs)


class MLSTMState(NamedTuple):
    """`conv` is None in a block without a convolution."""

    cell: ExponentialState
    conv: Float[Array, "B W D"] | None


def small(size: int) -> Initializer:
    """Deviation sqrt(2 / (5 size)), the papers' choice for maps from `size` channels."""
    return jax.nn.initializers.normal((2 / (5 * size)) ** 0.5)


class MLSTM(nnx.Module):
    """See `MLSTMConfig`. Gates and the state are at least float32, whatever the type of x."""

    recurrent_memory = Memory(("cell.memory",), heads=True, companions={"cell.normaliser": 0, "cell.log_max": 0})

    def __init__(self, config: MLSTMConfig, width: int, *, depth: int, rngs: nnx.Rngs):
        inner, heads = round(config.expansion * width), config.heads
        if inner % heads:
            raise ValueError(f"the inner width {inner} does not divide into heads={heads}; choose a divisor")
        self.config, self.inner, self.value_size = config, inner, inner // heads
        convolved = config.conv_width is not None
        self.key_size = config.key_size or (self.value_size if convolved else max(1, self.value_size // 2))

        project = functools.partial(Linear, width, rngs=rngs, axes=("embed", "recurrent"), init=small(width))
        self.gate = project(inner)  # W_o or W_z
        maps: list[Any]
        if config.conv_width is None:
            self.up = self.conv = self.skip = None
            maps = [project(size) for size in (heads * self.key_size, heads * self.key_size, inner)]
        elif inner % config.block_size:
            raise ValueError(f"the inner width {inner} does not divide into blocks of {config.block_size} channels")
        else:
            self.up = project(inner)
            # Variance 1/3 over the width is that of the published code, uniform in +-1/sqrt(width).
            self.conv = ShortConv(inner, config.conv_width, rngs=rngs, variance=1 / 3)
            ones = jax.nn.initializers.ones
            self.skip = param(rngs, (inner,), ones, group=Group.DYNAMICS, axes=("recurrent",))
            blocks = functools.partial(BlockDiagonalLinear, inner, inner // config.block_size, rngs=rngs, bias=False)
            maps = [blocks(init=small(width)) for _ in range(3)]
        self.query, self.key, self.value = maps

        seen, zeros = (3 * inner if convolved else width), jax.nn.initializers.zeros
        axes = ("recurrent" if convolved else "embed", "heads")
        self.gates = Linear(seen, 2 * heads, rngs=rngs, axes=axes, init=zeros)

        def init_input(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            mean, deviation = config.input_bias
            return mean + deviation * jax.random.normal(key, shape, dtype)

        def init_forget(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return jnp.linspace(*config.forget_bias, shape[0], dtype=dtype)

        per_head = functools.partial(param, rngs, (heads,), group=Group.DYNAMICS, axes=("heads",))
        self.input_bias, self.forget_bias = per_head(init_input), per_head(init_forget)
        self.norm = LayerNorm(inner, rngs=rngs, eps=config.norm_eps, groups=heads, bias=False, axis="recurrent")
        init = jax.nn.initializers.normal(2 / (depth * width**0.5))
        self.out = Linear(inner, width, rngs=rngs, axes=("recurrent", "embed"), init=init)

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> MLSTMState:
        """Nothing written: maxima are -inf. `capacity` does not matter, the state never grows."""
        cell = empty_state((batch, self.config.heads), self.key_size, self.value_size, dtype)
        return MLSTMState(cell, None if self.conv is None else self.conv.init_state(batch, dtype))

    def __call__(
        self, x: Float[Array, "B T D"], state: MLSTMState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], MLSTMState]:
        config, segments = self.config, context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.cell.log_max.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.cell.log_max.shape[0]} rows cannot continue x of shape {x.shape}")

        x = jnp.where(segments.valid[..., None], x, 0)
        source = convolved = x
        conv = None
        if self.conv is not None and self.up is not None:
            source = self.up(x)
            convolved, conv = self.conv(source, state.conv, context)
            convolved = jax.nn.silu(convolved)
        query, key, value = self.query(convolved), self.key(convolved), self.value(source)
        gates = self._gates(x if self.conv is None else jnp.concatenate([query, key, value], axis=-1))
        heads = lambda a: a.reshape(*x.shape[:2], config.heads, -1)
        h, cell = mlstm_scan(
            heads(query * self.key_size**-0.5),
            heads(key),
            heads(value),
            *gates,
            state.cell,
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        h = self.norm(h.reshape(*x.shape[:2], self.inner))
        if self.skip is None:
            y = self.out(h * jax.nn.sigmoid(self.gate(x)))
        else:
            y = self.out((h + along_last(self.skip[...], h) * convolved) * jax.nn.silu(self.gate(x)))
        return jnp.where(segments.valid[..., None], y, 0), MLSTMState(cell, conv)

    def _gates(self, source: Float[Array, "B T D"]) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
        """`(log i, log f)`, at least float32: an error in a log is a relative one in the gate."""
        raw = self.gates(source.astype(jnp.promote_types(source.dtype, jnp.float32)))
        log_input, forget = jnp.split(raw, 2, axis=-1)
        log_input += along_last(self.input_bias[...], raw)
        forget += along_last(self.forget_bias[...], raw)
        if self.config.gate_cap is not None:
            cap = self.config.gate_cap
            log_input, forget = (cap * jnp.tanh(a / cap) for a in (log_input, forget))
        return log_input, jax.nn.log_sigmoid(forget)
