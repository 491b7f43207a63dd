"""From a family's call to its kernel in `kernels_pallas`, or to an error that says why none serves it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from kernels_pallas import delta as tpu_delta
from kernels_pallas import delta_keys as tpu_delta_keys
from kernels_pallas import exponential as tpu_exponential
from kernels_pallas import linear as tpu_linear
from kernels_pallas import outer as tpu_outer
from kernels_pallas import outer_keys as tpu_outer_keys
from kernels_pallas import selective as tpu_selective
from kernels_pallas.chunks import CHUNK, VMEM
from kernels_pallas.gpu import common as gpu
from kernels_pallas.gpu import delta as gpu_delta
from kernels_pallas.gpu import delta_keys as gpu_delta_keys
from kernels_pallas.gpu import exponential as gpu_exponential
from kernels_pallas.gpu import linear as gpu_linear
from kernels_pallas.gpu import outer as gpu_outer
from kernels_pallas.gpu import outer_keys as gpu_outer_keys
from kernels_pallas.gpu import selective as gpu_selective
from seqmodels.compat import device, vary_alike
from seqmodels.operators.family import check_method, check_sizes
from seqmodels.scan.auto import choose
from seqmodels.typing import Segments

NUMBERS = {jnp.dtype("bfloat16"), jnp.dtype("float32")}
INTERPRET: Any = False  # how `pallas_call` runs where there is no device; for tests


def on_hopper() -> bool:
    """Whether a program is made for an H100, H200, GH200 or another GPU of their kind, by its name."""
    return device().platform in ("gpu", "cuda") and re.search(r"\bG?H\d", device().device_kind) is not None


def _refuse(
    family: str, reasons: Mapping[str, Any], chunk: int | None, sequence_axis: str | None, *, hopper: int
) -> None:
    """Raises `Refused` with the first of the reasons that holds, those of every kernel among them.

    `hopper`: the steps of a chunk of the kernel for Hopper GPUs.
    """
    own = on_hopper()
    steps = f"of {hopper} steps" if own else f"a multiple of {CHUNK} steps"
    fits = chunk is None or (chunk == hopper if own else chunk % CHUNK == 0)
    served = device().platform == "tpu" or own or INTERPRET
    common = {
        f"the kernel is for TPUs and Hopper GPUs, and this is made for {device().device_kind}": not served,
        "the kernel does not shard time": sequence_axis is not None,
        f"chunks are {steps}, not {chunk}": not fits,
    }
    for reason, holds in {**common, **reasons}.items():
        if holds:
            raise Refused(f"method='pallas' for the {family} family: {reason}; use 'auto', which takes the XLA form")


class Refused(ValueError):
    """No kernel serves, and why."""


def serve(
    method: str,
    family: str,
    kernel: Callable[[], Any],
    *scanned: Array,
    sizes: tuple[int, ...],
    chunk: int | None,
    sequence_axis: str | None,
) -> Any | None:
    """What the kernel gives if `method` is "pallas", or "auto" and the table names it; None where XLA's form is to run.

    `auto` leaves a call with a chunk or sharded time to XLA, and one that the kernel refuses.
    Families: outer and delta, outer_keys and delta_keys (decays of keys, or a bonus), exponential, diagonal, selective.
    Raises ValueError on a method or a chunk that no family can run, and where "pallas" was asked for and cannot serve.
    """
    check_method(method, chunk)
    check_sizes(family, *scanned)
    if method == "pallas":
        return kernel()
    if method != "auto" or chunk is not None or sequence_axis is not None:
        return None
    dtype, length = jnp.result_type(*scanned), scanned[0].shape[1]
    kind = device().device_kind
    if choose(matmul_form=True, length=length, family=family, device=kind, sizes=sizes, dtype=dtype) != "pallas":
        return None
    try:
        return kernel()
    except Refused:
        return None


def _of_matrices(
    query: Array, key: Array, value: Array, chunk: int | None, budget: Callable[..., dict[str, int]]
) -> dict[str, bool]:
    """Reasons of the kernels that multiply matrices, for `_refuse`; `budget`: the `vmem_bytes` of that for TPUs."""
    kinds = {x.dtype for x in (query, key, value)}
    told = ", ".join(sorted(map(str, kinds)))
    unlike = len(kinds) > 1 or not kinds <= NUMBERS
    reasons = {f"query, key and value are of one type, bfloat16 or float32, not {told}": unlike}
    if on_hopper():
        narrow = gpu.refused(query, key, value)
        return {**reasons, f"{narrow}": narrow is not None}
    sizes = (key.shape[-1], value.shape[-1])
    return {
        **reasons,
        **_too_large(f"heads of {sizes[0]} keys and {sizes[1]} values", budget, *sizes, chunk, query.dtype),
    }


def _too_wide(**arrays: Array | None) -> dict[str, bool]:
    """What is kept in float32 and would lose digits."""
    given = {name: x.dtype for name, x in arrays.items() if x is not None}
    wide = [f"{name} is {kind}" for name, kind in given.items() if jnp.promote_types(kind, jnp.float32) != jnp.float32]
    return {f"gates and states are float32 at most, but {' and '.join(wide)}": bool(wide)}


def _too_large(what: str, budget: Callable[..., dict[str, int]], *sizes: Any, **options: Any) -> dict[str, bool]:
    held = max(budget(*(CHUNK if x is None else x for x in sizes), **options).values())
    return {f"{what} take {held} bytes of VMEM, more than {VMEM:.0f}": held > VMEM}


def _pairs(per_key: bool, chunk: int | None) -> dict[str, bool]:
    """The kernels with a decay per key for TPUs; those for GPUs have chunks of one length."""
    odd = per_key and chunk is not None and chunk & (chunk - 1) != 0
    return {f"decays per key pair the steps of a chunk: a power of two of them, not {chunk}": odd}


def _empty(x: Array, segments: Segments | None) -> Array:
    """Zeros on padding."""
    return x if segments is None else jnp.where(jnp.expand_dims(segments.valid, range(2, x.ndim)), x, 0)


def _documents(segments: Segments | None, shape: tuple[int, ...]) -> Array:
    """[B, T]: 0 as long as the state goes on, one more with every start."""
    return jnp.zeros(shape, jnp.int32) if segments is None else segments.ids


def _decays_and_state(key: Array, value: Array, log_decay: Array | None, state: Array | None) -> tuple[Array, Array]:
    """In float32; no decays and an empty state where they are None."""
    batch, _, heads, size = value.shape
    log_decay = jnp.zeros(value.shape[:3]) if log_decay is None else log_decay
    state = jnp.zeros((batch, heads, key.shape[-1], size)) if state is None else state
    return log_decay.astype(jnp.float32), state.astype(jnp.float32)


def outer(
    query: Float[Array, "B T G K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H *K"] | None,
    state: Float[Array, "B H K V"] | None,
    *,
    segments: Segments | None,
    chunk: int | None,
    bonus: Float[Array, "H K"] | None,
    sequence_axis: str | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`gated_linear_attention` by `chunk_outer`, or `chunk_outer_keys` where each key decays in its own way, and where
    there is a bonus: a decay of heads is then that of all their keys.

    Both are there for Hopper GPUs too. Raises ValueError where they cannot serve, and why.
    """
    own = on_hopper()
    per_key = bonus is not None or (log_decay is not None and log_decay.ndim == 4)
    budget = (tpu_outer_keys if per_key else tpu_outer).vmem_bytes
    reasons = _pairs(per_key, chunk) | _of_matrices(query, key, value, chunk, budget)
    reasons |= _too_wide(log_decay=log_decay, state=state, bonus=bonus)
    _refuse("outer", reasons, chunk=chunk, sequence_axis=sequence_axis, hopper=gpu.CHUNK)
    log_decay, state = _decays_and_state(key, value, log_decay, state)
    if per_key and log_decay.ndim == 3:
        log_decay = jnp.broadcast_to(log_decay[..., None], (*log_decay.shape, key.shape[-1]))
    given = (query, key, value, log_decay)
    q, k, v, g = (jnp.swapaxes(_empty(x, segments), 1, 2) for x in given)
    documents = _documents(segments, value.shape[:2])
    arrays, bonus = vary_alike(((q, k, v, g, state, documents), bonus))
    if own and per_key:
        out, state = gpu_outer_keys.chunk_outer_keys(*arrays, False, INTERPRET, bonus)
    elif own:
        out, state = gpu_outer.chunk_outer(*arrays, INTERPRET)
    else:
        run = functools.partial(tpu_outer_keys.chunk_outer_keys, bonus=bonus) if per_key else tpu_outer.chunk_outer
        out, state = run(*arrays, chunk or CHUNK, False, INTERPRET)
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
    """`diagonal_scan` by `linear_scan`, for TPUs or Hopper GPUs. Raises ValueError where neither can serve, and why."""
    kind = jnp.result_type(log_decay, drive, jnp.float32, *(() if state is None else (state,)))
    reasons = {f"numbers are float32 or complex64 at most, not {kind}": kind not in (jnp.float32, jnp.complex64)}
    if not on_hopper():
        channels, planes = drive.shape[2], 1 + (kind == jnp.complex64)
        reasons |= _too_large(f"{channels} channels", tpu_linear.vmem_bytes, channels, chunk, planes=planes)
    _refuse("diagonal", reasons, chunk=chunk, sequence_axis=sequence_axis, hopper=gpu_linear.STEPS)
    if state is None:
        state = jnp.zeros((drive.shape[0], drive.shape[2]), kind)
    given = (_empty(x.astype(kind), segments) for x in (log_decay, drive))
    arrays = vary_alike((*given, state.astype(kind), _documents(segments, drive.shape[:2])))
    if on_hopper():
        out, state = gpu_linear.linear_scan(*arrays, INTERPRET)
    else:
        out, state = tpu_linear.linear_scan(*arrays, chunk or CHUNK, INTERPRET)
    return _empty(out, segments), state


def delta(
    query: Float[Array, "B T G K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H *K"] | None,
    state: Float[Array, "B H K V"] | None,
    *,
    segments: Segments | None,
    chunk: int | None,
    sequence_axis: str | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`delta_rule` by `chunk_delta`, or `chunk_delta_keys` where each key decays in its own way.

    Both are there for Hopper GPUs too. Raises ValueError where none serves, and why.
    """
    per_key = log_decay is not None and log_decay.ndim == 4
    own = on_hopper()
    budget = (tpu_delta_keys if per_key else tpu_delta).vmem_bytes
    reasons = _pairs(per_key, chunk) | _of_matrices(query, key, value, chunk, budget)
    reasons |= _too_wide(beta=beta, log_decay=log_decay, state=state)
    _refuse("delta", reasons, chunk=chunk, sequence_axis=sequence_axis, hopper=gpu.CHUNK)
    log_decay, state = _decays_and_state(key, value, log_decay, state)
    given = (query, key, value, beta.astype(jnp.float32), log_decay)
    q, k, v, strength, g = (jnp.swapaxes(_empty(x, segments), 1, 2) for x in given)
    arrays = vary_alike((q, k, v, strength, g, state, _documents(segments, value.shape[:2])))
    if own:
        run_own = gpu_delta_keys.chunk_delta_keys if per_key else gpu_delta.chunk_delta
        out, state = run_own(*arrays, False, INTERPRET)
    else:
        run = tpu_delta_keys.chunk_delta_keys if per_key else tpu_delta.chunk_delta
        out, state = run(*arrays, chunk or CHUNK, False, INTERPRET)
    return _empty(jnp.swapaxes(out, 1, 2), segments), state


def exponential(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T H K"],
    value: Float[Array, "B T H V"],
    log_input: Float[Array, "B T H"],
    log_forget: Float[Array, "B T H"],
    state: tuple[Float[Array, "B H"], Float[Array, "B H K"], Float[Array, "B H K V"]],
    *,
    eps: float,
    segments: Segments | None,
    chunk: int | None,
    sequence_axis: str | None,
) -> tuple[Float[Array, "B T H V"], tuple[Float[Array, "B H"], Float[Array, "B H K"], Float[Array, "B H K V"]]]:
    """`mlstm_scan` by `chunk_exponential` for TPUs or for Hopper GPUs, its state as a tuple.

    Raises ValueError where that cannot serve, and why.
    """
    own = on_hopper()
    reasons = _of_matrices(query, key, value, chunk, tpu_exponential.vmem_bytes)
    gates = {"log_input": log_input, "log_forget": log_forget}
    reasons |= _too_wide(**gates, **dict(zip(("log_max", "normaliser", "memory"), state, strict=True)))
    _refuse("exponential", reasons, chunk=chunk, sequence_axis=sequence_axis, hopper=gpu.CHUNK)
    if segments is not None:  # nothing is written
        log_input = jnp.where(segments.valid[..., None], log_input, -jnp.inf)
    arrays = [_empty(x, segments) for x in (query, key, value)]
    arrays += [log_input.astype(jnp.float32), _empty(log_forget.astype(jnp.float32), segments)]
    q, k, v, i, f = (jnp.swapaxes(x, 1, 2) for x in arrays)
    log_max, normaliser, memory = (x.astype(jnp.float32) for x in state)
    documents = _documents(segments, query.shape[:2])
    given = (*vary_alike((q, k, v, i, f, (log_max, normaliser, memory), documents)), eps)
    if own:
        out, after = gpu_exponential.chunk_exponential(*given, INTERPRET)
    else:
        out, after = tpu_exponential.chunk_exponential(*given, chunk or CHUNK, False, INTERPRET)
    return _empty(jnp.swapaxes(out, 1, 2), segments), after


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
        f"x, dt, b and c are bfloat16 or float32, not {told}": not kinds <= NUMBERS,
        **_too_wide(a=a, state=state),
    }
    size = a.shape[1]
    if on_hopper():
        held, room = max(gpu_selective.shared_bytes(x.shape[1], size, x.dtype).values()), gpu.SHARED
        reasons[f"states of {size} take {held} bytes of shared memory, more than {room}"] = held > room
    else:
        reasons |= _too_large(f"states of {size}", tpu_selective.vmem_bytes, *a.shape, chunk, dtype=x.dtype)
    _refuse("selective", reasons, chunk=chunk, sequence_axis=sequence_axis, hopper=gpu_selective.STEPS)
    if state is None:
        state = jnp.zeros((x.shape[0], *a.shape), jnp.float32)
    x, dt, b, c = (_empty(y, segments) for y in (x, dt, b, c))
    wide = (a.astype(jnp.float32), b, c, state.astype(jnp.float32))
    arrays = vary_alike((x, dt, *wide, _documents(segments, x.shape[:2])))
    if on_hopper():
        y, state = gpu_selective.selective_scan(*arrays, interpret=INTERPRET)
    else:
        y, state = tpu_selective.selective_scan(*arrays, chunk or CHUNK, True, INTERPRET)
    return _empty(y, segments), state
