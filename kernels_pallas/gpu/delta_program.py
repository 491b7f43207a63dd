"""What the walks of `chunk_delta` and `chunk_delta_keys` do alike: copies, products with a chunk's inverse, the state's
update, outputs.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu.common import BLOCK, CHUNK, STAGES, accumulator, launch, read_far, scaled, turned
from kernels_pallas.gpu.delta_solve import multiply, split
from kernels_pallas.gpu.walk import CARRIED, NARROW, chunk_decays


def launch_walk(
    program: type[Program],
    operator: str,
    interpret: Any,
    inputs: dict[str, jax.Array],
    first: jax.Array,
    scratch: dict[str, Any],
    *,
    errors: jax.Array | None,
    keep: bool,
) -> dict[str, jax.Array]:
    """The outputs of a walk, as `delta_walk.walk` has them; `given` and `solved` are among its inputs, by name."""
    given, backward = inputs["given"], program.backward
    batch, heads, chunks = inputs["solved"].shape[:3]
    size, width = first.shape[2:]
    blocks = width // BLOCK
    shapes = {
        "out": (True, given.shape, jnp.bfloat16),
        "last": (True, first.shape, jnp.float32),
        "strength": (backward, (batch, heads, blocks, chunks, CHUNK), jnp.float32),
        "kept_errors": (keep and not backward, given.shape, jnp.bfloat16),
        "states": (keep or backward, (batch, heads, chunks, size, width), jnp.bfloat16),
    }
    outputs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (made, shape, dtype) in shapes.items() if made}
    inputs = {**inputs, "first": first.astype(jnp.float32), **({} if errors is None else {"errors": errors})}
    names = [*inputs, *outputs, *scratch]

    def kernel(*refs: Any) -> None:
        program(heads, SimpleNamespace(**dict(zip(names, refs, strict=True)))).run()

    grid = {"head": heads, "block": blocks, "row": batch}
    name = f"{operator}_{'backward' if backward else 'forward'}"
    call = launch(kernel, name, grid, list(outputs.values()), list(scratch.values()), interpret)
    return dict(zip(outputs, call(*inputs.values()), strict=True))


class Program(abc.ABC):
    """What the programs of all walks do; `refs` by name: inputs, outputs and scratch of `delta_walk.walk`."""

    backward = False
    ahead = STAGES  # chunks whose queries, keys and gates are asked for at the start

    def __init__(self, heads: int, refs: SimpleNamespace):
        self.heads, self.refs = heads, refs
        self.row, self.head, self.block = (lax.axis_index(name) for name in ("row", "head", "block"))
        self.size, self.chunks = refs.held.shape[0], refs.solved.shape[2]
        self.columns = pl.ds(self.block * BLOCK, BLOCK)
        self.narrow = self.size <= NARROW
        self.rows = self.size if self.narrow else BLOCK
        self.parts = [pl.ds(i, self.rows) for i in range(0, self.size, self.rows)]  # by which a state is updated

    def run(self) -> None:
        refs = self.refs
        for n in range(min(self.ahead, self.chunks)):
            self.bring(n, n)
        self.bring_late(0)
        state = tuple(read_far(refs.first.at[self.row, self.head, part, self.columns]) for part in self.parts)
        self.hold(state)
        plgpu.commit_smem()
        state = lax.fori_loop(0, self.chunks, self.step, state)
        for part, values in zip(self.parts, state, strict=True):
            refs.last[self.row, self.head, part, self.columns] = values
        plgpu.wait_smem_to_gmem(0)

    @abc.abstractmethod
    def step(self, n: Any, state: Any) -> Any:
        """The n-th chunk: from the state before it to the one after it."""

    def at(self, n: Any) -> Any:
        """The chunk that comes n-th."""
        return self.chunks - 1 - n if self.backward else n

    def steps(self, n: Any, array: Any) -> Any:
        """The n-th chunk of an array [B, T, G, ..], of the group of this head."""
        return array.at[self.row, pl.ds(self.at(n) * CHUNK, CHUNK), lax.div(self.head, self.heads // array.shape[2])]

    def bring(self, n: Any, slot: Any) -> None:
        refs, arrived = self.refs, self.refs.arrived.at[slot]
        plgpu.copy_gmem_to_smem(self.steps(n, refs.query), refs.queries.at[slot], arrived)
        plgpu.copy_gmem_to_smem(self.steps(n, refs.key), refs.keys.at[slot], arrived)
        plgpu.copy_gmem_to_smem(refs.gates.at[self.row, self.head, self.at(n)], refs.gs.at[slot], arrived)

    def bring_late(self, n: Any) -> None:
        refs, arrived = self.refs, self.refs.late_arrived
        plgpu.copy_gmem_to_smem(self.steps(n, refs.given).at[:, self.columns], refs.values, arrived)
        plgpu.copy_gmem_to_smem(refs.solved.at[self.row, self.head, self.at(n)], refs.inverse, arrived)
        if self.backward:
            plgpu.copy_gmem_to_smem(self.steps(n, refs.errors).at[:, self.columns], refs.errs, arrived)

    def hold(self, state: Any) -> None:
        """Writes the state where products read it."""
        for part, values in zip(self.parts, state, strict=True):
            self.refs.held[part] = values.astype(jnp.bfloat16)

    def kept(self, slot: Any) -> Callable[[int], Any]:
        """The decay over a chunk, for each part of the state."""
        return lambda i: self.refs.gs[slot, CARRIED, CHUNK - 1]

    def score(self, n: Any, g: Any, left: Any, right: Any, keys: Any) -> list[Any]:
        """Writes the masked scores, and gives K S where registers allow for it beside them, else nothing."""
        refs = self.refs

        def product(scores: Any, *sums: Any) -> Any:
            plgpu.wgmma(scores, left, turned(right))
            for carried in sums:
                plgpu.wgmma(carried, keys, refs.held)
            decay = chunk_decays(g, self.backward)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the chunk before put out
            return scores[...] * decay, *(carried[...] for carried in sums)

        one = [accumulator(CHUNK, BLOCK)] if self.narrow else []
        scores, *early = pl.run_scoped(product, accumulator(CHUNK, CHUNK), *one)
        refs.work[...] = scores.astype(jnp.bfloat16)
        plgpu.commit_smem()
        if hasattr(refs, "states"):
            states = refs.states.at[self.row, self.head, self.at(n), :, self.columns]
            plgpu.copy_smem_to_gmem(refs.held, states)
        return early

    def solve(self, values: Any, turn: bool) -> Any:
        """The inverse, or its transpose, times values."""
        refs = self.refs
        split(refs.pair, values)
        plgpu.commit_smem()

        def product(total: Any) -> Any:
            multiply(total, lambda i: turned(refs.inverse.at[i]) if turn else refs.inverse.at[i], refs.pair)
            return total[...]

        return pl.run_scoped(product, accumulator(CHUNK, BLOCK))

    def write(self, n: Any, *writes: Any) -> None:
        """Writes what makes the output and the next state, and asks for what the next chunk needs late."""
        for i, values in enumerate(writes):
            self.refs.pair[i] = values.astype(jnp.bfloat16)
        plgpu.commit_smem()
        pl.when(n + 1 < self.chunks)(lambda: self.bring_late(n + 1))

    def update(self, state: Any, kept: Callable[[int], Any], *products: Any) -> Any:
        """b S and the products' sum; `kept` gives b of a part."""

        def part(i: int, added: Any) -> Any:
            for keys, writes in products:
                plgpu.wgmma(added, turned(keys.at[:, self.parts[i]]), writes)
            return scaled(kept(i), state[i]) + added[...]

        parts = range(len(self.parts))
        return tuple(pl.run_scoped(functools.partial(part, i), accumulator(self.rows, BLOCK)) for i in parts)

    def put(self, n: Any, slot: Any, out: Any, state: Any) -> None:
        """Writes the output and the state, sends what goes out, and asks for what comes next."""
        refs = self.refs
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs.work[...] = out.astype(jnp.bfloat16)
        self.hold(state)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.work, self.steps(n, refs.out).at[:, self.columns])
        pl.when(n + self.ahead < self.chunks)(lambda: self.bring(n + self.ahead, slot))
