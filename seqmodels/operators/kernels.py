"""From a family's call to its kernel in `kernels_pallas`, or to an error that says why none serves it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.outer import CHUNK, chunk_outer
from seqmodels.typing import Segments

INTERPRET: Any = False  # how `pallas_call` runs where there is no device; for tests


def platform() -> str:
    """What a program is made for: the abstract mesh's device where one is set, else jax's default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def refuse(family: str, reason: str) -> None:
    raise ValueError(f"method='pallas' for the {family} family: {reason}; use 'auto', which takes the XLA form")


def outer(
    query: Float[Array, "B T G K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H *K"] | None,
    state: Float[Array, "B H K V"] | None,
    *,
    segments: Segments | None,
    chunk: int | None,
    bonus: Any,
    sequence_axis: str | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`gated_linear_attention` by `chunk_outer`. Raises ValueError where that cannot serve, and why."""
    kinds = {x.dtype for x in (query, key, value)}
    reasons = {
        "the kernel is for TPUs, and this is made for " + platform(): platform() != "tpu" and not INTERPRET,
        "the kernel has a decay per head, none per key": log_decay is not None and log_decay.ndim == 4,
        "the kernel has no bonus": bonus is not None,
        "the kernel does not shard time": sequence_axis is not None,
        f"query, key and value are of one type, bfloat16 or float32, not {', '.join(map(str, kinds))}": len(kinds) > 1
        or kinds - {jnp.dtype("bfloat16"), jnp.dtype("float32")},
        f"chunks are a multiple of {CHUNK} steps, not {chunk}": chunk is not None and chunk % CHUNK,
    }
    for reason, holds in reasons.items():
        if holds:
            refuse("outer", reason)
    batch, length, heads, size = value.shape
    if log_decay is None:
        log_decay = jnp.zeros((batch, length, heads), jnp.float32)
    if state is None:
        state = jnp.zeros((batch, heads, key.shape[-1], size), jnp.float32)
    segment = jnp.zeros((batch, length), jnp.int32)
    if segments is not None:
        segment = jnp.cumsum(segments.start, axis=1, dtype=jnp.int32)
        empty = lambda x: jnp.where(jnp.expand_dims(segments.valid, range(2, x.ndim)), x, 0)
        query, key, value, log_decay = (empty(x) for x in (query, key, value, log_decay))
    by_head = lambda x: jnp.swapaxes(x, 1, 2)
    arrays = (by_head(x) for x in (query, key, value, log_decay.astype(jnp.float32)))
    out, state = chunk_outer(*arrays, state.astype(jnp.float32), segment, chunk or CHUNK, False, INTERPRET)
    out = by_head(out)
    return (out if segments is None else empty(out)), state
