"""What LSTM and GRU share: a projection of the tokens to gates, which a product with the last output is added to."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels import compat
from seqmodels.operators.nonlinear import check_cell_method, nonlinear_scan, refuse_sharded_time
from seqmodels.params import Group, param
from seqmodels.scan import Newton, NewtonReport
from seqmodels.typing import Context, MixerConfig


@dataclasses.dataclass(frozen=True)
class RecurrentConfig(MixerConfig):
    """`heads`: blocks of the recurrent matrices; 1 mixes all channels, as published, more mix within a head only.

    `method`: `sequential`, or `newton` (all tokens at once, for a state of N numbers a head in O(T N^2) memory), which
    `newton` sets up; `run` returns its report of iterations. Time cannot be sharded.
    """

    heads: int = 1
    method: str = "sequential"
    newton: Newton = dataclasses.field(default_factory=Newton)

    def __post_init__(self):
        check_cell_method(self.method)
        if self.heads < 1:
            raise ValueError(f"heads must be at least 1, not {self.heads}")


class RecurrentCell(nnx.Module):
    """The parameters W, R, b of `gates` gates and the loop over tokens; a cell defines `step`, `read`, `init_state`.

    W starts with variance 1 / width, every gate's block of R orthogonal. Gates, R h and states are at least float32.
    """

    def __init__(self, config: RecurrentConfig, width: int, gates: int, *, rngs: nnx.Rngs):
        if width % config.heads:
            raise ValueError(f"width {width} does not divide into heads={config.heads}; choose a divisor")
        self.config = config
        self.size = size = width // config.heads
        init = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        shape = (width, config.heads, gates, size)
        self.kernel = param(rngs, shape, init, group=Group.MATRIX, axes=("embed", "heads", None, None))

        def orthogonal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return jnp.swapaxes(jax.random.orthogonal(key, size, (config.heads, gates), dtype), 1, 2)

        shape = (config.heads, size, gates, size)
        self.recurrent = param(rngs, shape, orthogonal, group=Group.MATRIX, axes=("heads", None, None, None))

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> Any:
        raise TypeError(f"{type(self).__name__} is a RecurrentCell without an init_state")

    def parameters(self) -> Any:
        """What `step` gets of every head: arrays [H, ...]."""
        raise TypeError(f"{type(self).__name__} is a RecurrentCell without parameters")

    @staticmethod
    def step(parameters: Any, driven: Float[Array, "A V"], state: Any) -> Any:
        """One head's next state from W x and the last one."""
        raise TypeError("a RecurrentCell needs a step")

    def __call__(
        self, x: Float[Array, "B T D"], state: Any | None, context: Context
    ) -> tuple[Float[Array, "B T D"], Any]:
        return self.run(x, state, context)[:2]

    def run(
        self, x: Float[Array, "B T D"], state: Any | None, context: Context
    ) -> tuple[Float[Array, "B T D"], Any, NewtonReport | None]:
        """As a call, with Newton's report of every row and head [B, H], None from the loop over tokens."""
        segments, name = context.segments, type(self).__name__
        refuse_sharded_time(name, context.sequence_axis, "minLSTM or minGRU, whose gates see the tokens alone")
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.hidden.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.hidden.shape[0]} rows cannot continue x of shape {x.shape}")

        x = jnp.where(segments.valid[..., None], x, 0)
        driven = compat.wide_einsum("btd,dhgj->bthgj", x, self.kernel[...].astype(x.dtype))
        initial = jax.tree.map(lambda a: a[0, 0], self.init_state(1, dtype=driven.dtype))
        y, state, report = nonlinear_scan(
            self.step,
            self.parameters(),
            driven,
            state,
            initial=initial,
            segments=segments,
            read=lambda state: state.hidden,
            method=self.config.method,
            newton=self.config.newton,
        )
        y = y.reshape(x.shape).astype(x.dtype)
        return jnp.where(segments.valid[..., None], y, 0), state, report
