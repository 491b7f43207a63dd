"""draft"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.chunks import whole_chunks
from kernels_pallas.delta_run import check
from kernels_pallas.gpu.common import CHUNK, refusal, starts_of
from kernels_pallas.gpu.delta_grad import gates_gradient, gradients
from kernels_pallas.gpu.delta_solve import inverses, strengths_and_gates
from kernels_pallas.gpu.delta_walk import walk


def chunk_delta(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    segment: jax.Array,
    save_states: bool = False,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.delta.chunk_delta` for bfloat16 and heads of 64, 128 or 256: the same arrays, the same results.

    Chunks are of 64 steps. `save_states` keeps states, errors and inverses of all chunks, else the backward pass
    computes them again. The kernels read [B, T, H, K]; the transposes here and those of a caller with that order cancel
    under `jit`. `interpret`: as `common.launch` takes it. Raises ValueError on shapes that do not fit, and on types and
    sizes that the kernels do not take.
    """
    check("chunk_delta", query, key, value, beta, log_decay, state, segment, value.shape[:3])
    if told := refused(query, key, value):
        raise ValueError(f"chunk_delta: {told}")
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    out, state = run(save_states, interpret, swap(query), swap(key), swap(value), beta, log_decay, state, segment)
    return swap(out), state


def refused(query: Any, key: Any, value: Any) -> str | None:
    """Why the kernels do not take these arrays, of any order of heads and steps; None where they do."""
    kinds = {"query": query.dtype, "key": key.dtype, "value": value.dtype}
    return refusal(kinds, {"that of keys": query.shape[3], "that of values": value.shape[3]})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(save: bool, interpret: Any, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The arrays of `chunk_delta`, checked, with steps before heads."""
    return _forward(save, interpret, *arrays)[0]


def _whole(arrays: Any, segment: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """q, k and v, and strengths and gates, up to whole chunks; steps that are added belong to the last document, and
    change nothing."""
    query, key, value, beta, log_decay = arrays
    segment = jnp.pad(segment, ((0, 0), (0, -segment.shape[1] % CHUNK)), mode="edge")
    beta, log_decay = whole_chunks(CHUNK, beta, log_decay, axis=2)
    return whole_chunks(CHUNK, query, key, value, axis=1), strengths_and_gates(log_decay, beta, segment)


def _forward(save: bool, interpret: Any, *arrays: Any) -> Any:
    *given, state, segment = arrays
    length = given[2].shape[1]
    (q, k, v), gates = _whole(given, segment)
    solved = inverses(k, gates, False, interpret)
    found = walk(interpret, q, k, v, gates, solved, state, keep=save)
    kept = (found["states"], found["kept_errors"]) if save else None
    return (found["out"][:, :length], found["last"]), (*arrays, kept)


def _backward(save: bool, interpret: Any, residuals: Any, cotangents: Any) -> Any:
    *given, state, segment, kept = residuals
    d_out, d_last = cotangents
    length, groups = given[0].shape[1:3]
    (q, k, v), gates = _whole(given, segment)
    (do,) = whole_chunks(CHUNK, d_out, axis=1)
    if kept is None:
        found = walk(interpret, q, k, v, gates, inverses(k, gates, False, interpret), state, keep=True)
        kept = found["states"], found["kept_errors"]
    states, errors = kept
    back = walk(interpret, q, k, do, gates, inverses(k, gates, True, interpret), d_last, errors=errors)
    found = gradients(
        interpret,
        query=q,
        key=k,
        gates=gates,
        d_out=do,
        d_value=back["out"],
        errors=errors,
        states=states,
        d_states=back["states"],
    )
    heads_of = lambda x: x.reshape(*x.shape[:2], -1)[:, :, :length]

    def over_heads(x: jax.Array) -> jax.Array:
        parts = x.reshape(*x.shape[:2], groups, -1, x.shape[3])
        return jnp.sum(parts, axis=3, dtype=jnp.float32).astype(x.dtype)[:, :length]

    return (
        over_heads(found["d_query"]),
        over_heads(found["d_key"]),
        back["out"][:, :length],
        heads_of(jnp.sum(back["strength"], axis=2)).astype(given[3].dtype),
        jnp.where(starts_of(segment)[:, None], 0, heads_of(gates_gradient(found["d_sums"]))).astype(given[4].dtype),
        back["last"].astype(state.dtype),
        None,
    )


run.defvjp(_forward, _backward)
