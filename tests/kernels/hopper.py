"""What the tests of kernels for GPUs share: an H100 to lower for, what a lowered kernel takes, interpret mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir
from jax.experimental.mosaic.gpu import dialect
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.kernels.common import H100

ALONE, SHARED = 227 * 1024, 113 * 1024  # bytes of a multiprocessor's memory that one block, and each of two, can have
RUNS = jax.__version_info__ >= (0, 12)
# Memory that was not written is NaN, reads out of bounds raise (but TMA's, which give zeros), and so do races.
STRICT = plgpu.InterpretGPUParams(detect_races=True) if RUNS else None
interpreted = pytest.mark.skipif(not RUNS, reason="jax before 0.12 does not interpret plgpu.kernel on a CPU")


def shared_memory_of(run: Callable[..., Any], *shapes: Any) -> list[int]:
    """Bytes of shared memory of every kernel in a program, as it is lowered for an H100."""
    with jax.sharding.use_abstract_mesh(H100):
        lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",))
    found: list[int] = []

    def launches(op: Any) -> None:
        if op.name.endswith("gpu.launch"):
            found.append(op.operands[len(op.operands) - 1].owner.attributes["value"].value)

    def kernels(op: Any) -> None:
        if op.name == "stablehlo.custom_call" and "mosaic_gpu" in str(op.attributes["call_target_name"]):
            module = op.attributes["mhlo.backend_config"]["module"].value_bytes
            with mlir.make_ir_context() as context:
                context.allow_unregistered_dialects = True
                dialect.register_dialect(context)
                context.load_all_available_dialects()
                _each(ir.Module.parse(module).operation, launches)

    _each(lowered.compiler_ir().operation, kernels)
    return found


def _each(op: Any, see: Callable[[Any], None]) -> None:
    see(op)
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                _each(inner.operation, see)
