"""Controls of the interpreter of kernels for GPUs: what it is there to find, it finds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.kernels.hopper import STRICT, interpreted

pytestmark = interpreted
X = jnp.ones((8, 128))


def through_memory(
    *, read: int = 0, write: int = 0, rows: int = 8, blocks: int = 1, left_out: str = "", again: bool = False
) -> jax.Array:
    """X as it comes out of shared memory: in and out by TMA.

    In shared memory `rows` are read from row `read` on, and written from row `write` on. `left_out` is not done.
    `again`: shared memory is written while it goes out. `blocks` write the same output.
    """

    def kernel(given: Any, to: Any, held: Any, made: Any, ready: Any) -> None:
        block = jax.lax.axis_index("block")
        first = block - block  # zero, so that rows are not known before the kernel runs
        if left_out != "copy":
            plgpu.copy_gmem_to_smem(given, held, ready)
            if left_out != "wait":
                plgpu.barrier_wait(ready)
        made[pl.ds(first + write, rows)] = held[pl.ds(first + read, rows)]
        if left_out != "commit":
            plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(made, to)
        if again:
            made[...] = jnp.zeros_like(made)
        if left_out != "wait for what goes out":
            plgpu.wait_smem_to_gmem(0)
        if left_out == "wait":  # a kernel that ends before is an error of another kind
            plgpu.barrier_wait(ready)

    memory = plgpu.SMEM(X.shape, X.dtype)
    return jax.block_until_ready(
        plgpu.kernel(
            kernel,
            out_type=jax.ShapeDtypeStruct(X.shape, X.dtype),
            scratch_types={"held": memory, "made": memory, "ready": plgpu.Barrier(num_arrivals=1, num_barriers=1)},
            grid=(blocks,),
            grid_names=("block",),
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=STRICT,
        )(X)
    )


def test_memory_that_was_not_written_is_nan() -> None:
    """Of shared memory: part of it, and all of what did not come in."""
    assert jnp.array_equal(through_memory(), X)
    assert jnp.array_equal(through_memory(rows=5), X.at[5:].set(jnp.nan), equal_nan=True)
    assert jnp.all(jnp.isnan(through_memory(left_out="copy")))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "what comes in is not waited for": ({"left_out": "wait"}, "RACE DETECTED"),
    "what is written may not be seen where it goes out": ({"left_out": "commit"}, "RACE DETECTED"),
    "what goes out is written again": ({"again": True}, "RACE DETECTED"),
    "two blocks write one output": ({"blocks": 2}, "RACE DETECTED"),
    "what goes out is not waited for": ({"left_out": "wait for what goes out"}, "Not all copy_smem_to_gmem"),
    "a row that there is not is read": ({"read": 1}, "Out-of-bounds read"),
    "a row that there is not is written": ({"write": 1}, "Out-of-bounds swap"),
}


@pytest.mark.parametrize(("changes", "told"), WRONG.values(), ids=WRONG)
def test_a_kernel_that_is_wrong_raises(changes: dict[str, Any], told: str) -> None:
    assert jnp.array_equal(through_memory(), X)
    with pytest.raises(jax.errors.JaxRuntimeError, match=told):
        through_memory(**changes)
