"""`chunk_delta_keys`: S = Diag(exp(g_t)) S_{t-1}, S_t = S + beta_t k_t (v_t - S^T k_t)^T, read as o_t = q_t^T S_t: the
delta rule with a decay per key (KDA, 2510.26692).

A chunk is solved as in `chunk_delta`; what differs is that P and C have decays inside of their sums over keys, which
`chunk_outer_keys` pairs in blocks of 1, 2, 4 .. L / 2 steps so that no exponent is above 0. Queries and keys read over
the same decays, so every level has one product for both, and two more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.chunks import CHUNK, dot, lanes, places, sums_to_end, turned
from kernels_pallas.delta import Pairs, form_of, two
from kernels_pallas.delta_run import check, memory, run
from kernels_pallas.outer_keys import diagonal, gates


def chunk_delta_keys(
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
    """`chunk_delta` with log_decay [B, H, T, K], bfloat16 or float32, in chunks of a power of two."""
    decays = (*value.shape[:3], query.shape[3])
    check(FORM.name, query, key, value, beta, log_decay, state, segment, decays)
    return run(FORM, chunk, save_states, interpret, query, key, value, beta, log_decay, state, segment)


def vmem_bytes(key_size: int, value_size: int, chunk: int, dtype: Any) -> dict[str, int]:
    """What the forward and the backward kernel hold: blocks twice (one is copied while one is used), temporaries."""
    keys, rows = 4 * chunk * lanes(key_size), 2 * 8 * chunk * 4
    levels = 1 if jnp.dtype(dtype) == jnp.float32 else chunk.bit_length() - 1
    return memory(key_size, value_size, chunk, dtype, keys + rows, keys + rows, (3 * levels + 7) * keys)


def _over_levels(g: Any, one: Any, kind: Any, carry: Any, visit: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """The levels of `outer_keys`: `(carry, R, E)` of `carry = visit(exp(R), exp(E), mask, carry)` at each of them.

    Exact products of float32 take a multiple of their operands, of which a loop holds one level's at a time; bfloat16's
    levels stand one after the other, for the compiler to overlap them. Raises ValueError unless L is a power of two.
    """
    length = g.shape[0]
    if length & (length - 1):
        raise ValueError(f"decays per key pair the steps of a chunk: a power of two of them, not {length}")
    row, column = places(length)
    step = jax.lax.broadcasted_iota(jnp.int32, g.shape, 0)

    def body(level: Any, carried: Any) -> Any:
        reach, rest, total, carry = carried
        size = jnp.left_shift(1, level)
        odd = lambda x: jnp.bitwise_and(jnp.right_shift(x, level), 1) == 1
        mask = one & odd(row) & (jnp.right_shift(column, level) == jnp.right_shift(row, level) - 1)
        carry = visit(jnp.exp(reach), jnp.exp(rest), mask, carry)
        second = odd(step)
        earlier, later = pltpu.roll(total, size, 0), pltpu.roll(total, length - size, 0)
        reach = reach + jnp.where(second, earlier, 0)
        rest = rest + jnp.where(second, 0, later)
        total = total + jnp.where(second, earlier, later)
        return reach, rest, total, carry

    last = length.bit_length() - 1
    reach, rest, _, carry = jax.lax.fori_loop(
        0, last, body, (g, jnp.zeros_like(g), g, carry), unroll=kind != jnp.float32
    )
    return carry, reach, rest


def _pairs(readers: Any, k: Any, g: Any, documents: Any) -> Pairs:
    kind, length = k.dtype, k.shape[0]
    g, one, carried, ends, _ = gates(g, documents)
    wide, wide_k = readers.astype(jnp.float32), k.astype(jnp.float32)

    def late(reach: Any) -> Any:
        return two(reach * wide[:length], reach * wide[length:]).astype(kind)

    def masked(mask: Any, scores: Any) -> Any:
        return two(jnp.where(mask, scores[:length], 0), jnp.where(mask, scores[length:], 0))

    def score(from_start: Any, to_end: Any, mask: Any, scores: Any) -> Any:
        return scores + masked(mask, dot(late(from_start), (to_end * wide_k).astype(kind), (1, 1)))

    def pull(d_scores: Any) -> tuple[Any, Any]:
        row, column = places(length)
        own = jnp.sum(jnp.where(row == column, d_scores[:length], 0), axis=1, keepdims=True)

        def visit(from_start: Any, to_end: Any, mask: Any, carry: Any) -> Any:
            d_readers, d_k = carry
            part = masked(mask, d_scores).astype(kind)
            read = dot(part, (to_end * wide_k).astype(kind), (1, 0))
            d_readers = d_readers + two(from_start * read[:length], from_start * read[length:])
            return d_readers, d_k + to_end * dot(part, late(from_start), (0, 0))

        first = two(own * wide_k, jnp.zeros_like(wide_k)), own * wide[:length]
        return _over_levels(g, one, kind, first, visit)[0]

    own = diagonal(jnp.sum(wide[:length] * wide_k, axis=1, keepdims=True))
    own = two(own, jnp.zeros_like(own))  # a query reads what its own step writes, a key does not
    scores, reach, rest = _over_levels(g, one, kind, own, score)
    reach, rest = jnp.exp(reach), jnp.exp(rest)
    kept = turned(reach[-1:])[:, :1]
    return Pairs(scores, jnp.where(carried, reach, 0), jnp.where(ends, rest, 0), kept, pull, _d_gates)


def _d_gates(each: Any, to_state: Any, flowing: Any) -> Any:
    flowing = turned(jnp.sum(flowing, axis=1, keepdims=True))[:1]
    return sums_to_end(each) + jnp.sum(to_state, axis=0, keepdims=True) + flowing


FORM = form_of("chunk_delta_keys", _pairs)
