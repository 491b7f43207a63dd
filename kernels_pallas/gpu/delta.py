"""`chunk_delta` for GPUs: S = exp(g_t) S_{t-1}, S_t = S + beta_t k_t (v_t - S^T k_t)^T, read as o_t = q_t^T S_t, with a
decay per head.

The equations of a chunk stand in `kernels_pallas/delta.py`, with C = K K^T * M'. What does not need the state is made
of all chunks at once, what does is a walk over those of a head:

    inverses     (I + C * beta)^-1, beta along columns                                    delta_solve.py
    forward      E = (I + C * beta)^-1 (V - a * (K S)), U = beta * E, O, S'               delta_walk.py
    inverses     (I + beta * C)^-1, beta along rows
    backward     Y = (I + beta * C)^-T (P^T dO + w * (K dS')), dV, dbeta, dS              delta_walk.py
    gradients    dQ, dK and dg from E, dV, the states and their gradients                 delta_grad.py

The forward walk solves for E, not for U = beta * E, since dbeta_t is y_t . e_t where beta is 0 too. E, S and dS' are
kept for the gradients in bfloat16, as products take them. Inverses and what they multiply are in two terms of bfloat16,
16 bits: three products more a chunk than with W = X (beta * a * K) made ahead, which has 8 bits and cancels against V.

Why it should be fast; on paper, for it has not run on a GPU. An inverse is 30 products of 64 x 64 x 64, ten waits long:
four programs share a processor where K <= 128, and fill each other's waits; a chunk's numbers stay in shared memory
till X is found, and 16 KiB are what a chunk writes. The forward walk is three waits a chunk long, and asks for copies
ahead. No walk is made for dQ and dK: the price is that S and dS', 4 K V bytes a chunk and head, are written and read
once. As in `outer.py`, B H V/64 programs walk: 32 heads of 128 keep 64 of an H100's 132 processors busy.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.chunks import whole_chunks
from kernels_pallas.delta_run import check
from kernels_pallas.gpu import delta_grad, delta_solve, delta_walk
from kernels_pallas.gpu.common import CHUNK, over_heads, refused, shared_bytes, starts_of
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

    Chunks are of 64 steps. `save_states` keeps the errors E and, in bfloat16, the states before all chunks, else the
    backward pass computes them again. The kernels read [B, T, H, K]; the transposes here and those of a caller with
    that order cancel under `jit`. `interpret`: as `common.launch` takes it. Raises ValueError on shapes that do not
    fit, and on types and sizes that the kernels do not take.
    """
    check("chunk_delta", query, key, value, beta, log_decay, state, segment, value.shape[:3])
    if told := refused(query, key, value):
        raise ValueError(f"chunk_delta: {told}")
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    out, state = run(save_states, interpret, swap(query), swap(key), swap(value), beta, log_decay, state, segment)
    return swap(out), state


def shared_memory(key_size: int, value_size: int) -> dict[str, int]:
    """Bytes of shared memory that a program of each kernel has, where it has most."""
    scratch = {
        "inverses": delta_solve.scratch_of(key_size),
        "forward": delta_walk.scratch_of(key_size, backward=False, keep=True),
        "backward": delta_walk.scratch_of(key_size, backward=True, keep=True),
        "gradients": delta_grad.scratch_of(value_size),
    }
    return {name: shared_bytes(arrays.values()) for name, arrays in scratch.items()}


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

    return (
        over_heads(found["d_query"], groups)[:, :length],
        over_heads(found["d_key"], groups)[:, :length],
        back["out"][:, :length],
        heads_of(jnp.sum(back["strength"], axis=2)).astype(given[3].dtype),
        jnp.where(starts_of(segment)[:, None], 0, heads_of(gates_gradient(found["d_sums"]))).astype(given[4].dtype),
        back["last"].astype(state.dtype),
        None,
    )


run.defvjp(_forward, _backward)
