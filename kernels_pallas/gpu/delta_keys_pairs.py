"""What a chunk of `chunk_delta_keys` needs without the states of other chunks: scores and weighted keys; and the
gradients of queries, keys and gates, once the walks have kept the states S before each chunk, the gradients dS' of
those after it, the errors E and the gradients dV of values.

Steps are paired as in `pairs.py`. Keys are read by queries and by later keys, over the same decays: a level has one
exponential an entry, and two arrays, exp(..) Q and exp(..) K, the late rows of either times the early rows of the
second being scores. In the backward pass, with U = beta * E and both made symmetric,

    dP = dO U^T,  dA = -dV U^T                (dP W)_i, W of late queries and early keys, is of a query, or of a key
                                              (dA exp(..) K)_i is of a key that reads where i is late, else of one read
    dQ = .. + a * (dO S^T)
    dR = .. - a * (dV S^T)
    dW = .. + w * (U dS'^T),  dK = dR + dW    a from the chunk's start to a step, w from there to its end
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
    DOWN,
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

WEIGHED = ("query", "key", "high", "low")


def weighed(interpret: Any, *inputs: Any) -> dict[str, jax.Array]:
    """Of queries and keys [B, T, G, K] and log decays [B, T, H, K], high and low, T = N * CHUNK, in bfloat16, by name:
    `scores` P [B, H, N, CHUNK, CHUNK], those of keys, `mutual`, in float32; `late_query` and `late_key`, decayed from
    their chunk's start, and `early_key`, to its end, [B, T, H, K].
    """
    high = inputs[2]
    batch, length, heads, size = high.shape
    chunks = length // CHUNK
    square = (batch, heads, chunks, CHUNK, CHUNK)
    wide = jax.ShapeDtypeStruct(high.shape, jnp.bfloat16)
    kinds = {"scores": jnp.bfloat16, "mutual": jnp.float32}
    outputs = {name: jax.ShapeDtypeStruct(square, kind) for name, kind in kinds.items()}
    outputs |= dict.fromkeys(("late_query", "late_key", "early_key"), wide)
    scratch = scratch_of_weighed(size)
    names = [*(f"far_{name}" for name in WEIGHED), *outputs, *scratch]

    def kernel(*refs: Any) -> None:
        _weigh(SimpleNamespace(**dict(zip(names, refs, strict=True))), heads)

    grid = {"head": heads, "chunk": chunks, "row": batch}
    run = launch(kernel, "chunk_delta_keys_weighed", grid, list(outputs.values()), list(scratch.values()), interpret)
    return dict(zip(outputs, run(*inputs), strict=True))


def scratch_of_weighed(size: int) -> dict[str, Any]:
    """What a program keeps in shared memory, for keys of `size`; of 256, registers have room for a block at a time."""
    inputs = {name: tile(CHUNK, size) for name in WEIGHED}
    work = tile(2, CHUNK, size if size <= 128 else BLOCK)  # queries and keys of a level
    return {**inputs, "span": tile(CHUNK, CHUNK), "work": work, "arrived": plgpu.Barrier(num_arrivals=4)}


def _weigh(refs: Any, heads: int) -> None:
    row, head, chunk = (lax.axis_index(name) for name in ("row", "head", "chunk"))
    steps = steps_of(row, head, chunk, heads)
    for name in WEIGHED:
        plgpu.copy_gmem_to_smem(steps(getattr(refs, f"far_{name}")), getattr(refs, name), refs.arrived)
    plgpu.barrier_wait(refs.arrived)
    width = refs.work.shape[2]
    blocks = [pl.ds(i, width) for i in range(0, refs.query.shape[1], width)]
    down, along = places()

    def products(*sums: Any) -> Any:
        for i, total in enumerate(sums):
            plgpu.wgmma(total, refs.work.at[i], turned(refs.work.at[1]))
        return [total[...] for total in sums]

    def write(block: Any, *names: str) -> None:
        """Writes the named arrays, decayed over the span."""
        decay = jnp.exp(sums_over(refs, block))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, name in enumerate(names):
            refs.work[i] = (decay * read(getattr(refs, name).at[:, block])).astype(jnp.bfloat16)
        plgpu.commit_smem()

    own: Any = sum(read(refs.query.at[:, b]) * read(refs.key.at[:, b]) for b in blocks)
    scores = jnp.where(down == along, by_rows(jnp.sum(own, axis=1), CHUNK), 0.0)
    mutual: Any = 0.0
    for size in LEVELS:
        write_span(refs, span_of(size, 0))
        read_by: Any = (0.0, 0.0)
        for block in blocks:
            write(block, "query", "key")
            found = pl.run_scoped(products, *[accumulator(CHUNK, CHUNK)] * 2)
            read_by = [total + more for total, more in zip(read_by, found, strict=True)]
        met = paired(size) & (down > along)
        scores, mutual = (jnp.where(met, new, old) for new, old in zip(read_by, (scores, mutual), strict=True))
    for reached, when, names in ((down >= along, "late", ("query", "key")), (down < along, "early", ("key",))):
        write_span(refs, reached)
        for block in blocks:
            write(block, *names)
            for i, name in enumerate(names):
                plgpu.copy_smem_to_gmem(refs.work.at[i], steps(getattr(refs, f"{when}_{name}")).at[:, block])
    refs.mutual.at[row, head, chunk][...] = mutual
    refs.span[...] = scores.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs.span, refs.scores.at[row, head, chunk])
    plgpu.wait_smem_to_gmem(0)


def gradients(interpret: Any, **inputs: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of queries and keys, in bfloat16, and of log decays, in float32, each [B, T, H, K].

    By name: query, key, high and low as in `weighed`; d_out, d_value and errors [B, T, H, V]; states and after,
    [B, H, N, K, V] in bfloat16, the states before the chunks and the gradients of those after them; kept [B, H, N, K],
    the decay over a chunk, and beta [B, H, N, CHUNK].
    """
    batch, length, heads, size = inputs["high"].shape
    kinds = {"d_query": jnp.bfloat16, "d_key": jnp.bfloat16, "d_decay": jnp.float32}
    outputs = [jax.ShapeDtypeStruct((batch, length, heads, size), kind) for kind in kinds.values()]
    scratch = scratch_of_gradients(inputs["d_out"].shape[3])
    names = [*(f"far_{name}" for name in inputs), *kinds, *scratch]

    def kernel(*refs: Any) -> None:
        _differentiate(SimpleNamespace(**dict(zip(names, refs, strict=True))), heads)

    grid = {"head": heads, "part": length // CHUNK * (size // BLOCK), "row": batch}
    run = launch(kernel, "chunk_delta_keys_gradients", grid, outputs, list(scratch.values()), interpret)
    return run(*inputs.values())


def scratch_of_gradients(width: int) -> dict[str, Any]:
    """What a program keeps in shared memory, for values of `width`."""
    inputs = {name: tile(CHUNK, BLOCK) for name in WEIGHED}
    inputs |= {name: tile(CHUNK, width) for name in ("d_out", "d_value", "errors")}
    inputs |= {name: tile(BLOCK, width) for name in ("states", "after")}
    inputs |= {"kept": numbers(BLOCK), "beta": numbers(CHUNK)}
    work = {"scores": tile(2, CHUNK, CHUNK), "parts": tile(CHUNK, CHUNK), "flow": numbers(BLOCK)}
    return {**inputs, **work, "arrived": plgpu.Barrier(num_arrivals=len(inputs))}


def _differentiate(refs: Any, heads: int) -> None:
    """Gradients of a block of columns of keys: first all products over values, whose tiles then are room to work in."""
    row, head, part = (lax.axis_index(name) for name in ("row", "head", "part"))
    count = refs.d_query.shape[3] // BLOCK
    chunk, block = lax.div(part, count), lax.rem(part, count) * BLOCK
    columns, whole = pl.ds(block, BLOCK), pl.ds(0, BLOCK)
    steps = steps_of(row, head, chunk, heads)
    here = lambda x: x.at[row, head, chunk]
    sources = {name: steps(getattr(refs, f"far_{name}")).at[:, columns] for name in WEIGHED}
    sources |= {name: steps(getattr(refs, f"far_{name}")) for name in ("d_out", "d_value", "errors")}
    sources |= {name: here(getattr(refs, f"far_{name}")).at[columns] for name in ("states", "after", "kept")}
    sources |= {"beta": here(refs.far_beta)}
    for name, source in sources.items():
        plgpu.copy_gmem_to_smem(source, getattr(refs, name), refs.arrived)
    plgpu.barrier_wait(refs.arrived)
    down, along = places()

    pieces = [pl.ds(i, BLOCK) for i in range(0, refs.d_out.shape[1], BLOCK)]
    flow: Any = sum(read(refs.states.at[:, piece]) * read(refs.after.at[:, piece]) for piece in pieces)
    refs.flow[...] = jnp.sum(flow, axis=1)
    square = accumulator(CHUNK, CHUNK)
    across, beside = by_columns(read(refs.beta, ALONG), CHUNK), by_rows(read(refs.beta, DOWN), CHUNK)

    def meeting(values: Any) -> Any:
        def products(scores: Any, mirrored: Any) -> Any:
            plgpu.wgmma(scores, values, turned(refs.errors))
            plgpu.wgmma(mirrored, refs.errors, turned(values))
            return across * scores[...], beside * mirrored[...]

        return pl.run_scoped(products, square, square)

    def of_states(of_query: Any, of_reader: Any, of_key: Any) -> Any:
        plgpu.wgmma(of_query, refs.d_out, turned(refs.states))
        plgpu.wgmma(of_reader, refs.d_value, turned(refs.states))
        plgpu.wgmma(of_key, refs.errors, turned(refs.after))
        return of_query[...], -of_reader[...], beside * of_key[...]

    scores, mirrored = meeting(refs.d_out)
    own = by_rows(jnp.sum(jnp.where(down == along, scores, 0.0), axis=1), BLOCK)
    refs.scores[0] = jnp.where(down > along, scores, mirrored).astype(jnp.bfloat16)
    scores, mirrored = meeting(refs.d_value)
    refs.scores[1] = -jnp.where(down > along, scores, mirrored).astype(jnp.bfloat16)
    of_query, of_reader, of_key = pl.run_scoped(of_states, *[square] * 3)

    spare = lambda name: getattr(refs, name).at[:, whole]
    refs = SimpleNamespace(**{**vars(refs), "span": spare("d_out")})
    mixed, keys, to_state = spare("d_value"), spare("errors"), [spare("states"), spare("after")]
    write_span(refs, down >= along)
    decay = jnp.exp(sums_over(refs, whole))
    of_query, of_reader = decay * of_query + own * read(refs.key), decay * of_reader
    write_span(refs, down < along)
    of_key = jnp.exp(sums_over(refs, whole)) * of_key
    write_parts(to_state, of_key * read(refs.key))
    of_key = of_key + own * read(refs.query)

    def products(by_query: Any, by_key: Any) -> Any:
        plgpu.wgmma(by_query, refs.span, mixed)
        plgpu.wgmma(by_key, refs.parts, keys)
        return by_query[...], by_key[...]

    for size in LEVELS:
        write_span(refs, span_of(size, 0))
        decay = jnp.exp(sums_over(refs, whole))
        keys[...] = (decay * read(refs.key)).astype(jnp.bfloat16)
        mixed[...] = (decay * jnp.where(late(size), read(refs.query), read(refs.key))).astype(jnp.bfloat16)
        for i, place in enumerate((refs.span, refs.parts)):
            place[...] = jnp.where(paired(size), read(refs.scores.at[i]), 0.0).astype(jnp.bfloat16)
        plgpu.commit_smem()
        by_query, by_key = (decay * x for x in pl.run_scoped(products, square, square))
        of_query = of_query + jnp.where(late(size), by_query, 0.0)
        of_reader = of_reader + jnp.where(late(size), by_key, 0.0)
        of_key = of_key + jnp.where(late(size), 0.0, by_query + by_key)

    # Of g_m: what is between steps of the chunk and what comes in, from m on; what goes on to the next, before m.
    within = read(refs.query) * of_query + read(refs.key) * (of_reader - of_key)
    write_parts([refs.high, refs.low], within + read(to_state[0]) + read(to_state[1]))
    write_span(refs, down <= along)
    sums = by_columns(read(refs.kept, ALONG) * read(refs.flow, ALONG), CHUNK) + sums_over(refs, whole)
    write_span(refs, down > along)
    refs.high, refs.low = to_state
    sums = sums + sums_over(refs, whole)
    steps(refs.d_decay).at[:, columns][...] = sums
    refs.query[...] = of_query.astype(jnp.bfloat16)
    refs.key[...] = (of_reader + of_key).astype(jnp.bfloat16)
    plgpu.commit_smem()
    for name in ("query", "key"):
        plgpu.copy_smem_to_gmem(getattr(refs, name), steps(getattr(refs, f"d_{name}")).at[:, columns])
    plgpu.wait_smem_to_gmem(0)
