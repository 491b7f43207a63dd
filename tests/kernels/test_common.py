"""Controls of what the kernels' tests share: what strict interpretation is there to find, it finds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.kernels.common import STRICT, without_races


def copied(x: jax.Array, *, racy: bool) -> jax.Array:
    """x [16, 128] by two points of a parallel axis: each its own rows, or both the first ones."""

    def kernel(given: Any, to: Any) -> None:
        to[...] = given[...]

    own = lambda i: (i, 0)
    return pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), own)],
        out_specs=pl.BlockSpec((8, 128), (lambda i: (0, 0)) if racy else own),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=STRICT,
    )(x)


def test_a_race_is_found() -> None:
    """One that is not the last kernel of a program too; and none where there is none."""
    x = jnp.ones((16, 128))
    with without_races():
        assert jnp.array_equal(copied(x, racy=False), x)
    with pytest.raises((AssertionError, RuntimeError), match="RACE DETECTED"), without_races():
        jax.block_until_ready(jax.jit(lambda x: copied(copied(x, racy=True), racy=False))(x))


def by_rows(x: jax.Array, *, read: int = 0, write: int = 0, rows: int = 8, kept: bool = False) -> jax.Array:
    """x [8, 128]: `rows` from row `read` on are copied to row `write` on, by way of memory never written if `kept`."""

    def kernel(given: Any, to: Any, memory: Any) -> None:
        point = pl.program_id(0)  # so that rows are not known before the kernel runs
        source = memory if kept else given
        to[pl.ds(point + write, rows)] = source[pl.ds(point + read, rows)]

    whole = pl.BlockSpec(x.shape, lambda i: (0, 0))
    return pl.pallas_call(
        kernel,
        grid=(1,),
        in_specs=[whole],
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype)],
        interpret=STRICT,
    )(x)


def test_memory_that_was_not_written_is_nan() -> None:
    """Of outputs, and of what a kernel holds."""
    x = jnp.ones((8, 128))
    assert jnp.array_equal(by_rows(x), x)
    assert jnp.array_equal(by_rows(x, rows=5), x.at[5:].set(jnp.nan), equal_nan=True)
    assert jnp.all(jnp.isnan(by_rows(x, kept=True)))


# Where a part of what is written is within bounds jax 0.10 has a bare assertion, jax 0.12 the error that says it.
SWAP = r"Out-of-bounds swap|in swap_buffer_content\nAssertionError"


@pytest.mark.parametrize("first", [1, 8])
@pytest.mark.parametrize(("what", "told"), [("read", "Out-of-bounds read"), ("write", SWAP)], ids=["read", "write"])
def test_what_is_out_of_bounds_raises(what: str, told: str, first: int) -> None:
    """A row too far, or all of them."""
    x = jnp.ones((8, 128))
    assert jnp.array_equal(by_rows(x), x)
    with pytest.raises(jax.errors.JaxRuntimeError, match=told):
        jax.block_until_ready(by_rows(x, **{what: first}))
