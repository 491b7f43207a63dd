"""sLSTM: scalar memories with exponential gates that mix within a head (xLSTM, arXiv 2405.04517)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels import compat
from seqmodels.layers.norms import LayerNorm
from seqmodels.layers.short_conv import ShortConv
from seqmodels.operators.exponential import larger
from seqmodels.operators.nonlinear import check_cell_method, nonlinear_scan, refuse_sharded_time
from seqmodels.params import Group, param
from seqmodels.scan import Newton, NewtonReport, Recurrence, scan
from seqmodels.typing import Context, Memory, MixerConfig, Segments

GATES = 4  # input, forget, cell, output


@dataclasses.dataclass(frozen=True)
class SLSTMConfig(MixerConfig):
    """u = SiLU(conv(x));  per head, with a_t = W_a (u for i and f, x for z and o) + R_a y_{t-1} + b_a:

        c_t = f c_{t-1} + i tanh(z_t),  n_t = f n_{t-1} + i,  y_t = sigmoid(o_t) c_t / n_t
        i = exp(i_t),  f = sigmoid(f_t),  both under m_t = max(log f + m_{t-1}, i_t), from m = -inf
        out = norm(y), a LayerNorm per head

    W and R are block-diagonal, one block a head: memories mix inside a head (R_a y_{t-1}) and not across heads. There
    is no output projection; in the paper's block a gated MLP of factor 4/3 follows. At initialisation R is 0, or
    uniform in +-`recurrent_range` / sqrt(width) (1 is the published code's other choice, `standard`); b_f of channel j
    of a head's d is 5 - 12 (j / (d - 1))^(0.3 + 1.3 layer / (depth - 1)), other biases are 0.

    `method`: `sequential`, or `newton` (all tokens at once, in O(T (3 D / heads)^2) memory a head), which `newton`
    sets up; `run` returns its report of iterations. The state enters its own update through tanh and the gates: time
    cannot be sharded.
    """

    heads: int = 4
    conv_width: int = 4
    recurrent_range: float = 0.0
    norm_eps: float = 1e-5
    method: str = "sequential"
    newton: Newton = dataclasses.field(default_factory=Newton)

    def __post_init__(self):
        check_cell_method(self.method)
        for field in ("heads", "conv_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be positive, not {self.norm_eps}")
        if self.recurrent_range < 0:
            raise ValueError(f"recurrent_range must be 0 or more, not {self.recurrent_range}")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> SLSTM:
        return SLSTM(self, width, layer=layer, depth=depth, rngs=rngs)


class Cell(NamedTuple):
    """What a token leaves to the next one; true memories are exp(log_max) times `cell` and `normaliser`."""

    output: Float[Array, "*B V"]
    cell: Float[Array, "*B V"]
    normaliser: Float[Array, "*B V"]
    log_max: Float[Array, "*B V"]


class Mean(NamedTuple):
    """A cell without its maximum, as Newton's method solves for it: y, c / n and log n + m, every step of which is
    smooth and has a derivative of at most 1 but for R's part. An empty cell's log is -inf."""

    output: Float[Array, "*B V"]
    mean: Float[Array, "*B V"]
    log_weight: Float[Array, "*B V"]


class SLSTMState(NamedTuple):
    conv: Float[Array, "B W D"]
    cell: Cell


class SLSTM(nnx.Module):
    """See `SLSTMConfig`. Gates, R y and the state are at least float32."""

    recurrent_memory = Memory(
        ("cell.output", "cell.cell"), heads=True, companions={"cell.normaliser": 1, "cell.log_max": 0}
    )

    def __init__(self, config: SLSTMConfig, width: int, *, layer: int, depth: int, rngs: nnx.Rngs):
        if width % config.heads:
            raise ValueError(f"width {width} does not divide into heads={config.heads}; choose a divisor")
        self.config = config
        self.size = size = width // config.heads
        # Variance 1/3 over the width is that of the published code, uniform in +-1/sqrt(width).
        self.conv = ShortConv(width, config.conv_width, rngs=rngs, variance=1 / 3)
        axes = ("heads", None, None, None)
        shape = (config.heads, size, GATES, size)
        init = jax.nn.initializers.normal((2 / (5 * width)) ** 0.5)  # by the model's width, as published
        self.kernel = param(rngs, shape, init, group=Group.MATRIX, axes=axes)

        def init_recurrent(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return config.recurrent_range / width**0.5 * jax.random.uniform(key, shape, dtype, -1)

        self.recurrent = param(rngs, shape, init_recurrent, group=Group.MATRIX, axes=axes)

        def init_bias(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            exponent = 0.3 + 1.3 * layer / max(depth - 1, 1)
            forget = 5 - 12 * (jnp.arange(size, dtype=dtype) / max(size - 1, 1)) ** exponent
            return jnp.zeros(shape, dtype).at[:, 1].set(forget)

        self.bias = param(rngs, (config.heads, GATES, size), init_bias, group=Group.DYNAMICS, axes=axes[:1] + axes[2:])
        self.norm = LayerNorm(width, rngs=rngs, eps=config.norm_eps, groups=config.heads, bias=False, axis="embed")

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> SLSTMState:
        """Zeros under a maximum of -inf; `capacity` does not matter, the state never grows."""
        zeros = jnp.zeros((batch, self.config.heads, self.size), jnp.promote_types(dtype, jnp.float32))
        return SLSTMState(self.conv.init_state(batch, dtype), Cell(zeros, zeros, zeros, jnp.full_like(zeros, -jnp.inf)))

    def __call__(
        self, x: Float[Array, "B T D"], state: SLSTMState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], SLSTMState]:
        return self.run(x, state, context)[:2]

    def run(
        self, x: Float[Array, "B T D"], state: SLSTMState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], SLSTMState, NewtonReport | None]:
        """As a call, with Newton's report of every row and head [B, H], None from the loop over tokens."""
        segments = context.segments
        refuse_sharded_time("an sLSTM", context.sequence_axis, "an mLSTM")
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.conv.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.conv.shape[0]} rows cannot continue x of shape {x.shape}")

        x = jnp.where(segments.valid[..., None], x, 0)
        convolved, conv = self.conv(x, state.conv, context)
        heads = lambda a: a.reshape(*a.shape[:2], self.config.heads, self.size)
        kernel = self.kernel[...].astype(x.dtype)
        sources = ((heads(jax.nn.silu(convolved)), kernel[:, :, :2]), (heads(x), kernel[:, :, 2:]))
        parts = [compat.wide_einsum("bthi,higj->bthgj", source, part) for source, part in sources]
        driven = jnp.concatenate(parts, axis=3)
        driven += self.bias[...].astype(driven.dtype)[None, None]

        solve = _newton if self.config.method == "newton" else _sequential
        y, cell, report = solve(self.recurrent[...].astype(driven.dtype), driven, state.cell, segments, self.config)
        y = self.norm(y.reshape(x.shape)).astype(x.dtype)
        return jnp.where(segments.valid[..., None], y, 0), SLSTMState(conv, cell), report


def _sequential(
    recurrent: Array, driven: Float[Array, "B T H A V"], cell: Cell, segments: Segments, config: SLSTMConfig
) -> tuple[Float[Array, "B T H V"], Cell, None]:
    zeros = jnp.zeros_like(driven[0, 0, 0, 0])
    empty = Cell(zeros, zeros, zeros, jnp.full_like(zeros, -jnp.inf))
    read = lambda cell: cell.output
    y, cell, _ = nonlinear_scan(_step, recurrent, driven, cell, initial=empty, segments=segments, read=read)
    return y, cell, None


def _newton(
    recurrent: Array, driven: Float[Array, "B T H A V"], cell: Cell, segments: Segments, config: SLSTMConfig
) -> tuple[Float[Array, "B T H V"], Cell, NewtonReport]:
    """The outputs by Newton's method; their gates then give the maximum that the last cell is kept under."""
    empty = cell.normaliser == 0
    log_weight = jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, cell.normaliser)) + cell.log_max)
    before = Mean(cell.output, jnp.where(empty, 0, cell.cell / jnp.where(empty, 1, cell.normaliser)), log_weight)
    zeros = jnp.zeros_like(driven[0, 0, 0, 0])
    y, after, report = nonlinear_scan(
        _mean_step,
        recurrent,
        driven,
        before,
        initial=Mean(zeros, zeros, jnp.full_like(zeros, -jnp.inf)),
        segments=segments,
        read=lambda mean: mean.output,
        method="newton",
        newton=config.newton,
    )
    assert report is not None
    last = jnp.concatenate([cell.output[:, None].astype(y.dtype), y[:, :-1]], axis=1)
    last = jnp.where(segments.start[..., None, None], 0, last)
    gates = driven[:, :, :, :2] + jnp.einsum("bthi,higj->bthgj", last, recurrent[:, :, :2])
    row = lambda log, state, start, valid: scan(_maximum(), log, state, reset=start, valid=valid, method="associative")
    logs = (jax.nn.log_sigmoid(gates[:, :, :, 1]), gates[:, :, :, 0])
    _, log_max = jax.vmap(row)(logs, cell.log_max, *segments)
    # Where no token has come, both logs are -inf.
    normaliser = jnp.exp(after.log_weight - jnp.where(log_max == -jnp.inf, 0, log_max))
    return y, Cell(after.output, after.mean * normaliser, normaliser, log_max), report


def _step(recurrent: Float[Array, "V A V"], driven: Float[Array, "A V"], before: Cell) -> Cell:
    """The normaliser is at least 1 after a step: whichever of i and f sets the maximum has weight 1."""
    log_input, forget, z, o = driven + jnp.einsum("i,igj->gj", before.output, recurrent)
    kept = jax.nn.log_sigmoid(forget) + before.log_max
    log_max = larger(kept, log_input)
    old, new = jnp.exp(kept - log_max), jnp.exp(log_input - log_max)
    cell = old * before.cell + new * jnp.tanh(z)
    normaliser = old * before.normaliser + new
    return Cell(jax.nn.sigmoid(o) * cell / normaliser, cell, normaliser, log_max)


def _mean_step(recurrent: Float[Array, "V A V"], driven: Float[Array, "A V"], before: Mean) -> Mean:
    """`_step` in other coordinates: the new value joins a mean with weight i / (f n + i)."""
    log_input, forget, z, o = driven + jnp.einsum("i,igj->gj", before.output, recurrent)
    kept = jax.nn.log_sigmoid(forget) + before.log_weight
    mean = jax.nn.sigmoid(kept - log_input) * before.mean + jax.nn.sigmoid(log_input - kept) * jnp.tanh(z)
    return Mean(jax.nn.sigmoid(o) * mean, mean, jnp.logaddexp(kept, log_input))


def _maximum() -> Recurrence:
    """m_t = max(log f_t + m_{t-1}, i_t), from -inf."""
    return Recurrence(
        elements=lambda logs: logs,
        combine=lambda a, b: (a[0] + b[0], larger(a[1] + b[0], b[1])),
        identity=lambda e: (jnp.zeros_like(e[0]), jnp.full_like(e[1], -jnp.inf)),
        act=lambda e, m: larger(e[0] + m, e[1]),
        initial=lambda logs: jnp.full_like(logs[1], -jnp.inf),
    )
