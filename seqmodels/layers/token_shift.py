"""Token shift: the previous token of the same document, and mixtures of it with the current one (RWKV)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels.layers.linear import along_last
from seqmodels.layers.short_conv import with_history
from seqmodels.typing import Context, Initializer


def token_shift(
    x: Float[Array, "B T D"], state: Float[Array, "B D"], context: Context
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """`(x_{t-1}, state)`: each token's predecessor, zeros at the start of a document and at padding.

    The state is the last token of each row's last document, zeros where there is none, in at least float32. Raises
    ValueError where it is not `[B, D]`.
    """
    if state.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"a state of shape {state.shape} cannot continue inputs of shape {x.shape}")
    segments = context.segments
    row, document, last = with_history(x, state[:, None], context)
    seen = segments.valid & (document[:, :-1] == segments.ids)
    return jnp.where(seen[..., None], row[:, :-1], 0).astype(x.dtype), last[:, 0]


def no_token(batch: int, width: int, dtype: Any = jnp.float32) -> Float[Array, "B D"]:
    """What a document starts from, in at least float32."""
    return jnp.zeros((batch, width), jnp.promote_types(dtype, jnp.float32))


def lerp(
    current: Float[Array, "B T D"], previous: Float[Array, "B T D"], share: Float[Array, "D"]
) -> Float[Array, "B T D"]:
    """share * current + (1 - share) * previous, rounded to their type once."""
    wide = jnp.promote_types(current.dtype, jnp.float32)
    back = previous.astype(wide)
    return (back + (current.astype(wide) - back) * along_last(share, back)).astype(current.dtype)


def shares(layer: int, depth: int, power: float = 1.0, offset: float = 0.0) -> Initializer:
    """How much of the current token layer `layer` of `depth` starts with, channel n of C: (n / C)^(power (1 - l / L)).

    Early layers look back in most of their channels, the last ones in few (2305.13048, appendix). `offset` is added.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        channel = jnp.arange(shape[-1], dtype=dtype) / shape[-1]
        return jnp.broadcast_to(channel ** (power * (1 - layer / depth)) + offset, shape)

    return init
