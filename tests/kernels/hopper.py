"""What the tests of kernels for GPUs share: an H100 to lower for, what a lowered kernel takes, interpret mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir
from jax.experimental.mosaic.gpu import dialect
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu import common
from seqmodels.operators import kernels
from tests.kernels.common import A100, H100, assert_same, packed

ALONE, SHARED = common.SHARED, 113 * 1024  # bytes of a processor's memory that one block, and each of two, can have
RUNS = hasattr(plgpu, "InterpretGPUParams")
STRICT: Any = None
if RUNS:  # memory that was not written is NaN, reads out of bounds raise (but TMA's, which give zeros), and so do races
    STRICT = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
interpreted = pytest.mark.skipif(not RUNS, reason="jax before 0.12 does not interpret plgpu.kernel on a CPU")


def pretend_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on families take programs to be made for a Hopper GPU, and interpret its kernels."""
    monkeypatch.setattr(kernels, "on_hopper", lambda: True)
    monkeypatch.setattr(kernels, "INTERPRET", STRICT)


def assert_the_family_calls_it(
    run: Callable[..., Any], arrays: Any, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With packed documents and padding that is NaN it gives what a loop does: `run(arrays, segments=, method=)`."""
    segments, poison = packed()
    arrays = jax.tree.map(poison, arrays)
    found_by = lambda method: jax.jit(functools.partial(run, segments=segments, method=method))(arrays)
    right = found_by("sequential")
    pretend_hopper(monkeypatch)
    out, state = found_by("pallas")
    assert_same(("out", "state"), (out, state), right, tolerance)
    chex.assert_trees_all_equal(out[1, 18:], jnp.zeros_like(out[1, 18:]))


def assert_it_says_why_not(run: Callable[..., Any], shaped: Callable[..., Any]) -> None:
    """`run(arrays, chunk=)` is a family's call with `method="pallas"`, `shaped(type, head size)` its arrays."""
    narrow = jnp.bfloat16
    refused: list[tuple[Any, Any, dict[str, Any], str]] = [
        (H100, shaped(jnp.float32, 64), {}, "takes bfloat16 and heads of 64, 128, 256, but query is float32"),
        (H100, shaped(narrow, 32), {}, "but that of keys is 32 and that of values is 32"),
        (H100, shaped(narrow, 64), {"chunk": 128}, "chunks are of 64 steps, not 128"),
        (A100, shaped(narrow, 64), {}, "for TPUs and Hopper GPUs, and this is made for NVIDIA A100"),
    ]
    for mesh, arrays, changes, told in refused:
        with pytest.raises(ValueError, match=told), jax.sharding.use_abstract_mesh(mesh):
            jax.eval_shape(functools.partial(run, **changes), arrays)


def shared_memory_of(run: Callable[..., Any], *shapes: Any) -> list[int]:
    """Bytes of shared memory of every kernel in a program, as it is lowered for an H100."""
    with jax.sharding.use_abstract_mesh(H100):
        lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",))
    found: list[int] = []

    def launches(op: Any) -> bool:
        if not op.name.endswith("gpu.launch"):
            return False
        found.append(op.operands[len(op.operands) - 1].owner.attributes["value"].value)
        return True

    def kernels(op: Any) -> bool:
        if op.name == "stablehlo.custom_call" and "mosaic_gpu" in str(op.attributes["call_target_name"]):
            module = op.attributes["mhlo.backend_config"]["module"].value_bytes
            with mlir.make_ir_context() as context:
                context.allow_unregistered_dialects = True
                dialect.register_dialect(context)
                context.load_all_available_dialects()
                _each(ir.Module.parse(module).operation, launches)
        return False

    _each(lowered.compiler_ir().operation, kernels)
    return found


def _each(op: Any, see: Callable[[Any], bool]) -> None:
    """Shows every operation; what is inside of one for which `see` is true stays aside."""
    if see(op):
        return
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                _each(inner.operation, see)
