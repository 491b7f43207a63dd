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
