"""What the kernels' tests share: strict interpretation, gradients against float64, and lowering without a device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax._src.pallas.mosaic.interpret.race_detection_state import RaceDetectionState
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType

from seqmodels import Segments

# Memory that was not written is NaN, reads and writes out of bounds raise, and races are looked for between two cores
# that share the points of the parallel axes: there have to be two such points. jax 0.12 raises at a race, jax 0.10
# prints it alone; `without_races`, which is around every test here, fails then too.
STRICT = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", num_cores_or_threads=2
)
MESH = functools.partial(AbstractMesh, (1,), ("x",), axis_types=(AxisType.Auto,))
TPU = MESH(abstract_device=AbstractDevice("TPU v5 lite", 1, platform="tpu"))
GPU = lambda kind, cores: MESH(abstract_device=AbstractDevice(kind, cores, platform="gpu"))
H100, A100 = GPU("NVIDIA H100 80GB HBM3", 132), GPU("NVIDIA A100-SXM4-80GB", 108)
# What heads of real models take: batch, length, heads, size of a head.
REAL = [(1, 8192, 96, 128), (2, 16384, 16, 128), (4, 2048, 16, 128), (8, 1024, 8, 64), (8, 2048, 32, 256)]
LOWERED = [  # with a type
    pytest.param(shape, dtype, marks=[] if i == 0 else pytest.mark.slow)
    for i, shape in enumerate(REAL)
    for dtype in ("bfloat16", "float32")
    if dtype == "bfloat16" or i in (0, 3, 4)
]


@contextlib.contextmanager
def without_races() -> Iterator[None]:
    """Fails if any kernel that was interpreted within had a race; each starts a record of its own."""
    records: list[Any] = []

    def recorded(*arguments: Any, **options: Any) -> Any:
        records.append(RaceDetectionState(*arguments, **options))
        return records[-1]

    try:
        with mock.patch.object(interpret_pallas_call, "RaceDetectionState", recorded):
            yield
    finally:
        pltpu.reset_tpu_interpret_mode_state()  # after an error nothing is interpreted before this
    assert not any(record.races_found for record in records), "RACE DETECTED, as printed above"


def ids_of(start: Any) -> jax.Array:
    """Ids [B, T] of documents that begin where `start` is true; every other one comes after a document of no steps."""
    return jnp.asarray((3 * np.cumsum(start, axis=1) + 1) // 2, jnp.int32)


def packed() -> tuple[Segments, Callable[[jax.Array], jax.Array]]:
    """Documents in two rows of 20 steps, two of which are padding, and what makes the padding of [2, 20, ...] NaN."""
    start = np.zeros((2, 20), bool)
    start[0, [0, 7, 8]], start[1, 18] = True, True
    segments = Segments(jnp.asarray(start), jnp.asarray(np.arange(20)[None] < [[20], [18]]))
    return segments, lambda x: jnp.where(jnp.expand_dims(segments.valid, range(2, x.ndim)), x, jnp.nan)


def graded(run: Callable[..., Any], *arrays: Any) -> Any:
    """Outputs, the final state, and the gradients of a loss that depends on all of both."""

    def loss(*arrays: Any) -> Any:
        out, state = run(*arrays)
        wide = out.astype(state.dtype)
        parts = [jnp.sin(wide.real), jnp.cos(state.real)]
        if jnp.iscomplexobj(state):
            parts += [jnp.cos(2 * wide.imag), jnp.sin(2 * state.imag)]
        return sum(jnp.sum(part) for part in parts), (out, state)

    gradients, found = jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)(*arrays)
    return (*found, *gradients)


def pulled(run: Callable[..., Any], *arrays: Any) -> Any:
    """`graded` of a loss that is linear in the outputs, so that a rounded output does not change what comes back."""
    (out, state), back = jax.vjp(run, *arrays)
    weights = [jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in (out, state)]
    return out, state, *back((weights[0].astype(jnp.bfloat16).astype(out.dtype), weights[1].astype(state.dtype)))


def in_float64(run: Callable[..., Any], *arrays: Any, how: Callable[..., Any] = graded) -> Any:
    """`graded` (or `how`) of a reference, in float64 or complex128."""
    with jax.enable_x64(True):
        wide = lambda x: np.complex128 if jnp.iscomplexobj(x) else np.float64
        found = jax.jit(functools.partial(how, run))(*(jnp.asarray(np.asarray(x, wide(x))) for x in arrays))
        return jax.tree.map(np.asarray, found)


def assert_same(names: Sequence[str], found: Any, right: Any, tolerance: float) -> None:
    """Each array within `tolerance` of the largest entry that it should have, all of which are finite."""
    chex.assert_tree_all_finite(right)
    wide = lambda x: np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
    for name, x, y in zip(names, found, right, strict=False):
        size = np.max(np.abs(y))
        chex.assert_trees_all_close({name: wide(x) / size}, {name: wide(y) / size}, rtol=0, atol=tolerance)


def losing(kernel: Callable[..., None], held: int = -1) -> Callable[..., None]:
    """A kernel that is wrong, for controls: of what it carries from chunk to chunk a thousandth is lost."""

    def wrong(*refs: Any) -> None:
        kernel(*refs)
        refs[held][...] *= 0.999

    return wrong


# Of the controls of a family the gradient's is left to the slow tier.
parts = pytest.mark.parametrize("part", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
result_of: dict[str, Callable[..., Any]] = {"forward": lambda run, *arrays: run(*arrays), "backward": graded}


def assert_a_loss_is_found(
    part: str, module: Any, run: Callable[..., Any], reference: Callable[..., Any], arrays: Sequence[Any],
    names: Sequence[str], tolerance: float, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of a module with a FORM: a thousandth of the state between two chunks is lost, or of its gradient.

    What comes before the key's gradient in the order of names is right.
    """
    how = result_of[part]
    right = in_float64(reference, *arrays, how=how)
    found = lambda: jax.jit(lambda *a: how(lambda *b: run(*b), *a))(*arrays)
    if part == "forward":
        assert_same(names, found(), right, tolerance)
    monkeypatch.setattr(module, "FORM", module.FORM._replace(**{part: losing(getattr(module.FORM, part))}))
    with pytest.raises(AssertionError, match="'out'" if part == "forward" else "'d key'"):
        assert_same(names, found(), right, tolerance)


def kernels_of(run: Callable[..., Any], *shapes: Any) -> int:
    """How many kernels are in a program when it is lowered for a TPU."""
    with jax.sharding.use_abstract_mesh(TPU):
        lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=("tpu",))
    return lowered.as_text().count("tpu_custom_call")


def gpu_kernels_of(run: Callable[..., Any], *shapes: Any) -> int:
    """How many kernels are in a program when it is lowered for an H100."""
    with jax.sharding.use_abstract_mesh(H100):
        lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("custom_call @mosaic_gpu_v2")
