"""The walks of `kernels_pallas.gpu.exponential`: those of `chunk_outer`, and beside them what a normaliser takes.

    P_ij = ((X Y^T)_ij r_i + t_i) M_ij u_j      i the step of the query, j that of the key

where `chunk_outer` has (X Y^T)_ij M_ij. The normaliser n is a vector in float32 beside the state: a row of all keys for
the output, of the program's own 64 for dQ and dK. It has two places in shared memory, the one is read while the other
is written; a barrier of every chunk stands between.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.exponential_kernels import Form
from kernels_pallas.gpu.common import ALONG, BLOCK, CHUNK, DOWN, STAGES, by_columns, by_rows, numbers, read, scaled
from kernels_pallas.gpu.walk import CARRIED, WEIGHT, More, Program, Walk, scratch_of

INPUT, RATIO, TILT = 4, 5, 6  # more rows of the gates of a chunk: u, r and t; WEIGHT is w u
SCALE, FLOOR = 5, 6  # those of the output, which makes r: exp(min(m, 0)) and exp(-max(m, 0))
ROWS = 7
OUT = Walk("out", last=True, operator="chunk_exponential")
D_QUERY = Walk("d_query", beside=True, keep=True, operator="chunk_exponential")
D_KEY = Walk("d_key", backward=True, beside=True, cross=True, operator="chunk_exponential")
D_VALUE = Walk("d_value", backward=True, last=True, operator="chunk_exponential")


def more_of(form: Form, kind: Walk, value: Any, chunks: int, normaliser: jax.Array) -> More:
    """What a walk has beside `chunk_outer`'s; `value` is its Z, `normaliser` [B, H, K] that before its first chunk."""
    (batch, heads, size), blocks = normaliser.shape, value.shape[3] // BLOCK
    of = lambda *shape: jax.ShapeDtypeStruct((batch, heads, *shape), jnp.float32)
    outputs = {}
    if kind is OUT:
        outputs = {"sums": of(blocks, chunks, CHUNK), "last_normaliser": of(blocks, size)}
    elif kind is not D_VALUE:
        outputs = {"normalisers": of(chunks, size)}
    inputs = {} if kind is D_VALUE else {"normaliser": normaliser.astype(jnp.float32)}

    def program(kind: Walk, heads: int, refs: SimpleNamespace) -> Program:
        return _Program(form, kind, heads, refs)

    return More(program, inputs, outputs, _scratch(kind, size))


def scratch(kind: Walk, state_rows: int, key_size: int) -> dict[str, Any]:
    """What a program keeps in shared memory, all of it."""
    return {**scratch_of(kind, state_rows), **_scratch(kind, key_size)}


def _scratch(kind: Walk, key_size: int) -> dict[str, Any]:
    found = {"gs": numbers(STAGES, ROWS, CHUNK)}
    if kind is OUT:
        found["row_sums"] = numbers(CHUNK)
    if kind is not D_VALUE:
        found["held_normaliser"] = numbers(2, key_size if kind is OUT else BLOCK)
        found["normaliser_arrived"] = plgpu.Barrier()
    return found


class _Program(Program):
    def __init__(self, form: Form, kind: Walk, heads: int, refs: SimpleNamespace):
        super().__init__(kind, heads, refs)
        self.form = form

    def run(self) -> None:
        refs, here = self.refs, (self.row, self.head)
        if self.kind is not D_VALUE:
            own = refs.normaliser.at[here] if self.kind is OUT else refs.normaliser.at[*here, self.columns]
            plgpu.copy_gmem_to_smem(own, refs.held_normaliser.at[0], refs.normaliser_arrived)
            plgpu.barrier_wait(refs.normaliser_arrived)
        super().run()
        if self.kind is OUT:
            last = refs.held_normaliser.at[self.chunks % 2]
            plgpu.copy_smem_to_gmem(last, refs.last_normaliser.at[*here, self.block])
            plgpu.wait_smem_to_gmem(0)

    def gate(self, slot: Any, row: int) -> Any:
        """A row of the gates, a number for each row of a tile."""
        return read(self.refs.gs.at[slot, row], DOWN)

    def over(self, slot: Any, row: int, *, of_query: bool) -> Any:
        """A row of the gates in [CHUNK, CHUNK], by the step of the query or that of the key."""
        if of_query != self.kind.backward:
            return by_rows(self.gate(slot, row), CHUNK)
        return by_columns(read(self.refs.gs.at[slot, row], ALONG), CHUNK)

    def decays(self, slot: Any) -> Any:
        decays = super().decays(slot) * self.over(slot, INPUT, of_query=False)
        if self.kind is D_VALUE:
            return decays * self.over(slot, RATIO, of_query=True)
        if self.kind is OUT:
            return decays, scaled(self.gate(slot, CARRIED), self.with_normaliser(slot))
        return decays

    def with_normaliser(self, slot: Any) -> Any:
        """Q n, and no product of tiles: n is one column, and keeps its digits here."""
        refs = self.refs
        sums = None
        for part in self.key_parts:
            n = by_columns(read(refs.held_normaliser.at[slot, part], ALONG), CHUNK)
            one = jnp.sum(read(refs.xs.at[slot, :, part]) * n, axis=1)
            sums = one if sums is None else sums + one
        return sums

    @property
    def key_parts(self) -> list[Any]:
        return [pl.ds(i, BLOCK) for i in range(0, self.size, BLOCK)]

    def scored(self, slot: Any, scores: Any, decays: Any) -> Any:
        if self.kind is D_VALUE:
            return scores * decays
        if self.kind is OUT:
            decays, carried = decays
            scores = scores * decays
            self.refs.row_sums[...] = jnp.sum(scores, axis=1) + carried
            return scores
        ratio, tilt = (self.over(slot, row, of_query=True) for row in (RATIO, TILT))
        return (scores * ratio + tilt) * decays

    def weighted(self, slot: Any) -> Any:
        refs = self.refs
        if self.kind is OUT:
            weight = by_rows(self.gate(slot, WEIGHT), BLOCK)
            for part in self.key_parts:
                self.add(slot, part, weight * read(refs.ys.at[slot, :, part]))
        if not self.kind.backward:
            weighted = super().weighted(slot)
            if self.kind is D_QUERY:
                self.add(slot, pl.ds(0, BLOCK), weighted)
            return weighted
        z, carried = read(refs.zs.at[slot]), self.gate(slot, CARRIED)
        if self.kind is D_KEY:
            self.add(slot, pl.ds(0, BLOCK), by_rows(carried * self.gate(slot, TILT), BLOCK) * z)
        return by_rows(carried * self.gate(slot, RATIO), BLOCK) * z

    def add(self, slot: Any, part: Any, rows: Any) -> None:
        """A part of the normaliser after the chunk: of that before it, and of what the chunk's rows add."""
        refs = self.refs
        kept = scaled(refs.gs[slot, CARRIED, CHUNK - 1], read(refs.held_normaliser.at[slot, part], ALONG))
        refs.held_normaliser[1 - slot, part] = kept + jnp.sum(rows, axis=0)

    def output(self, slot: Any, carried: Any, own: Any) -> Any:
        if self.kind is OUT:
            out = super().output(slot, carried, own)
            return by_rows(self.ratio(slot), BLOCK) * out if self.form.normalised else out
        if self.kind is D_VALUE:
            return super().output(slot, carried, own)
        n = by_columns(read(self.refs.held_normaliser.at[slot], ALONG), CHUNK)
        if self.kind is D_KEY:
            return super().output(slot, carried + n, own)
        ratio, tilt = (by_rows(self.gate(slot, row), BLOCK) for row in (RATIO, TILT))
        return super().output(slot, ratio * carried + tilt * n, own)

    def ratio(self, slot: Any) -> Any:
        """r, both sides of it times exp(min(m, 0)): exp(-m) overflows."""
        sums, scale, floor = read(self.refs.row_sums, DOWN), self.gate(slot, SCALE), self.gate(slot, FLOOR)
        size = jnp.maximum(sums, -sums) * scale
        return scale / (jnp.maximum(size, floor) + self.form.eps * scale)

    def put(self, n: Any, slot: Any, out: Any, state: Any) -> None:
        super().put(n, slot, out, state)
        refs, here = self.refs, (self.row, self.head)
        if self.kind is OUT:
            plgpu.copy_smem_to_gmem(refs.row_sums, refs.sums.at[*here, self.block, self.at(n)])
        elif self.kind is not D_VALUE:
            after = refs.normalisers.at[*here, self.at(n), self.columns]
            plgpu.copy_smem_to_gmem(refs.held_normaliser.at[1 - slot], after)
