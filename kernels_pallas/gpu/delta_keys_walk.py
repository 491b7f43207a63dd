"""The two walks of `chunk_delta_keys` over the chunks of heads: forward, and backward through writes and states.

As those of `delta_walk.py`, but that scores, and queries and keys with their decays, are given: the walks know no
exponentials. With S what a program has before a chunk and X the chunk's inverse, forward:

    E = X (V - K_late S)               X and what it multiplies are split in two (`delta_solve.split`)
    O = P U + Q_late S                 U = beta * E
    S' = b * S + K_early^T U           b a decay per row

and backward, with S the gradient of the state after the chunk:

    Y = X^T (P^T dO + K_early S)
    dV = beta * Y, dbeta = y . e
    S' = b * S + Q_late^T dO - K_late^T dV

Three arrays as wide as keys have one place each: what a chunk reads first is asked for when the one before has solved
for E or Y, what it reads next when that has written U or dV, and the rest when it is through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu.common import BLOCK, CHUNK, DOWN, accumulator, by_rows, numbers, read, tile, turned
from kernels_pallas.gpu.delta_program import Program, launch_walk


def walk(
    interpret: Any,
    weighed: dict[str, jax.Array],
    given: Any,
    beta: Any,
    kept: Any,
    solved: Any,
    first: Any,
    *,
    errors: Any = None,
    keep: bool = False,
) -> dict[str, jax.Array]:
    """The outputs of a walk, by name; backward where `errors` are given.

    `weighed` are the arrays of `delta_keys_pairs.weighed`, beta [B, H, N, 64] and kept [B, H, N, K] float32; given,
    solved, first and the outputs are those of `delta_walk.walk`.
    """
    inputs = {name: x for name, x in weighed.items() if name != "mutual"}
    inputs |= {"given": given, "beta": beta, "decay": kept, "solved": solved}
    program = Forward if errors is None else Backward
    scratch = scratch_of(kept.shape[3], backward=program.backward, keep=keep)
    return launch_walk(program, "chunk_delta_keys", interpret, inputs, first, scratch, errors=errors, keep=keep)


def scratch_of(size: int, *, backward: bool, keep: bool) -> dict[str, Any]:
    """What a program keeps in shared memory, for states of `size` rows."""
    scratch = {
        "queries": tile(CHUNK, size),
        "keys": tile(CHUNK, size),
        "ends": tile(CHUNK, size),
        "paired": tile(CHUNK, CHUNK),
        "decays": numbers(size),
        "betas": numbers(CHUNK),
        "values": tile(CHUNK, BLOCK),
        "inverse": tile(2, CHUNK, CHUNK),
        "held": tile(size, BLOCK),  # the state
        "work": tile(CHUNK, BLOCK),  # the output
        "pair": tile(2, CHUNK, BLOCK),  # what the inverse multiplies, then what makes the output and the next state
        "early_arrived": plgpu.Barrier(num_arrivals=2 if backward else 1),
        "late_arrived": plgpu.Barrier(num_arrivals=4 if backward else 3),
        "arrived": plgpu.Barrier(num_arrivals=3 if backward else 4),
    }
    if backward or keep:
        scratch["errs"] = tile(CHUNK, BLOCK)
    if backward:
        scratch["row_sums"] = numbers(CHUNK)
    return scratch


class Keys(Program):
    """What both walks do with decays per key. What is read late is what `Program` calls so."""

    ahead = 1

    def run(self) -> None:
        self.bring_early(0)
        super().run()

    def bring_early(self, n: Any) -> None:
        """Asks for what a chunk reads first."""
        refs, arrived = self.refs, self.refs.early_arrived
        if self.backward:
            plgpu.copy_gmem_to_smem(self.steps(n, refs.early_key), refs.ends, arrived)
            self.bring_scores(n, arrived)
        else:
            plgpu.copy_gmem_to_smem(self.steps(n, refs.late_key), refs.keys, arrived)

    def bring_late(self, n: Any) -> None:
        super().bring_late(n)
        plgpu.copy_gmem_to_smem(self.here(n, self.refs.beta), self.refs.betas, self.refs.late_arrived)

    def bring(self, n: Any, slot: Any) -> None:
        refs, arrived = self.refs, self.refs.arrived
        plgpu.copy_gmem_to_smem(self.steps(n, refs.late_query), refs.queries, arrived)
        plgpu.copy_gmem_to_smem(self.here(n, refs.decay), refs.decays, arrived)
        if self.backward:
            plgpu.copy_gmem_to_smem(self.steps(n, refs.late_key), refs.keys, arrived)
        else:
            plgpu.copy_gmem_to_smem(self.steps(n, refs.early_key), refs.ends, arrived)
            self.bring_scores(n, arrived)

    def bring_scores(self, n: Any, arrived: Any) -> None:
        plgpu.copy_gmem_to_smem(self.here(n, self.refs.scores), self.refs.paired, arrived)

    def here(self, n: Any, array: Any) -> Any:
        """The n-th chunk of an array [B, H, N, ..]."""
        return array.at[self.row, self.head, self.at(n)]

    def kept(self, slot: Any) -> Callable[[int], Any]:
        return lambda i: by_rows(read(self.refs.decays.at[self.parts[i]], DOWN), BLOCK)

    def keep(self, n: Any) -> None:
        """Sends the state before the chunk, where it is an output."""
        if hasattr(self.refs, "states"):
            plgpu.copy_smem_to_gmem(self.refs.held, self.here(n, self.refs.states).at[:, self.columns])

    def solve_and_bring(self, n: Any, values: Any) -> Any:
        solved = self.solve(values, self.backward)
        pl.when(n + 1 < self.chunks)(lambda: self.bring_early(n + 1))
        return solved

    def strengths(self) -> Any:
        return by_rows(read(self.refs.betas, DOWN), BLOCK)


class Forward(Keys):
    """The walk that makes outputs and states."""

    def step(self, n: Any, state: Any) -> Any:
        refs = self.refs

        def expected(total: Any) -> Any:
            plgpu.wgmma(total, refs.keys, refs.held)
            return total[...]

        def second(total: Any) -> Any:
            plgpu.wgmma(total, refs.paired, refs.pair.at[0])
            plgpu.wgmma(total, refs.queries, refs.held)
            return total[...]

        one = accumulator(CHUNK, BLOCK)
        self.keep(n)
        plgpu.barrier_wait(refs.early_arrived)
        carried = pl.run_scoped(expected, one)
        plgpu.barrier_wait(refs.late_arrived)
        errors = self.solve_and_bring(n, read(refs.values) - carried)
        if hasattr(refs, "errs"):
            refs.errs[...] = errors.astype(jnp.bfloat16)
        self.write(n, self.strengths() * errors)
        if hasattr(refs, "errs"):
            plgpu.copy_smem_to_gmem(refs.errs, self.steps(n, refs.kept_errors).at[:, self.columns])
        plgpu.barrier_wait(refs.arrived)
        out = pl.run_scoped(second, one)
        state = self.update(state, self.kept(0), (refs.ends, refs.pair.at[0]))
        self.put(n, 0, out, state)
        return state


class Backward(Keys):
    """The walk that makes the gradients of values, strengths and states."""

    backward = True

    def step(self, n: Any, state: Any) -> Any:
        refs = self.refs

        def written(total: Any) -> Any:
            plgpu.wgmma(total, turned(refs.paired), refs.values)
            plgpu.wgmma(total, refs.ends, refs.held)
            return total[...]

        self.keep(n)
        plgpu.barrier_wait(refs.early_arrived)
        plgpu.barrier_wait(refs.late_arrived)
        solved = self.solve_and_bring(n, pl.run_scoped(written, accumulator(CHUNK, BLOCK)))
        refs.row_sums[...] = jnp.sum(solved * read(refs.errs), axis=1)
        d_values = self.strengths() * solved
        self.write(n, read(refs.values), -d_values)
        strength = refs.strength.at[self.row, self.head, self.block, self.at(n)]
        plgpu.copy_smem_to_gmem(refs.row_sums, strength)
        plgpu.barrier_wait(refs.arrived)
        state = self.update(state, self.kept(0), (refs.queries, refs.pair.at[0]), (refs.keys, refs.pair.at[1]))
        self.put(n, 0, d_values, state)
        return state
