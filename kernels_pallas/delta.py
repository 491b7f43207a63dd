"""`chunk_delta`: S = exp(g_t) S_{t-1}, S_t = S + beta_t k_t (v_t - S^T k_t)^T, read as o_t = q_t^T S_t: the gated
delta rule with a decay per head.

Forward, for a chunk of L steps from the state S, with a, b, w and M as in `chunk_outer`, and M' = M less its diagonal
(2406.06484, 2412.06464). A step adds k_t u_t^T, and what all of them add solves one unit lower triangular system:

    P = Q K^T * M,  C = K K^T * M'               E = V - a * (K S) - C U,  U = beta * E
    X = (I + beta * C)^-1                        U = X (beta * (V - a * (K S)))
    O = P U + a * (Q S)                          S' = b S + (w * K)^T U

X comes by doubling from blocks of 1, 2, 4 .. L / 2 steps, two products a level: with B the part of beta * C that leads
from the first to the second block of a pair, X <- X - X B X. No row waits for the one before it.

Backward, with dS' from the chunk after it, where N = K S + C U is what the keys read:

    Y = X^T (P^T dO + (w * K) dS')               dV = beta * Y = -dN,  dbeta_t = y_t . e_t
    dP = dO U^T * M,  dC = dN U^T * M'           dQ = dP K + a * (dO S^T)
    dR = dC K + a * (dN S^T)                     dW = dP^T Q + dC^T K + w * (U dS'^T),  dK = dR + dW
    dS = (a * Q)^T dO + (a * K)^T dN + b dS'
    dg_m = sum over i >= m of (q_i . dq_i + k_i . dr_i - k_i . dw_i), and <S', dS'> for every m of the chunk

as two readers, queries and keys, stand one above the other in [2L, K]: their scores, reads and gradients are one
product each. Chunks have 128 steps though an inverse costs L^3: in a matrix unit 128 wide, two of 64 take as many
passes as one of 128, and gates are rows along 128 lanes. X is kept beside the state before each chunk, so the backward
pass solves nothing again. Sums of gates, types and the grid are as in `chunk_outer`; X is float32, and its
products keep 16 bits at least (`_exact`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.chunks import CHUNK, belongs, dot, places, turned
from kernels_pallas.delta_run import Form, check, memory, run
from kernels_pallas.outer import chunk_decays


class Pairs(NamedTuple):
    """What the steps of a chunk have to do with one another, and with the states before and after it.

    `scores` [2L, L] are P above C; `reach` (a) and `rest` (w) are [L, 1] or [L, K], `kept` (b), which is for chunks of
    one document, is [1, 1] or [K, 1];
    `pull` takes the gradient of the scores, before masks, to those of the readers [2L, K] and of the keys [L, K];
    `d_gates` is that of the gates, of reads less writes of each step [L, K], of writes that reach the state after it
    [L, K], and of the state's own [K, V].
    """

    scores: Any
    reach: Any
    rest: Any
    kept: Any
    pull: Callable[[Any], tuple[Any, Any]]
    d_gates: Callable[[Any, Any, Any], Any]


def reference(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    segment: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence a token at a time, in the type of the state; log_decay is [B, H, T], or [B, H, T, K]."""
    share = value.shape[1] // query.shape[1]
    query, key = (jnp.repeat(x, share, axis=1) for x in (query, key))
    before = jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]
    log_decay = log_decay.reshape(*value.shape[:3], -1)

    def body(state: jax.Array, step: Any) -> Any:
        q, k, v, strength, g, goes_on = step
        state = jnp.exp(g)[..., None] * jnp.where(goes_on[:, None, None, None], state, 0)
        error = v - jnp.einsum("bhk,bhkv->bhv", k, state)
        state = state + k[..., :, None] * (strength[..., None] * error)[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q, state)

    moved = [jnp.moveaxis(x, 2, 0).astype(state.dtype) for x in (query, key, value, beta, log_decay)]
    state, out = jax.lax.scan(body, state, (*moved, (segment == before).T))
    return jnp.moveaxis(out, 0, 2), state


def chunk_delta(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    segment: jax.Array,
    chunk: int = CHUNK,
    save_states: bool = False,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`(out [B, H, T, V], state [B, H, K, V])` of query and key [B, G, T, K], value [B, H, T, V], beta and float32
    log_decay [B, H, T] (at most 0, -inf too) and state [B, H, K, V].

    Head h reads query and key h // (H / G). `segment` [B, T] int32 counts the documents of a row: `state` goes on where
    it is 0, and every change starts from zeros. Inputs are bfloat16 or float32, products gather in float32; the output
    has the type of `value`. Where 1 - beta |k|^2 is below -1 the recurrence itself may grow. `save_states` keeps states
    and inverses of all chunks, else the backward pass computes them again. `interpret`: as `pallas_call` takes it.
    Raises ValueError on shapes that do not fit.
    """
    check(FORM.name, query, key, value, beta, log_decay, state, segment, value.shape[:3])
    return run(FORM, chunk, save_states, interpret, query, key, value, beta, log_decay, state, segment)


def vmem_bytes(key_size: int, value_size: int, chunk: int, dtype: Any) -> dict[str, int]:
    """What the forward and the backward kernel hold: blocks twice (one is copied while one is used), temporaries."""
    gates = 2 * 3 * 8 * chunk * 4  # rows of eight sublanes: decays, strengths and documents
    return memory(key_size, value_size, chunk, dtype, gates, gates, 0)


def two(above: Any, below: Any) -> Any:
    return jnp.concatenate([above, below], axis=0)


def _exact(a: Any, b: Any, contract: tuple[int, int], kind: Any) -> Any:
    """A product of float32 matrices: to 16 bits, twice what the inputs have, where those (`kind`) are bfloat16."""
    if kind == jnp.float32:
        return dot(a, b, contract)
    high = [x.astype(kind) for x in (a, b)]
    low = [(x - y.astype(jnp.float32)).astype(kind) for x, y in zip((a, b), high, strict=True)]
    return dot(high[0], high[1], contract) + (dot(high[0], low[1], contract) + dot(low[0], high[1], contract))


def _inverse(lower: Any, kind: Any) -> Any:
    """(I + lower)^-1 of a strictly lower triangular [L, L]."""
    length = lower.shape[0]
    row, column = places(length)

    def across(size: int) -> Any:
        """From the first to the second block of each pair of blocks of `size`."""
        return jnp.where(((row // size) % 2 == 1) & (column // size == row // size - 1), lower, 0)

    found = jnp.where(row == column, 1.0, 0.0) - across(1)
    size = 2
    while size < length:
        found = found - _exact(_exact(found, across(size), (1, 0), kind), found, (1, 0), kind)
        size *= 2
    return found


def forward_kernel(pairs_of: Callable[..., Pairs], *refs: Any) -> None:
    query, key, value, beta, g, documents, first, out, last, *kept, held = refs

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        held[...] = first[...]

    k, v, state = key[...], value[...], held[...]
    kind, length = k.dtype, k.shape[0]
    readers = two(query[...], k)
    pairs = pairs_of(readers, k, g[...], documents[...])
    reads, _, through = belongs(documents[...])
    strength = turned(beta[...])[:, :1]
    read = _selected(reads, dot(_carried(readers, pairs.reach), state.astype(kind), (1, 0)))
    inverse = _inverse(strength * pairs.scores[length:], kind)
    for ref, x in zip(kept, (state, inverse), strict=False):
        ref[...] = x
    wrote = _exact(inverse, strength * (v - read[length:]), (1, 0), kind).astype(kind)
    out[...] = (dot(pairs.scores[:length].astype(kind), wrote, (1, 0)) + read[:length]).astype(out.dtype)
    state = jnp.where(through, pairs.kept * state, 0) + dot((pairs.rest * k).astype(kind), wrote, (0, 0))
    held[...] = state
    last[...] = state


def _carried(readers: Any, reach: Any) -> Any:
    length = reach.shape[0]
    return two(reach * readers[:length], reach * readers[length:]).astype(readers.dtype)


def _selected(chosen: Any, x: Any) -> Any:
    """Of two readers a step, one above the other, those of the chosen steps [L, 1]; 0 of others."""
    length = chosen.shape[0]
    return two(jnp.where(chosen, x[:length], 0), jnp.where(chosen, x[length:], 0))


def backward_kernel(pairs_of: Callable[..., Pairs], *refs: Any) -> None:
    query, key, value, beta, g, documents, before, solved, d_out, d_last, *gradients, held = refs
    dq, dk, dv, d_beta, dg, d_first = gradients

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        held[...] = d_last[...]

    k, v, state, inverse, do, after = key[...], value[...], before[...], solved[...], d_out[...], held[...]
    kind, length = k.dtype, k.shape[0]
    readers = two(query[...], k)
    pairs = pairs_of(readers, k, g[...], documents[...])
    reads, writes, through = belongs(documents[...])
    strength = turned(beta[...])[:, :1]
    carried, narrow, narrow_after = _carried(readers, pairs.reach), state.astype(kind), after.astype(kind)
    scores, rest = pairs.scores.astype(kind), pairs.rest
    error = v - jnp.where(reads, dot(carried[length:], narrow, (1, 0)), 0)
    wrote = _exact(inverse, strength * error, (1, 0), kind).astype(kind)
    error = error - dot(scores[length:], wrote, (1, 0))
    d_wrote = jnp.where(writes, dot((rest * k).astype(kind), narrow_after, (1, 0)), 0)
    d_wrote = d_wrote + dot(scores[:length], do, (0, 0))
    d_error = _exact(inverse, d_wrote, (0, 0), kind)
    d_value = strength * d_error
    dv[...] = d_value.astype(dv.dtype)
    d_beta[...] = turned(jnp.sum(d_error * error, axis=1, keepdims=True))[:1]
    d_read = two(do, -d_value.astype(kind))
    own, own_k = pairs.pull(dot(d_read, wrote, (1, 1)))
    from_state = _selected(reads, dot(d_read, narrow, (1, 1)))
    own_q = own[:length] + pairs.reach * from_state[:length]
    own_r = own[length:] + pairs.reach * from_state[length:]
    to_state = jnp.where(writes, rest * dot(wrote, narrow_after, (1, 1)), 0)
    own_k = own_k + to_state
    dq[...] = own_q
    dk[...] = own_r + own_k
    wide = readers.astype(jnp.float32)
    each = wide[:length] * own_q + wide[length:] * (own_r - own_k)
    dg[...] = pairs.d_gates(each, wide[length:] * to_state, jnp.where(through, pairs.kept * state * after, 0))
    first = dot(carried, _selected(reads, d_read), (0, 0)) + jnp.where(through, pairs.kept * after, 0)
    held[...] = first
    d_first[...] = first


def form_of(name: str, pairs_of: Callable[..., Pairs]) -> Form:
    return Form(name, functools.partial(forward_kernel, pairs_of), functools.partial(backward_kernel, pairs_of))


def _pairs(readers: Any, k: Any, g: Any, documents: Any) -> Pairs:
    decay, carried, weight, kept = chunk_decays(g, documents)
    row, column = places(k.shape[0])
    both = two(decay, jnp.where(row > column, decay, 0))

    def pull(d_scores: Any) -> tuple[Any, Any]:
        masked = (both * d_scores).astype(k.dtype)
        return dot(masked, k, (1, 0)), dot(masked, readers, (0, 0))

    return Pairs(both * dot(readers, k, (1, 1)), carried, weight, kept, pull, _d_gates)


def _d_gates(each: Any, to_state: Any, flowing: Any) -> Any:
    each = jnp.sum(each, axis=1, keepdims=True)
    row, column = places(each.shape[0])
    total = jnp.sum(to_state, keepdims=True) + jnp.sum(flowing, keepdims=True)
    return jnp.sum(jnp.where(row >= column, each, 0), axis=0, keepdims=True) + total


FORM = form_of("chunk_delta", _pairs)
