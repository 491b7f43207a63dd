"""`chunk_outer_keys` for GPUs: S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T, read as o_t = q_t^T S_t.

The equations of a chunk stand in `kernels_pallas/outer_keys.py`. With P the scores of a chunk, X the queries decayed
from its start, Y the keys decayed to its end and b the decay over it,

    O = P V + X S         S' = Diag(b) S + Y^T V          dV = P^T dO + Y dS'         dS = Diag(b) dS' + X^T dO

so what has to go from chunk to chunk knows no exponentials. Programs:

    weighed        P, X, Y of a chunk                     each chunk by itself (`pairs.py`)
    out            O and S'                               a walk over chunks (`carry.py`)
    weighed        again, for the gradients
    states         S before every chunk                   a walk, unless `save_states`
    d_value        dV and dS, and dS' after every chunk   a walk back
    gradients      dQ, dK, dg of a chunk, from S, dS'     each chunk by itself

Log decays come in two bfloat16 whose sum has 16 of their bits, since sums of them are products. exp(-128) = 0 stands
for exp(-inf), and a document starts with a decay of exp(-256): gates are all there is to mask.

With RWKV-6's bonus, P has it on its diagonal and X lags one step (`pairs.py`); the walks are the same.

On paper, for it has not run on a GPU: exponentials, 8 an entry of queries or keys, are worked out once a chunk, by all
processors at a time, and not by every walk and every block of values, of which a batch of few heads has few. That costs
a write of X and Y, as large as queries and keys, which are not read again in their place. A bonus costs no pass over
memory: each program reads a row of it, and one row a chunk is written of its gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.chunks import check_shapes, whole_chunks
from kernels_pallas.gpu import carry, pairs
from kernels_pallas.gpu.common import CHUNK, LOWEST, over_heads, refused, shared_bytes, starts_of
from kernels_pallas.outer import check

START = 2 * LOWEST  # the decay of a document's first step, and of no other
OUT = carry.Carry("out", out=True, last=True)
SAVED = OUT._replace(keep=True)
STATES = carry.Carry("states", keep=True)
D_VALUE = carry.Carry("d_value", backward=True, out=True, last=True, keep=True)


def chunk_outer_keys(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    segment: jax.Array,
    save_states: bool = False,
    interpret: Any = False,
    bonus: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.outer_keys.chunk_outer_keys` for bfloat16 and heads of 64, 128 or 256: same arrays, same results.

    So with a bonus u [H, K]. Chunks are of 64 steps; `save_states` keeps the states before them, in bfloat16, for the
    gradients. The kernel reads [B, T, H, K]; the transposes here and those of a caller with that order cancel under
    `jit`. `interpret`: as `common.launch` takes it. Raises ValueError on shapes that do not fit, and on types and sizes
    that it does not take.
    """
    decays = (*value.shape[:3], query.shape[3])
    name = "chunk_outer_keys" if bonus is None else "chunk_outer_keys_bonus"
    check(name, query, key, value, log_decay, state, segment, decays)
    extra = () if bonus is None else (bonus,)
    if bonus is not None:
        check_shapes(name, {"bonus": (bonus.shape, (value.shape[1], query.shape[3]))})
    if told := refused(query, key, value):
        raise ValueError(f"{name}: {told}")
    q, k, v, g = (jnp.swapaxes(x, 1, 2) for x in (query, key, value, log_decay))
    out, state = run(save_states, interpret, q, k, v, g, state, segment, *extra)
    return jnp.swapaxes(out, 1, 2), state


def shared_memory(key_size: int, value_size: int, bonus: bool = False) -> dict[str, int]:
    """Bytes of shared memory that a program of each kind has."""
    programs = {kind.name: carry.scratch_of(kind, key_size) for kind in (OUT, STATES, D_VALUE)}
    programs["weighed"] = pairs.scratch_of_weighed(key_size, int(bonus))
    programs["gradients"] = pairs.scratch_of_gradients(value_size, int(bonus))
    return {name: shared_bytes(scratch.values()) for name, scratch in programs.items()}


def gates_of(log_decay: jax.Array, segment: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log decays [B, T, H, K] of whole chunks as two bfloat16, and the decay over each chunk [B, H, N, K]."""
    g = jnp.maximum(log_decay.astype(jnp.float32), LOWEST)
    g = jnp.where(starts_of(segment)[:, :, None, None], START, g)
    high = lax.reduce_precision(g, 8, 7)  # a conversion there and back may be left out by the compiler
    total = jnp.sum(g.reshape(g.shape[0], -1, CHUNK, *g.shape[2:]), axis=2)
    narrow = lambda x: x.astype(jnp.bfloat16)
    return narrow(high), narrow(g - high), jnp.moveaxis(jnp.exp(total), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(save_states: bool, interpret: Any, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The arrays of `chunk_outer_keys`, and a bonus where there is one, checked, with steps before heads."""
    return _forward(save_states, interpret, *arrays)[0]


def _whole(log_decay: jax.Array, segment: jax.Array, *arrays: jax.Array) -> tuple[Any, list[jax.Array]]:
    """Gates and arrays up to whole chunks; steps that are added belong to the last document, and change nothing."""
    segment = jnp.pad(segment, ((0, 0), (0, -segment.shape[1] % CHUNK)), mode="edge")
    log_decay, *padded = whole_chunks(CHUNK, log_decay, *arrays, axis=1)
    return gates_of(log_decay, segment), padded


def _forward(save_states: bool, interpret: Any, *arrays: Any) -> Any:
    query, key, value, log_decay, state, segment, *bonus = arrays
    (high, low, kept), (q, k, v) = _whole(log_decay, segment, query, key, value)
    scores, late, early = pairs.weighed(interpret, q, k, high, low, *(u.astype(jnp.float32) for u in bonus))
    kind = SAVED if save_states else OUT
    found = carry.carry(kind, interpret, v, early, kept, state.astype(jnp.float32), x=late, scores=scores)
    return (found["out"][:, : value.shape[1]], found["last"]), (arrays, found.get("states"))


def _backward(save_states: bool, interpret: Any, residuals: Any, gradients: Any) -> Any:
    (query, key, value, log_decay, state, segment, *bonus), states = residuals
    d_out, d_last = gradients
    length, groups = query.shape[1:3]
    (high, low, kept), (q, k, v, do) = _whole(log_decay, segment, query, key, value, d_out)
    wide = [u.astype(jnp.float32) for u in bonus]
    scores, late, early = pairs.weighed(interpret, q, k, high, low, *wide)
    if states is None:
        states = carry.carry(STATES, interpret, v, early, kept, state.astype(jnp.float32))["states"]
    of_value = carry.carry(D_VALUE, interpret, do, late, kept, d_last, x=early, scores=scores)
    given = (q, k, v, do, high, low, states, of_value["states"], kept, *wide)
    dq, dk, dg, *d_bonus = pairs.gradients(interpret, *given)

    return (
        over_heads(dq, groups)[:, :length],
        over_heads(dk, groups)[:, :length],
        of_value["out"][:, :length],
        jnp.where(starts_of(segment)[:, :, None, None], 0, dg[:, :length]).astype(log_decay.dtype),
        of_value["last"].astype(state.dtype),
        None,
        *(jnp.sum(x, axis=(0, 2)).astype(u.dtype) for x, u in zip(d_bonus, bonus, strict=True)),
    )


run.defvjp(_forward, _backward)
