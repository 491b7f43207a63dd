"""What a chunk of `chunk_outer_keys` needs without the states of other chunks: scores, weighted keys, gradients.

Steps are paired in blocks of 1, 2, 4 .. 32. At a level, a step of the later block of a pair has the sum R of its decays
from its block's start, one of the earlier block the sum E to its block's end: never both. So a level has one array

    W = exp(D (high + low)) * (late ? Q : K)        D 0 or 1: the steps that R or E sums; log decays in two bfloat16

with one exponential an entry, and all it has to do is a product with W: W W^T has the scores late by early, and
(dP W)_i, dP symmetric, is the query's part where i is late, else the key's. Sums of decays are products too, of exact
factors, added up in float32: nothing is taken away from them, and no array but W is written.

With a bonus u queries lag one step behind keys: R leaves a step's own decay out, and the diagonal of the scores is
q_i . (u * k_i). The decay that ends what came before a document is its first step's own, so that step's query is taken
as 0 where it reads others; `outer_keys.gates_of` marks it by a decay that no other step has.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu.common import (
    ALONG,
    BLOCK,
    CHUNK,
    LOWEST,
    accumulator,
    by_columns,
    by_rows,
    launch,
    numbers,
    places,
    read,
    tile,
    turned,
)
from kernels_pallas.gpu.levels import LEVELS, late, paired, span_of, steps_of, sums_over, write_parts, write_span

WIDE = 128  # columns of keys that are weighed at once


def weighed(interpret: Any, query: Any, key: Any, high: Any, low: Any, *bonus: Any) -> tuple[jax.Array, ...]:
    """Of queries and keys [B, T, G, K] and log decays [B, T, H, K], T = N * CHUNK, in bfloat16, a bonus [H, K] in
    float32: the scores [B, H, N, CHUNK, CHUNK], queries decayed from their chunk's start, keys to its end [B, T, H, K].
    """
    batch, length, heads, size = high.shape
    chunks = length // CHUNK
    wide = jax.ShapeDtypeStruct(high.shape, jnp.bfloat16)
    outputs = [jax.ShapeDtypeStruct((batch, heads, chunks, CHUNK, CHUNK), jnp.bfloat16), wide, wide]
    lag = len(bonus)
    scratch = scratch_of_weighed(size, lag)
    names = ["far_query", "far_key", "far_high", "far_low", *["far_bonus"][:lag], "scores", "late", "early", *scratch]

    def kernel(*refs: Any) -> None:
        _weigh(SimpleNamespace(lag=lag, **dict(zip(names, refs, strict=True))), heads)

    grid = {"head": heads, "chunk": chunks, "row": batch}
    run = launch(kernel, "chunk_outer_keys_weighed", grid, outputs, list(scratch.values()), interpret)
    return run(query, key, high, low, *bonus)


def scratch_of_weighed(size: int, lag: int) -> dict[str, Any]:
    inputs = {name: tile(CHUNK, size) for name in ("query", "key", "high", "low")}
    inputs |= {"bonus": numbers(size)} if lag else {}
    work = tile(CHUNK, min(size, WIDE))
    return {**inputs, "span": tile(CHUNK, CHUNK), "work": work, "arrived": plgpu.Barrier(num_arrivals=len(inputs))}


def _weigh(refs: Any, heads: int) -> None:
    row, head, chunk = (lax.axis_index(name) for name in ("row", "head", "chunk"))
    steps = steps_of(row, head, chunk, heads)
    for name in ("query", "key", "high", "low"):
        plgpu.copy_gmem_to_smem(steps(getattr(refs, f"far_{name}")), getattr(refs, name), refs.arrived)
    if refs.lag:
        plgpu.copy_gmem_to_smem(refs.far_bonus.at[head], refs.bonus, refs.arrived)
    plgpu.barrier_wait(refs.arrived)
    width = refs.work.shape[1]
    blocks = [pl.ds(i, width) for i in range(0, refs.query.shape[1], width)]
    down, along = places()

    def product(sums: Any) -> Any:
        plgpu.wgmma(sums, refs.work, turned(refs.work))
        return sums[...]

    own = sum(read(refs.query.at[:, b]) * read(refs.key.at[:, b]) * _bonus(refs, b) for b in blocks)
    scores = jnp.where(down == along, by_rows(jnp.sum(own, axis=1), CHUNK), 0.0)
    for size in LEVELS:
        write_span(refs, span_of(size, refs.lag))
        added = 0.0
        for block in blocks:
            _write_level(refs, size, block)
            added = added + pl.run_scoped(product, accumulator(CHUNK, CHUNK))
        scores = jnp.where(paired(size) & (down > along), added, scores)
    for reached, near, far in ((down - along >= refs.lag, refs.query, refs.late), (down < along, refs.key, refs.early)):
        write_span(refs, reached)
        for block in blocks:
            values = jnp.exp(sums_over(refs, block)) * read(near.at[:, block])
            values = _of_others(refs, block, values) if near is refs.query else values
            near[:, block] = values.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(near, steps(far))
    write_span(refs, down >= along, scores)
    plgpu.copy_smem_to_gmem(refs.span, refs.scores.at[row, head, chunk])
    plgpu.wait_smem_to_gmem(0)


def _bonus(refs: Any, block: Any) -> Any:
    """What a step's own pair is weighed by, key by key."""
    return by_columns(read(refs.bonus.at[block], ALONG), CHUNK) if refs.lag else 1.0


def _of_others(refs: Any, block: Any, values: Any) -> Any:
    """Queries or their gradients, as far as they have to do with other steps than their own."""
    return jnp.where(read(refs.high.at[:, block]) < LOWEST, 0.0, values) if refs.lag else values


def _write_level(refs: Any, size: int, block: Any) -> Any:
    """Writes W of a level; returns the exponentials."""
    decay = jnp.exp(sums_over(refs, block))
    query = _of_others(refs, block, read(refs.query.at[:, block]))
    values = jnp.where(late(size, block.size), query, read(refs.key.at[:, block]))
    refs.work[...] = (decay * values).astype(jnp.bfloat16)
    plgpu.commit_smem()
    return decay


def gradients(
    interpret: Any,
    query: Any,
    key: Any,
    value: Any,
    d_out: Any,
    high: Any,
    low: Any,
    states: Any,
    after: Any,
    kept: Any,
    *bonus: Any,
) -> tuple[jax.Array, ...]:
    """The gradients of queries and keys, in bfloat16, and of log decays, in float32, each [B, T, H, K]; that of a bonus
    from each chunk, [B, H, N, K].

    query .. low are as in `weighed`, value and d_out [B, T, G, V]; states and after, [B, H, N, K, V] in bfloat16, are
    the states before the chunks and the gradients of those after them; kept [B, H, N, K] is the decay over a chunk.
    """
    batch, length, heads, size = high.shape
    outputs = [jax.ShapeDtypeStruct(high.shape, kind) for kind in (jnp.bfloat16, jnp.bfloat16, jnp.float32)]
    outputs += [jax.ShapeDtypeStruct(kept.shape, jnp.float32) for _ in bonus]
    lag = len(bonus)
    scratch = scratch_of_gradients(value.shape[3], lag)
    given = ("query", "key", "high", "low", "value", "d_out", "states", "after", "kept", *["bonus"][:lag])
    names = [*(f"far_{name}" for name in given), "d_query", "d_key", "d_decay", *["d_bonus"][:lag], *scratch]

    def kernel(*refs: Any) -> None:
        _differentiate(SimpleNamespace(lag=lag, **dict(zip(names, refs, strict=True))), heads)

    grid = {"head": heads, "part": length // CHUNK * (size // BLOCK), "row": batch}
    run = launch(kernel, "chunk_outer_keys_gradients", grid, outputs, list(scratch.values()), interpret)
    return run(query, key, high, low, value, d_out, states, after, kept, *bonus)


def scratch_of_gradients(width: int, lag: int) -> dict[str, Any]:
    inputs = {name: tile(CHUNK, BLOCK) for name in ("query", "key", "high", "low")}
    inputs |= {name: tile(CHUNK, width) for name in ("value", "d_out")}
    inputs |= {name: tile(BLOCK, width) for name in ("states", "after")}
    inputs |= {name: numbers(BLOCK) for name in ("kept", *["bonus"][:lag])}
    return {**inputs, "flow": numbers(BLOCK), "arrived": plgpu.Barrier(num_arrivals=len(inputs))}


def _differentiate(refs: Any, heads: int) -> None:
    """Gradients of a block of columns of keys: first all products over values, whose tiles then are room to work in."""
    row, head, part = (lax.axis_index(name) for name in ("row", "head", "part"))
    count = refs.d_query.shape[3] // BLOCK
    chunk, block = lax.div(part, count), lax.rem(part, count) * BLOCK
    columns = pl.ds(block, BLOCK)
    steps = steps_of(row, head, chunk, heads)
    bring = lambda name, source: plgpu.copy_gmem_to_smem(source, getattr(refs, name), refs.arrived)
    for name in ("query", "key", "high", "low"):
        bring(name, steps(getattr(refs, f"far_{name}")).at[:, columns])
    for name in ("value", "d_out"):
        bring(name, steps(getattr(refs, f"far_{name}")))
    for name in ("states", "after", "kept"):
        bring(name, getattr(refs, f"far_{name}").at[row, head, chunk, columns])
    if refs.lag:
        bring("bonus", refs.far_bonus.at[head, columns])
    plgpu.barrier_wait(refs.arrived)
    down, along = places()
    whole = pl.ds(0, BLOCK)

    def over_values(of_query: Any, of_key: Any, scores: Any, mirrored: Any) -> Any:
        plgpu.wgmma(of_query, refs.d_out, turned(refs.states))
        plgpu.wgmma(of_key, refs.value, turned(refs.after))
        plgpu.wgmma(scores, refs.d_out, turned(refs.value))
        plgpu.wgmma(mirrored, refs.value, turned(refs.d_out))
        return of_query[...], of_key[...], scores[...], mirrored[...]

    pieces = [pl.ds(i, BLOCK) for i in range(0, refs.value.shape[1], BLOCK)]
    flow = sum(read(refs.states.at[:, piece]) * read(refs.after.at[:, piece]) for piece in pieces)
    refs.flow[...] = jnp.sum(flow, axis=1)
    of_query, of_key, scores, mirrored = pl.run_scoped(over_values, *[accumulator(CHUNK, BLOCK)] * 4)
    own = by_rows(jnp.sum(jnp.where(down == along, scores, 0.0), axis=1), BLOCK)
    scores = jnp.where(down > along, scores, mirrored)

    refs = SimpleNamespace(**vars(refs), span=refs.d_out.at[:, whole], work=refs.value.at[:, whole])
    write_span(refs, down - along >= refs.lag)
    of_query = jnp.exp(sums_over(refs, whole)) * of_query
    write_span(refs, down < along)
    of_key = jnp.exp(sums_over(refs, whole)) * of_key
    to_state = [x.at[:, whole] for x in (refs.states, refs.after)]
    write_parts(to_state, of_key * read(refs.key))

    def product(sums: Any) -> Any:
        plgpu.wgmma(sums, refs.span, refs.work)
        return sums[...]

    for size in LEVELS:
        write_span(refs, span_of(size, refs.lag))
        decay = _write_level(refs, size, whole)
        write_span(refs, paired(size), scores)
        added = decay * pl.run_scoped(product, accumulator(CHUNK, BLOCK))
        of_query = of_query + jnp.where(late(size), added, 0.0)
        of_key = of_key + jnp.where(late(size), 0.0, added)
    of_query = _of_others(refs, whole, of_query)

    # Of g_m: what is between steps of the chunk and what comes in, from m on; what goes on to the next, before m.
    within = read(refs.query) * of_query - read(refs.key) * of_key + read(to_state[0]) + read(to_state[1])
    write_parts([refs.high, refs.low], within)
    write_span(refs, down <= along)
    sums = by_columns(read(refs.kept, ALONG) * read(refs.flow, ALONG), CHUNK) + sums_over(refs, whole)
    write_span(refs, down > along)
    refs.high, refs.low = to_state
    sums = sums + sums_over(refs, whole)
    query, key = read(refs.query), read(refs.key)
    if refs.lag:  # what queries read is after m, not from m on
        sums = sums - query * of_query
        refs.d_bonus.at[row, head, chunk, columns][...] = jnp.sum(own * query * key, axis=0)
    steps(refs.d_decay).at[:, columns][...] = sums
    own = own * _bonus(refs, whole)
    for name, values in (("query", of_query + own * key), ("key", of_key + own * query)):
        getattr(refs, name)[...] = values.astype(jnp.bfloat16)
    plgpu.commit_smem()
    for name in ("query", "key"):
        plgpu.copy_smem_to_gmem(getattr(refs, name), steps(getattr(refs, f"d_{name}")).at[:, columns])
    plgpu.wait_smem_to_gmem(0)
