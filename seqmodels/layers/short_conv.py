"""Short causal depthwise convolution, with its last inputs as the state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from seqmodels.layers.linear import along_last
from seqmodels.params import Group, param
from seqmodels.scan import Recurrence, sharded_carry
from seqmodels.typing import Context, Initializer, Segments


class ShortConv(nnx.Module):
    """y_t = b + sum_j w_j x_{t-j}, j < width, per channel, over tokens of the same document only.

    The state `[B, width - 1, D]` holds the last inputs of the carried document, oldest first, zeros where there were
    none; it is gathered at the last valid token of each row, and is at least float32. Taps start with variance
    `variance / width` (Griffin: 0.01), the bias at zero. Padding yields zero.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        bias: bool = True,
        variance: float = 0.01,
        init: Initializer | None = None,
        axis: str | None = "recurrent",
    ):
        if width < 1:
            raise ValueError(f"a short convolution needs a width of at least 1, not {width}")
        init = init or jax.nn.initializers.normal((variance / width) ** 0.5)
        self.channels = channels
        self.width = width
        # Row width - 1 - j holds the tap w_j.
        self.kernel = param(rngs, (width, channels), init, group=Group.MATRIX, axes=(None, axis))
        zeros = jax.nn.initializers.zeros
        self.bias = param(rngs, (channels,), zeros, group=Group.BIAS, axes=(axis,)) if bias else None

    def init_state(self, batch: int, dtype: Any = jnp.float32) -> Float[Array, "B W D"]:
        return jnp.zeros((batch, self.width - 1, self.channels), jnp.promote_types(dtype, jnp.float32))

    def __call__(
        self, x: Float[Array, "B T D"], state: Float[Array, "B W D"] | None, context: Context
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B W D"]]:
        segments = context.segments
        batch, length, _ = x.shape
        state = self.init_state(batch, x.dtype) if state is None else state
        if state.shape != (batch, self.width - 1, self.channels):
            raise ValueError(f"a state of shape {state.shape} cannot continue inputs of shape {x.shape}")
        # Accumulated in the state's type: the sum is fused, and a split call then gives what a single one gives.
        row, document, last = with_history(x, state, context)

        y = jnp.zeros(x.shape, row.dtype)
        for index in range(self.width):
            same = document[:, index : index + length] == segments.ids
            tap = along_last(self.kernel[...][index], row)
            y += tap * jnp.where(same[..., None], row[:, index : index + length], 0)
        if self.bias is not None:
            y += along_last(self.bias[...], y)
        return jnp.where(segments.valid[..., None], y, 0).astype(x.dtype), last


def with_history(
    x: Float[Array, "B T D"], state: Float[Array, "B W D"], context: Context
) -> tuple[Float[Array, "B W+T D"], Int[Array, "B W+T"], Float[Array, "B W D"]]:
    """`(row, document, state)`: the last W inputs and those of this call as one row in time, and what to carry on.

    `row` has zeros for padding; `document` is the number of the document at each of its places, 0 for what was carried
    in. Under `context.sequence_axis` the row begins with the inputs just before this device's span, and the state
    returned, the same on every device, holds those at the end of the last one's.
    """
    segments = context.segments
    wide = jnp.promote_types(x.dtype, state.dtype)
    x, state = x.astype(wide), state.astype(wide)
    if context.sequence_axis is None:
        row, document = _row(x, state, segments)
        return row, document, _last_inputs(row, document, segments)
    state, last = _exchange(x, state, segments, context.sequence_axis)
    return (*_row(x, state, segments), last)


def _row(x: Array, state: Array, segments: Segments) -> tuple[Array, Array]:
    row = jnp.concatenate([state, jnp.where(segments.valid[..., None], x, 0)], axis=1)
    return row, jnp.pad(segments.ids, [(0, 0), (state.shape[1], 0)])


def _exchange(x: Array, state: Array, segments: Segments, axis: str) -> tuple[Array, Array]:
    """The inputs just before this device's span, and those at the end of the last device's."""
    row, document = _row(x, jnp.zeros_like(state), segments)
    own = segments.valid & (segments.ids == segments.ids[:, -1:])
    element = (_last_inputs(row, document, segments), jnp.sum(own, axis=1, dtype=jnp.int32))
    span = (jnp.any(segments.start, axis=1), element)
    return jax.vmap(lambda span, state: sharded_carry(REGISTER, span, span[1], state, axis))(span, state)


def _shift(element: tuple[Array, Array], state: Array) -> Array:
    """A shift register `[W, D]` after `count` more inputs, whose last W stand at the end of `latest`."""
    latest, count = element
    slots = state.shape[0]
    index = jnp.arange(slots) + count
    moved = jnp.take(state, index, axis=0, mode="clip")
    return jnp.where((index < slots)[:, None], moved, latest)


REGISTER = Recurrence(
    elements=lambda element: element,
    combine=lambda earlier, later: (_shift(later, earlier[0]), earlier[1] + later[1]),
    identity=lambda element: jax.tree.map(jnp.zeros_like, element),
    act=_shift,
)


def _last_inputs(row: Array, document: Array, segments: Segments) -> Array:
    """The inputs up to each row's last valid token, zero where they are not of the row's last document."""
    length = segments.valid.shape[1]
    tokens = jnp.where(segments.valid, jnp.arange(1, length + 1)[None, :], 0)
    index = jnp.max(tokens, axis=1, keepdims=True) + jnp.arange(row.shape[1] - length)[None, :]
    last = jnp.take_along_axis(row, index[..., None], axis=1)
    same = jnp.take_along_axis(document, index, axis=1) == document[:, -1:]
    return jnp.where(same[..., None], last, 0)
