"""From a family's call to its kernel in `kernels_pallas`, or to an error that says why none serves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from kernels_pallas.chunks import CHUNK
from kernels_pallas.linear import linear_scan
from kernels_pallas.outer import chunk_outer
from kernels_pallas.outer_keys import chunk_outer_keys
from kernels_pallas.selective import selective_scan
from seqmodels.operators.family import check_method
from seqmodels.typing import Segments

INTERPRET: Any = False  # how `pallas_call` runs where there is no device; for tests


def platform() -> str:
    """What a program is made for: the abstract mesh's device where one is set, else jax's default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def _serve(family: str, reasons: Mapping[str, Any], chunk: int | None, sequence_axis: str | None) -> None:
    """Raises ValueError with the first of the reasons that holds, those of every kernel among them."""
    check_method("pallas", chunk)
    common = {
        f"the kernel is for TPUs, and this is made for {platform()}": platform() != "tpu" and not INTERPRET,
        "the kernel does not shard time": sequence_axis is not None,
        f"chunks are a multiple of {CHUNK} steps, not {chunk}": chunk is not None and chunk % CHUNK,
    }
    for reason, holds in {**common, **reasons}.items():
        if holds:
            raise ValueError(f"method='pallas' for the {family} family: {reason}; use 'auto', which takes the XLA form")


def _empty(x: Array, segments: Segments | None) -> Array:
    """Zeros on padding."""
    return x if segments is None else jnp.where(jnp.expand_dims(segments.valid, range(2, x.ndim)), x, 0)


def _documents(segments: Segments | None, shape: tuple[int, ...]) -> Array:
    """[B, T]: 0 as long as the state goes on, one more with every start."""
    return jnp.zeros(shape, jnp.int32) if segments is None else jnp.cumsum(segments.start, axis=1, dtype=jnp.int32)


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
    """`gated_linear_attention` by `chunk_outer`, or `chunk_outer_keys` where each key decays in its own way.

    Raises ValueError where they cannot serve, and why.
    """
    kinds = {x.dtype for x in (query, key, value)}
    known = {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    told = ", ".join(sorted(map(str, kinds)))
    reasons = {
        "the kernel has no bonus": bonus is not None,
        f"query, key and value are of one type, bfloat16 or float32, not {told}": len(kinds) > 1 or kinds - known,
    }
    _serve("outer", reasons, chunk=chunk, sequence_axis=sequence_axis)
    batch, length, heads, size = value.shape
    if log_decay is None:
        log_decay = jnp.zeros((batch, length, heads), jnp.float32)
    if state is None:
        state = jnp.zeros((batch, heads, key.shape[-1], size), jnp.float32)
    arrays = (query, key, value, log_decay.astype(jnp.float32))
    q, k, v, g = (jnp.swapaxes(_empty(x, segments), 1, 2) for x in arrays)
    documents = _documents(segments, (batch, length))
    run = chunk_outer_keys if log_decay.ndim == 4 else chunk_outer
    out, state = run(q, k, v, g, state.astype(jnp.float32), documents, chunk or CHUNK, False, INTERPRET)
    return _empty(jnp.swapaxes(out, 1, 2), segments), state


def diagonal(
    log_decay: Inexact[Array, "B T D"],
    drive: Inexact[Array, "B T D"],
    state: Inexact[Array, "B D"] | None,
    *,
    segments: Segments | None,
    chunk: int | None,
    sequence_axis: str | None,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    """`diagonal_scan` by `linear_scan`. Raises ValueError where that cannot serve, and why."""
    kind = jnp.result_type(log_decay, drive, jnp.float32)
    reasons = {f"numbers are float32 or complex64 at most, not {kind}": kind not in (jnp.float32, jnp.complex64)}
    _serve("diagonal", reasons, chunk=chunk, sequence_axis=sequence_axis)
    if state is None:
        state = jnp.zeros((drive.shape[0], drive.shape[2]), kind)
    arrays = (_empty(x.astype(kind), segments) for x in (log_decay, drive))
    documents = _documents(segments, drive.shape[:2])
    out, state = linear_scan(*arrays, state.astype(kind), documents, chunk or CHUNK, INTERPRET)
    return _empty(out, segments), state


def selective(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    a: Float[Array, "D N"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    state: Float[Array, "B D N"] | None,
    *,
    segments: Segments | None,
    chunk: int | None,
    sequence_axis: str | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """The selective scan, without its skip, by the kernel. Raises ValueError where that cannot serve, and why."""
    kinds = {y.dtype for y in (x, dt, b, c)}
    told = ", ".join(sorted(map(str, kinds)))
    reasons = {
        f"x, dt, b and c are bfloat16 or float32, not {told}": kinds - {jnp.dtype("bfloat16"), jnp.dtype("float32")},
        f"a is float32 at most, not {a.dtype}": jnp.promote_types(a.dtype, jnp.float32) != jnp.float32,
    }
    _serve("selective", reasons, chunk=chunk, sequence_axis=sequence_axis)
    if state is None:
        state = jnp.zeros((x.shape[0], *a.shape), jnp.float32)
    x, dt, b, c = (_empty(y, segments) for y in (x, dt, b, c))
    documents = _documents(segments, x.shape[:2])
    wide = (a.astype(jnp.float32), b, c, state.astype(jnp.float32))
    y, state = selective_scan(x, dt, *wide, documents, chunk or CHUNK, True, INTERPRET)
    return _empty(y, segments), state
