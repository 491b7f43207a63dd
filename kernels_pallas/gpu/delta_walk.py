"""The two walks of `chunk_delta` over the chunks of heads: forward, and backward through the writes and the states.

A program (head, block of 64 columns of V and S, row) keeps its columns of the state, or of its gradient, in registers,
in float32, and goes from the first chunk to the last, or back. With S what it has before a chunk and X the chunk's
inverse, forward:

    P = Q K^T * M                      beside K S, while the gates become M
    E = X (V - a * (K S))              X and what it multiplies are split in two (`delta_solve.split`)
    O = P U + a * (Q S)                U = beta * E
    S' = b S + K^T (w * U)

and backward, with S the gradient of the state after the chunk:

    P^T = K Q^T * M^T
    Y = X^T (P^T dO + w * (K S))
    dV = beta * Y, dbeta = y . e
    S' = b S + Q^T (a * dO) - K^T (a * dV)

Queries, keys and gates of the chunk after the next are asked for as soon as their place is free; inverses and values of
the next one, which have one place, when this chunk has read them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu.common import (
    BLOCK,
    CHUNK,
    DOWN,
    STAGES,
    accumulator,
    by_rows,
    numbers,
    read,
    scaled,
    tile,
)
from kernels_pallas.gpu.delta_program import Program, launch_walk
from kernels_pallas.gpu.delta_solve import BETA
from kernels_pallas.gpu.walk import CARRIED, WEIGHT


def walk(
    interpret: Any,
    query: Any,
    key: Any,
    given: Any,
    gates: Any,
    solved: Any,
    first: Any,
    *,
    errors: Any = None,
    keep: bool = False,
) -> dict[str, jax.Array]:
    """The outputs of a walk, by name; backward where `errors` are given.

    query and key are [B, T, G, K]; T = 64 N. Forward, `given` are values [B, T, H, V] and first the state [B, H, K, V]:
    `out`, `last` (float32), and with `keep` also `kept_errors` E and `states` [B, H, N, K, V] before each chunk.
    Backward, they are the gradients of `out` and `last`: `out` is that of values, `last` that of the first state,
    `strength` [B, H, V/64, N, 64] sums to that of beta, and `states` are those of the states after each chunk.
    """
    inputs = {"query": query, "key": key, "given": given, "gates": gates, "solved": solved}
    program = Forward if errors is None else Backward
    scratch = scratch_of(query.shape[3], backward=program.backward, keep=keep)
    return launch_walk(program, "chunk_delta", interpret, inputs, first, scratch, errors=errors, keep=keep)


def scratch_of(size: int, *, backward: bool, keep: bool) -> dict[str, Any]:
    """What a program keeps in shared memory, for states of `size` rows."""
    scratch = {
        "queries": tile(STAGES, CHUNK, size),
        "keys": tile(STAGES, CHUNK, size),
        "gs": numbers(STAGES, BETA + 1, CHUNK),
        "values": tile(CHUNK, BLOCK),
        "inverse": tile(2, CHUNK, CHUNK),
        "held": tile(size, BLOCK),  # the state
        "work": tile(CHUNK, CHUNK),  # the scores, then the output
        "pair": tile(2, CHUNK, BLOCK),  # what the inverse multiplies, then what makes the output and the next state
        "arrived": plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        "late_arrived": plgpu.Barrier(num_arrivals=3 if backward else 2),
    }
    if backward or keep:
        scratch["errs"] = tile(CHUNK, BLOCK)
    if backward:
        scratch["row_sums"] = numbers(CHUNK)
    return scratch


class Forward(Program):
    """The walk that makes outputs and states."""

    def step(self, n: Any, state: Any) -> Any:
        refs, slot = self.refs, lax.rem(n, STAGES)
        q, k, g = refs.queries.at[slot], refs.keys.at[slot], refs.gs.at[slot]
        wide = lambda i: by_rows(read(g.at[i], DOWN), BLOCK)
        plgpu.barrier_wait(refs.arrived.at[slot])
        early = self.score(n, g, q, k, k)
        (carried,) = early or [pl.run_scoped(lambda total: _product(total, k, refs.held), accumulator(CHUNK, BLOCK))]
        plgpu.barrier_wait(refs.late_arrived)
        errors = self.solve(read(refs.values) - scaled(wide(CARRIED), carried), False)
        if hasattr(refs, "errs"):
            refs.errs[...] = errors.astype(jnp.bfloat16)
        wrote = wide(BETA) * errors
        self.write(n, wrote, wide(WEIGHT) * wrote)
        if hasattr(refs, "errs"):
            plgpu.copy_smem_to_gmem(refs.errs, self.steps(n, refs.kept_errors).at[:, self.columns])

        def second(own: Any, carried: Any) -> Any:
            plgpu.wgmma(own, refs.work, refs.pair.at[0])
            plgpu.wgmma(carried, q, refs.held)
            return own[...], carried[...]

        own, carried = pl.run_scoped(second, *[accumulator(CHUNK, BLOCK)] * 2)
        out = scaled(wide(CARRIED), carried) + own
        state = self.update(state, self.kept(slot), (k, refs.pair.at[1]))
        self.put(n, slot, out, state)
        return state


class Backward(Program):
    """The walk that makes the gradients of values, strengths and states."""

    backward = True

    def step(self, n: Any, state: Any) -> Any:
        refs, slot = self.refs, lax.rem(n, STAGES)
        q, k, g = refs.queries.at[slot], refs.keys.at[slot], refs.gs.at[slot]
        wide = lambda i: by_rows(read(g.at[i], DOWN), BLOCK)
        plgpu.barrier_wait(refs.arrived.at[slot])
        early = self.score(n, g, k, q, k)
        plgpu.barrier_wait(refs.late_arrived)

        def second(own: Any, *sums: Any) -> Any:
            plgpu.wgmma(own, refs.work, refs.values)
            for carried in sums:
                plgpu.wgmma(carried, k, refs.held)
            return own[...], *(carried[...] for carried in sums)

        one = accumulator(CHUNK, BLOCK)
        own, *late = pl.run_scoped(second, one, *([] if early else [one]))
        (carried,) = early + late
        solved = self.solve(own + scaled(wide(WEIGHT), carried), True)
        refs.row_sums[...] = jnp.sum(solved * read(refs.errs), axis=1)
        d_values = wide(BETA) * solved
        self.write(n, wide(CARRIED) * read(refs.values), -wide(CARRIED) * d_values)
        strength = refs.strength.at[self.row, self.head, self.block, self.at(n)]
        plgpu.copy_smem_to_gmem(refs.row_sums, strength)
        state = self.update(state, self.kept(slot), (q, refs.pair.at[0]), (k, refs.pair.at[1]))
        self.put(n, slot, d_values, state)
        return state


def _product(total: Any, left: Any, right: Any) -> Any:
    plgpu.wgmma(total, left, right)
    return total[...]
