"""`chunk_delta_keys` for GPUs: S = Diag(exp(g_t)) S_{t-1}, S_t = S + beta_t k_t (v_t - S^T k_t)^T, read as
o_t = q_t^T S_t, with a decay per key.

The equations of a chunk stand in `kernels_pallas/delta.py`. With P the scores of queries, A those of keys by later
keys, Q_late and K_late decayed from the chunk's start, K_early to its end and b the decay over it, a chunk is

    E = (I + A * beta)^-1 (V - K_late S), U = beta * E        O = P U + Q_late S        S' = Diag(b) S + K_early^T U

so what goes from chunk to chunk knows no exponentials, as in `outer_keys.py`. Programs, all but the walks of each chunk
by itself:

    weighed      P, A, Q_late, K_late, K_early                 delta_keys_pairs.py
    inverses     (I + A * beta)^-1, beta along columns         delta_solve.py
    forward      O and S', a walk                              delta_keys_walk.py
    weighed      again, for the gradients
    inverses     (I + beta * A)^-1, beta along rows
    backward     dV, dbeta and dS, a walk back                 delta_keys_walk.py
    gradients    dQ, dK and dg from E, dV, S and dS'           delta_keys_pairs.py

Types are those of `delta.py`: inverses and what they multiply are in two terms of bfloat16, and A is float32, though of
bfloat16 factors where keys decay; S and K_late are bfloat16 where they are read. Log decays come as in `outer_keys.py`.

On paper, for it has not run on a GPU: queries and keys share their exponentials, 8 an entry of keys. To keep those
out of the walks is to write 384 K bytes and 24 KiB a chunk and head, 72 KiB where K is 128, beside 16 KiB of inverses.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.chunks import whole_chunks
from kernels_pallas.delta_run import check
from kernels_pallas.gpu import delta_keys_pairs, delta_keys_walk, delta_solve
from kernels_pallas.gpu.common import CHUNK, chunks_of, over_heads, refused, shared_bytes, starts_of
from kernels_pallas.gpu.delta_keys_pairs import gradients, weighed
from kernels_pallas.gpu.delta_keys_walk import walk
from kernels_pallas.gpu.delta_solve import inverses_of
from kernels_pallas.gpu.outer_keys import gates_of


def chunk_delta_keys(
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
    """`kernels_pallas.delta_keys.chunk_delta_keys` for bfloat16 and heads of 64, 128 or 256: same arrays, same results.

    Chunks are of 64 steps. `save_states` keeps the errors E and the states before all chunks, in bfloat16, else the
    backward pass computes them again. The kernels read [B, T, H, K]; the transposes here and those of a caller with
    that order cancel under `jit`. `interpret`: as `common.launch` takes it. Raises ValueError on shapes that do not
    fit, and on types and sizes that the kernels do not take.
    """
    decays = (*value.shape[:3], query.shape[3])
    check("chunk_delta_keys", query, key, value, beta, log_decay, state, segment, decays)
    if told := refused(query, key, value):
        raise ValueError(f"chunk_delta_keys: {told}")
    q, k, v, g = (jnp.swapaxes(x, 1, 2) for x in (query, key, value, log_decay))
    out, state = run(save_states, interpret, q, k, v, beta, g, state, segment)
    return jnp.swapaxes(out, 1, 2), state


def shared_memory(key_size: int, value_size: int) -> dict[str, int]:
    """Bytes of shared memory that a program of each kernel has, where it has most."""
    scratch = {
        "weighed": delta_keys_pairs.scratch_of_weighed(key_size),
        "inverses": delta_solve.scratch_of_scores(),
        "forward": delta_keys_walk.scratch_of(key_size, backward=False, keep=True),
        "backward": delta_keys_walk.scratch_of(key_size, backward=True, keep=True),
        "gradients": delta_keys_pairs.scratch_of_gradients(value_size),
    }
    return {name: shared_bytes(arrays.values()) for name, arrays in scratch.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(save: bool, interpret: Any, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The arrays of `chunk_delta_keys`, checked, with steps before heads."""
    return _forward(save, interpret, *arrays)[0]


def _whole(given: Any, segment: jax.Array) -> tuple[list[jax.Array], jax.Array, Any]:
    """q, k and v, strengths [B, H, N, CHUNK], and gates, up to whole chunks; steps that are added belong to the last
    document, and change nothing."""
    query, key, value, beta, log_decay = given
    segment = jnp.pad(segment, ((0, 0), (0, -segment.shape[1] % CHUNK)), mode="edge")
    *wide, log_decay = whole_chunks(CHUNK, query, key, value, log_decay, axis=1)
    (beta,) = whole_chunks(CHUNK, beta.astype(jnp.float32), axis=2)
    return wide, chunks_of(beta), gates_of(log_decay, segment)


def _forward(save: bool, interpret: Any, *arrays: Any) -> Any:
    *given, state, segment = arrays
    length = given[2].shape[1]
    (q, k, v), beta, (high, low, kept) = _whole(given, segment)
    found = weighed(interpret, q, k, high, low)
    solved = inverses_of(found["mutual"], beta, False, interpret)
    found = walk(interpret, found, v, beta, kept, solved, state, keep=save)
    saved = (found["states"], found["kept_errors"]) if save else None
    return (found["out"][:, :length], found["last"]), (*arrays, saved)


def _backward(save: bool, interpret: Any, residuals: Any, cotangents: Any) -> Any:
    *given, state, segment, saved = residuals
    d_out, d_last = cotangents
    length, groups = given[0].shape[1:3]
    (q, k, v), beta, (high, low, kept) = _whole(given, segment)
    (do,) = whole_chunks(CHUNK, d_out, axis=1)
    pairs = weighed(interpret, q, k, high, low)
    solved = lambda by_row: inverses_of(pairs["mutual"], beta, by_row, interpret)
    if saved is None:
        found = walk(interpret, pairs, v, beta, kept, solved(False), state, keep=True)
        saved = found["states"], found["kept_errors"]
    states, errors = saved
    back = walk(interpret, pairs, do, beta, kept, solved(True), d_last, errors=errors)
    dq, dk, dg = gradients(
        interpret,
        query=q,
        key=k,
        high=high,
        low=low,
        d_out=do,
        d_value=back["out"],
        errors=errors,
        states=states,
        after=back["states"],
        kept=kept,
        beta=beta,
    )
    d_beta = jnp.sum(back["strength"], axis=2)

    return (
        over_heads(dq, groups)[:, :length],
        over_heads(dk, groups)[:, :length],
        back["out"][:, :length],
        d_beta.reshape(*d_beta.shape[:2], -1)[:, :, :length].astype(given[3].dtype),
        jnp.where(starts_of(segment)[:, :, None, None], 0, dg[:, :length]).astype(given[4].dtype),
        back["last"].astype(state.dtype),
        None,
    )


run.defvjp(_forward, _backward)
