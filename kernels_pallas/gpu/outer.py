"""`chunk_outer` for GPUs: S_t = exp(g_t) S_{t-1} + k_t v_t^T, read as o_t = q_t^T S_t, with a decay per head.

The equations of a chunk stand in `kernels_pallas/outer.py`. The output and three gradients are each one walk over the
chunks of a head (`walk.py`),

    O = (X Y^T * M) Z + a * (X S)        S' = b S + Y^T (w * Z)

with M_ij = exp(G_ij) for j <= i, a_i the decay from S to i, w_j that from j to S', b that from S to S':

    output    X, Y, Z = q, k, v     forward, state S         dV    k, q, dO    backward with M turned, state dS
    dQ        dO, v, k              forward, state S^T       dK    v, dO, q    backward so too, state dS^T

and backward a and w change places. dg_m = sum over i >= m of (q_i . dq_i - k_i . dk_i), and <S', dS'> for every m of
the chunk: the walks of dQ and dK sum these dot products as they go, that of dQ keeps its states S' (in bfloat16), that
of dK multiplies them by its own. A document starts with a decay of exp(-128) = 0: gates are all there is to mask.

Why it should be fast; on paper, for it has not run on a GPU. States are not written in the forward pass, where a pass
for states and one for outputs, as published kernels have them, write and read K V numbers a chunk and read keys and
values twice: more than half of their traffic at K = V = 128, and traffic bounds both. Copies and products run while
the chunk's gates are worked on; two programs of the output or dV share a processor where K <= 128. The price: only
B H V/64 programs run, one chunk after the other: 32 heads of 128 keep 64 of an H100's 132 processors busy.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.chunks import whole_chunks
from kernels_pallas.gpu.common import CHUNK, over_heads, refused, shared_bytes, starts_of
from kernels_pallas.gpu.walk import Walk, gates_of, scratch_of, walk
from kernels_pallas.outer import check

OUT = Walk("out", last=True)
D_QUERY = Walk("d_query", beside=True, keep=True)
D_KEY = Walk("d_key", backward=True, beside=True, cross=True)
D_VALUE = Walk("d_value", backward=True, last=True)


def chunk_outer(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    segment: jax.Array,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.outer.chunk_outer` for bfloat16 and heads of 64, 128 or 256: the same arrays, the same results.

    Chunks are of 64 steps. There are no states to save: every walk makes its own. The kernel reads [B, T, H, K]; the
    transposes here and those of a caller with that order cancel under `jit`. `interpret`: as `common.launch` takes it.
    Raises ValueError on shapes that do not fit, and on types and sizes that the kernel does not take.
    """
    check("chunk_outer", query, key, value, log_decay, state, segment, value.shape[:3])
    if told := refused(query, key, value):
        raise ValueError(f"chunk_outer: {told}")
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    out, state = run(interpret, swap(query), swap(key), swap(value), log_decay, state, segment)
    return swap(out), state


def shared_memory(key_size: int, value_size: int) -> dict[str, int]:
    """Bytes of shared memory that a program of each walk has."""
    sizes = {OUT: key_size, D_QUERY: value_size, D_KEY: value_size, D_VALUE: key_size}
    return {kind.name: shared_bytes(scratch_of(kind, size).values()) for kind, size in sizes.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(interpret: Any, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The arrays of `chunk_outer`, checked, with steps before heads."""
    return _forward(interpret, *arrays)[0]


def _whole(log_decay: jax.Array, segment: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Gates and arrays up to whole chunks; steps that are added belong to the last document, and change nothing."""
    segment = jnp.pad(segment, ((0, 0), (0, -segment.shape[1] % CHUNK)), mode="edge")
    (log_decay,) = whole_chunks(CHUNK, log_decay, axis=2)
    return gates_of(log_decay, segment), whole_chunks(CHUNK, *arrays, axis=1)


def _forward(interpret: Any, *arrays: Any) -> Any:
    query, key, value, log_decay, state, segment = arrays
    gates, (q, k, v) = _whole(log_decay, segment, query, key, value)
    found = walk(OUT, interpret, q, k, v, gates, state)
    return (found["out"][:, : value.shape[1]], found["last"]), arrays


def _backward(interpret: Any, residuals: Any, gradients: Any) -> Any:
    query, key, value, log_decay, state, segment = residuals
    d_out, d_last = gradients
    length, groups = query.shape[1:3]
    gates, (q, k, v, do) = _whole(log_decay, segment, query, key, value, d_out)
    swap = lambda x: jnp.swapaxes(x, 2, 3)
    of_query = walk(D_QUERY, interpret, do, v, k, gates, swap(state), beside=q)
    of_key = walk(D_KEY, interpret, v, do, q, gates, swap(d_last), beside=k, kept=of_query["states"])
    of_value = walk(D_VALUE, interpret, k, q, do, gates, d_last)
    each = jnp.sum(of_query["sums"] - of_key["sums"], axis=2)
    dg = lax.cumsum(each, axis=3, reverse=True) + jnp.sum(of_key["crossed"], axis=(2, 4))[..., None]
    dg = dg.reshape(*dg.shape[:2], -1)[:, :, :length]

    return (
        over_heads(of_query["out"], groups)[:, :length],
        over_heads(of_key["out"], groups)[:, :length],
        of_value["out"][:, :length],
        jnp.where(starts_of(segment)[:, None], 0, dg).astype(log_decay.dtype),
        of_value["last"].astype(state.dtype),
        None,
    )


run.defvjp(_forward, _backward)
