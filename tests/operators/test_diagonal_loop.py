"""`diagonal_scan` as CPUs run it, against a loop over tokens in float64."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas.linear import reference
from seqmodels import Segments
from seqmodels.operators import diagonal, diagonal_scan
from tests.kernels.common import assert_same, graded, in_float64
from tests.kernels.test_linear import FLOAT32, NAMES, inputs

STARTS = ((3, 4, 9), (0, 16))  # of documents, in two rows


def segments(length: int) -> Segments:
    start = np.zeros((2, length), bool)
    for row, places in enumerate(STARTS):
        start[row, [place for place in places if place < length]] = True
    return Segments(jnp.asarray(start), jnp.ones((2, length), bool))


@pytest.mark.parametrize(("length", "dtype"), [(5, jnp.float32), (17, jnp.float32), (17, jnp.complex64)], ids=str)
def test_it_equals_the_recurrence_in_float64(length: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, the state and all gradients, decays down to -inf, documents of one step, at the first and last step."""
    *arrays, _ = inputs(length, 6, dtype=dtype)
    told = segments(length)
    taken: list[Any] = []
    run_loop = diagonal.diagonal_loop
    monkeypatch.setattr(diagonal, "diagonal_loop", lambda *x: taken.append(x) or run_loop(*x))
    found = jax.jit(functools.partial(graded, functools.partial(diagonal_scan, segments=told)))(
        arrays[0], arrays[1], arrays[2]
    )
    assert len(taken) == 1
    counted = jnp.cumsum(told.start, axis=1, dtype=jnp.int32)
    assert_same(NAMES, found, in_float64(lambda *a: reference(*a, counted), *arrays), FLOAT32)


def test_padding_may_hold_anything() -> None:
    """Values and gradients with NaN in it are those of `sequential`, and none is NaN."""
    *arrays, _ = inputs(17, 6)
    valid = jnp.asarray(np.arange(17)[None] < [[17], [12]])
    told = segments(17)._replace(valid=valid)
    poison = lambda x: jnp.where(valid[..., None], x, jnp.nan)

    def run(method: str) -> Any:
        scan = functools.partial(diagonal_scan, segments=told, method=method)
        return jax.jit(functools.partial(graded, scan))(poison(arrays[0]), poison(arrays[1]), arrays[2])

    chex.assert_tree_all_finite(run("auto"))
    chex.assert_trees_all_close(run("auto"), run("sequential"), rtol=FLOAT32, atol=FLOAT32)


def test_a_document_takes_nothing_from_the_state_before_it() -> None:
    """A state of NaN before a first token that starts a document: values and gradients are those from zeros."""
    log_decay, drive, state, _ = inputs(9, 6)
    told = Segments.whole(2, 9, fresh=True)
    run = jax.jit(functools.partial(graded, functools.partial(diagonal_scan, segments=told)))
    chex.assert_trees_all_equal(
        run(log_decay, drive, jnp.full_like(state, jnp.nan)), run(log_decay, drive, jnp.zeros_like(state))
    )


def test_narrow_inputs_are_widened_and_a_wrong_state_is_named() -> None:
    log_decay, drive, state, _ = inputs(9, 6)
    found = diagonal_scan(log_decay.astype(jnp.bfloat16), drive.astype(jnp.bfloat16), state)
    assert [x.dtype for x in found] == [jnp.float32, jnp.float32]
    with pytest.raises(ValueError, match=r"the state \[B, D\] of drive \(2, 9, 6\) is not \(2, 5\)"):
        diagonal_scan(log_decay, drive, state[:, 1:])


def test_rows_may_be_sharded() -> None:
    """With types that say what varies over the mesh, and a state made inside."""
    log_decay, drive, _, _ = inputs(9, 6)
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("rows")
    sharded = jax.shard_map(diagonal_scan, mesh=mesh, in_specs=(rows, rows), out_specs=(rows, rows))
    loss = lambda scan: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(scan(*x)[0])), (0, 1)))(log_decay, drive)
    chex.assert_trees_all_close(loss(sharded), loss(diagonal_scan), rtol=FLOAT32, atol=FLOAT32)
