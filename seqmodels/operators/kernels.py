"""From a family's call to its kernel in `kernels_pallas`, or to an error that says why none serves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from kernels_pallas.chunks import CHUNK
from kernels_pallas.gpu import linear as gpu_linear
from kernels_pallas.linear import linear_scan
from kernels_pallas.outer import chunk_outer
from kernels_pallas.outer_keys import chunk_outer_keys
from seqmodels.operators.family import check_method
from seqmodels.typing import Segments

INTERPRET: Any = False  # how `pallas_call` runs where there is no device; for tests


def platform() -> str:
    """What a program is made for: the abstract mesh's device where one is set, else jax's default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def _before_hopper() -> bool:
    """Whether programs are made for this machine's GPU, and that is none of compute capability 9.0 or more."""
    if getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) is not None:
        return False
    major = str(getattr(jax.devices()[0], "compute_capability", "9.0")).split(".")[0]
    return not major.isdigit() or int(major) < 9  # AMD's have names


def _serve(
    family: str, reasons: Mapping[str, Any], chunk: int | None, sequence_axis: str | None, *, gpu: bool = False
) -> None:
    """Raises ValueError with the first of the reasons that holds, those of every kernel among them.

    `gpu`: there is a kernel for GPUs too.
    """
    check_method("pallas", chunk)
    to = platform()
    served = to == "tpu" or (gpu and to == "gpu") or INTERPRET
    common = {
        f"the kernel is for {'TPUs and GPUs' if gpu else 'TPUs'}, and this is made for {to}": not served,
        "the kernel is for GPUs from Hopper on, and this one is older": to == "gpu" and _before_hopper(),
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
    """`diagonal_scan` by `linear_scan` for TPUs or for GPUs. Raises ValueError where neither can serve, and why."""
    kind = jnp.result_type(log_decay, drive, jnp.float32)
    reasons = {f"numbers are float32 or complex64 at most, not {kind}": kind not in (jnp.float32, jnp.complex64)}
    _serve("diagonal", reasons, chunk=chunk, sequence_axis=sequence_axis, gpu=True)
    if state is None:
        state = jnp.zeros((drive.shape[0], drive.shape[2]), kind)
    arrays = (_empty(x.astype(kind), segments) for x in (log_decay, drive))
    documents = _documents(segments, drive.shape[:2])
    if platform() == "gpu":
        out, state = gpu_linear.linear_scan(*arrays, state.astype(kind), documents, INTERPRET)
    else:
        out, state = linear_scan(*arrays, state.astype(kind), documents, chunk or CHUNK, INTERPRET)
    return _empty(out, segments), state
