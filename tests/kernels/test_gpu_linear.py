"""`linear_scan` for GPUs in interpret mode against a loop in float64, and its lowering for an H100."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gpu import linear
from kernels_pallas.gpu.linear import linear_scan, shared_bytes
from kernels_pallas.linear import reference
from seqmodels.operators import diagonal_scan
from tests.kernels.common import A100, H100, assert_same, graded, ids_of, in_float64, packed
from tests.kernels.hopper import SHARED, STRICT, interpreted, pretend_hopper, shared_memory_of
from tests.kernels.test_linear import BFLOAT16, FLOAT32, NAMES, REAL
from tests.kernels.test_linear import inputs as arrays_of


def inputs(length: int, channels: int, *, batch: int = 2, dtype: Any = jnp.float32) -> list[Any]:
    """Decays from none to -inf; documents that go on, of one step, and that start where tiles of 8 and 16 steps do."""
    *arrays, _ = arrays_of(length, channels, batch=batch, dtype=dtype)
    start = np.zeros((batch, length), bool)
    for row, places in enumerate(((3, 4, 15, 16, 17, 40, 48), (0, length - 1))[:batch]):
        start[row, [place for place in places if place < length]] = True
    return [*arrays, ids_of(start)]


CASES = [
    # length, channels, batch, type
    pytest.param(85, 20, 2, jnp.float32, id="more tiles than slots"),
    *(
        pytest.param(*case, id=name, marks=pytest.mark.slow)
        for name, case in {
            "complex": (43, 6, 2, jnp.complex64),
            "one step": (1, 128, 2, jnp.float32),
            "several blocks": (33, 300, 1, jnp.float32),
            "bfloat16": (150, 24, 2, jnp.bfloat16),
            "complex, whole tiles": (48, 16, 1, jnp.complex64),
        }.items()
    ),
]


@interpreted
@pytest.mark.parametrize(("length", "channels", "batch", "dtype"), CASES)
def test_the_kernel_equals_the_recurrence_in_float64(length: int, channels: int, batch: int, dtype: Any) -> None:
    """Outputs, the state, and all gradients, with every memory poisoned and races looked for."""
    *arrays, segment = inputs(length, channels, batch=batch, dtype=dtype)
    found = jax.jit(functools.partial(graded, lambda *a: linear_scan(*a, segment, STRICT)))(*arrays)
    assert [x.dtype for x in found] == [dtype, arrays[2].dtype, dtype, dtype, arrays[2].dtype]
    right = in_float64(lambda *a: reference(*a, segment), *arrays)
    assert_same(NAMES, found, right, BFLOAT16 if dtype == jnp.bfloat16 else FLOAT32)


@interpreted
@pytest.mark.parametrize("part", ["_forward_tile", pytest.param("_backward_tile", marks=pytest.mark.slow)])
def test_a_kernel_that_is_wrong_is_found(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that loses a thousandth of what is carried between two tiles, as a control of the test above."""
    right = getattr(linear, part)

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        carry = arguments[-1]
        carry[0] = 0.999 * carry[0]

    log_decay, drive, state, segment = inputs(33, 8, batch=1)
    arrays = (jnp.full_like(log_decay, -0.01), drive, state)
    run = lambda *a: linear_scan(*a, jnp.zeros_like(segment), STRICT)
    found = lambda: jax.jit(functools.partial(graded, lambda *a: run(*a)))(*arrays)
    expected = in_float64(lambda *a: reference(*a, jnp.zeros_like(segment)), *arrays)
    assert_same(NAMES, found(), expected, FLOAT32)
    monkeypatch.setattr(linear, part, wrong)
    with pytest.raises(AssertionError, match="'h'" if part == "_forward_tile" else "'d log_decay'"):
        assert_same(NAMES, found(), expected, FLOAT32)


TYPES = ["float32", "complex64", "bfloat16"]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, marks=[] if i == j != 1 else pytest.mark.slow)
        for i, shape in enumerate(REAL)
        for j, dtype in enumerate(TYPES)
    ],
    ids=str,
)
def test_the_kernel_lowers_for_an_h100_at_real_shapes(shape: tuple[int, int, int], dtype: str) -> None:
    """Two blocks of a kernel fit on a multiprocessor."""
    of = jax.ShapeDtypeStruct
    state = of(shape[::2], "complex64" if dtype == "complex64" else "float32")
    gradients = lambda *a: graded(lambda *arrays: linear_scan(*arrays, a[3]), *a[:3])
    found = shared_memory_of(gradients, of(shape, dtype), of(shape, dtype), state, of(shape[:2], "int32"))
    expected = shared_bytes(shape[1], planes=2 if dtype == "complex64" else 1, dtype=dtype)
    assert found == [expected["forward"], expected["backward"]]
    assert max(found) < SHARED


@interpreted
def test_the_family_calls_it_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents and padding that is NaN, as a loop over tokens has them."""
    log_decay, drive, state, _ = inputs(20, 6)
    segments, poison = packed()
    called: list[Any] = []
    pretend_hopper(monkeypatch)
    monkeypatch.setattr(linear, "linear_scan", lambda *a: called.append(a) or linear_scan(*a))
    run = lambda method: jax.jit(functools.partial(diagonal_scan, segments=segments, method=method))(
        poison(log_decay), poison(drive), state
    )
    chex.assert_trees_all_close(run("pallas"), run("sequential"), rtol=FLOAT32, atol=FLOAT32)
    assert len(called) == 1


def test_the_family_lowers_with_it_for_hopper_alone() -> None:
    of = jax.ShapeDtypeStruct((1, 32, 128), "float32")
    run = functools.partial(diagonal_scan, method="pallas")
    assert shared_memory_of(run, of, of) == [shared_bytes(32)["inference"]]
    for given, told in (({}, "Hopper GPUs, and this is made for NVIDIA A100"), ({"chunk": 64}, "of 16 steps, not 64")):
        mesh = H100 if given else A100
        with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=told):
            jax.eval_shape(functools.partial(run, **given), of, of)


def test_errors_name_the_shapes() -> None:
    log_decay, drive, state, segment = inputs(5, 4)
    with pytest.raises(ValueError, match=r"log_decay \(2, 4, 4\), not \(2, 5, 4\); segment \(2, 4\), not \(2, 5\)"):
        linear_scan(log_decay[:, 1:], drive, state, segment[:, 1:])
    with pytest.raises(ValueError, match="types float32, float32, complex64: all real, or all complex"):
        linear_scan(log_decay, drive, state.astype(jnp.complex64), segment)
