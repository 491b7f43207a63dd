"""What minGRU, minLSTM and the gated RNN share: an element-wise linear recurrence between two projections."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.linear import Linear
from seqmodels.operators.diagonal import diagonal_scan
from seqmodels.operators.family import check_method
from seqmodels.typing import Context, Memory, MixerConfig


@dataclasses.dataclass(frozen=True)
class ElementwiseConfig(MixerConfig):
    """`expansion`: channels of the recurrence, relative to the width; `method` and `chunk` as in `diagonal_scan`."""

    expansion: float = 1.0
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk)
        if self.expansion <= 0:
            raise ValueError(f"expansion must be positive, not {self.expansion}")


class ElementwiseState(NamedTuple):
    hidden: Float[Array, "B D"]


class ElementwiseCell(nnx.Module):
    """out(read(h, x)) of h_t = exp(log_decay_t) h_{t-1} + drive_t, both of them functions of x_t alone.

    A cell defines `recurrence`, and `read` where the output is not h itself; gates and h are at least float32.
    """

    recurrent_memory = Memory(("hidden",))

    def __init__(self, config: ElementwiseConfig, width: int, *, rngs: nnx.Rngs):
        size = config.expansion * width
        if size < 1 or size != round(size):
            raise ValueError(f"expansion={config.expansion} times the width {width} is no whole number of channels")
        self.config = config
        self.size = round(size)
        self.out = Linear(self.size, width, rngs=rngs, axes=("recurrent", "embed"))

    def recurrence(self, x: Float[Array, "B T I"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """`(log_decay <= 0, drive)` of every step."""
        raise TypeError(f"{type(self).__name__} is an ElementwiseCell without a recurrence")

    def read(self, hidden: Float[Array, "B T D"], x: Float[Array, "B T I"]) -> Float[Array, "B T D"]:
        del x
        return hidden

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> ElementwiseState:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        return ElementwiseState(jnp.zeros((batch, self.size), jnp.promote_types(dtype, jnp.float32)))

    def __call__(
        self, x: Float[Array, "B T I"], state: ElementwiseState | None, context: Context
    ) -> tuple[Float[Array, "B T I"], ElementwiseState]:
        valid = context.segments.valid[..., None]
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.hidden.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.hidden.shape[0]} rows cannot continue x of shape {x.shape}")

        x = jnp.where(valid, x, 0)
        hidden, last = diagonal_scan(
            *self.recurrence(x),
            state.hidden,
            segments=context.segments,
            method=self.config.method,
            chunk=self.config.chunk,
            sequence_axis=context.sequence_axis,
        )
        y = self.out(self.read(hidden, x).astype(x.dtype))
        return jnp.where(valid, y, 0), ElementwiseState(last)


def wide(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`x` in at least float32, as gates need it."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def positive(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """g(x) = x + 1/2 for x >= 0, sigmoid(x) below: continuous, increasing and positive (2410.01201, appendix)."""
    return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x))
