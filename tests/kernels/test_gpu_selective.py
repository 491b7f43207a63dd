"""`selective_scan` for GPUs in interpret mode against a loop in float64, and its lowering for an H100."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gpu import selective
from kernels_pallas.gpu.selective import selective_scan, shared_bytes
from kernels_pallas.selective import reference
from seqmodels import operators
from tests.kernels.common import assert_same, graded, ids_of, in_float64, packed, pulled
from tests.kernels.hopper import ALONE, SHARED, STRICT, interpreted, pretend_hopper, shared_memory_of

# float32 rounding (6e-8) through sums over steps, entries and channels, relative to the largest entry of an array.
FLOAT32 = 1e-5
BFLOAT16 = 1e-2  # 8 bits of the gradients and of what is given out
NAMES = ("y", "state", "d x", "d dt", "d a", "d b", "d c", "d state")


def inputs(length: int, channels: int, size: int, *, batch: int = 2, dtype: Any = jnp.float32) -> list[Any]:
    """Decays from none to exp(-1e30) = 0; documents that go on, of one step, and that start where tiles do."""
    keys = jax.random.split(jax.random.key(0), 6)
    normal = lambda key, *shape: jax.random.normal(keys[key], shape)
    x, noise = normal(0, batch, length, channels), normal(1, batch, length, channels)
    dt = jnp.where(noise > 2, 0, jnp.exp(noise - 2))
    a = (-jnp.exp(2 * normal(2, channels, size))).at[0, 0].set(0).at[1].set(-1e30)
    b, c = normal(3, batch, length, size), normal(4, batch, length, size)
    start = np.zeros((batch, length), bool)
    for row, places in enumerate(((3, 4, 15, 16, 17, 32), (0, length - 1))[:batch]):
        start[row, [place for place in places if place < length]] = True
    arrays = [x.astype(dtype), dt.astype(dtype), a, b.astype(dtype), c.astype(dtype), normal(5, batch, channels, size)]
    return [*arrays, ids_of(start)]


CASES = [
    # length, channels, entries of a state, batch, type, whether states are saved
    pytest.param(35, 12, 3, 1, jnp.float32, False, id="more tiles than slots"),
    *(
        pytest.param(*case, id=name, marks=pytest.mark.slow)
        for name, case in {
            "two rows, saved": (37, 20, 8, 2, jnp.float32, True),
            "one step": (1, 128, 16, 2, jnp.float32, False),
            "several blocks": (16, 140, 10, 1, jnp.float32, True),
            "bfloat16": (33, 16, 4, 1, jnp.bfloat16, False),
        }.items()
    ),
]


@interpreted
@pytest.mark.parametrize(("length", "channels", "size", "batch", "dtype", "save"), CASES)
def test_the_kernel_equals_the_recurrence_in_float64(
    length: int, channels: int, size: int, batch: int, dtype: Any, save: bool
) -> None:
    """Outputs, the state, and all gradients, with every memory poisoned and races looked for."""
    *arrays, segment = inputs(length, channels, size, batch=batch, dtype=dtype)
    found = jax.jit(functools.partial(pulled, lambda *a: selective_scan(*a, segment, save, STRICT)))(*arrays)
    wide = jnp.float32
    assert [x.dtype for x in found] == [dtype, wide, dtype, dtype, wide, dtype, dtype, wide]
    right = in_float64(lambda *a: reference(*a, segment), *arrays, how=pulled)
    assert_same(NAMES, found, right, BFLOAT16 if dtype == jnp.bfloat16 else FLOAT32)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("part", ["_forward_tile", "_backward_tile"])
def test_a_kernel_that_is_wrong_is_found(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that loses a thousandth of what is carried between two tiles, as a control of the test above."""
    right = getattr(selective, part)

    def wrong(size: int, read: Any, written: Any, carry: Any, *rest: Any) -> None:
        right(size, read, written, carry, *rest)
        carry[0] = 0.999 * carry[0]

    *arrays, segment = inputs(33, 8, 2, batch=1)
    arrays[1], arrays[2] = jnp.full_like(arrays[1], 0.1), jnp.full_like(arrays[2], -0.1)
    expected = in_float64(lambda *a: reference(*a, jnp.zeros_like(segment)), *arrays)
    run = lambda *a: selective_scan(*a, jnp.zeros_like(segment), True, STRICT)
    found = lambda: jax.jit(functools.partial(graded, lambda *a: run(*a)))(*arrays)
    assert_same(NAMES, found(), expected, FLOAT32)
    monkeypatch.setattr(selective, part, wrong)
    with pytest.raises(AssertionError, match="'y'" if part == "_forward_tile" else "'d x'"):
        assert_same(NAMES, found(), expected, FLOAT32)


def shapes(batch: int, length: int, channels: int, size: int, dtype: str) -> list[Any]:
    of = jax.ShapeDtypeStruct
    whole, columns = of((batch, length, channels), dtype), of((batch, length, size), dtype)
    state = of((batch, channels, size), "float32")
    return [whole, whole, of((channels, size), "float32"), columns, columns, state, of((batch, length), "int32")]


@pytest.mark.parametrize(
    ("shape", "dtype", "save"),
    [
        ((8, 2048, 5120, 16), "bfloat16", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ((8, 2048, 5120, 16), "bfloat16", False),
                ((2, 16384, 2560, 16), "float32", True),
                ((2, 16384, 2560, 16), "bfloat16", True),
                ((4, 1000, 192, 16), "float32", False),
                ((2, 2048, 4096, 32), "float32", True),
            )
        ),
    ],
    ids=str,
)
def test_the_kernel_lowers_for_an_h100_at_real_shapes(shape: tuple[int, ...], dtype: str, save: bool) -> None:
    """Two programs, or three where states are computed again; two blocks of the forward kernel with states of 16 fit on
    a multiprocessor, one of the backward kernel."""
    gradients = lambda *a: graded(lambda *arrays: selective_scan(*arrays, a[6], save), *a[:6])
    expected = shared_bytes(shape[1], shape[3], dtype)
    found = shared_memory_of(gradients, *shapes(*shape, dtype))
    order = (*(() if save else ("inference",)), "forward", "backward")
    assert found == [expected[name] for name in order]
    assert found[-1] < ALONE
    assert found[-2] < (SHARED if shape[3] == 16 else ALONE)


def test_errors_name_the_shapes() -> None:
    *arrays, segment = inputs(5, 4, 2)
    with pytest.raises(ValueError, match=r"b \(2, 4, 2\), not \(2, 5, 2\); segment \(2, 4\), not \(2, 5\)"):
        selective_scan(*arrays[:3], arrays[3][:, 1:], *arrays[4:], segment[:, 1:])
    with pytest.raises(ValueError, match=r"states of 64 entries take \d+ bytes of shared memory, more than 232448"):
        jax.eval_shape(selective_scan, *shapes(1, 64, 128, 64, "bfloat16"))


@interpreted
@pytest.mark.slow
def test_the_family_calls_it_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents and padding that is NaN, as a loop over tokens has them."""
    x, dt, a, b, c, state, _ = inputs(20, 6, 4)
    segments, poison = packed()
    arrays = (poison(x), poison(dt), a, poison(b), poison(c), jnp.arange(6.0), state)
    called: list[Any] = []
    pretend_hopper(monkeypatch)
    monkeypatch.setattr(selective, "selective_scan", lambda *a, **o: called.append(a) or selective_scan(*a, **o))
    run = lambda method: jax.jit(functools.partial(operators.selective_scan, segments=segments, method=method))(*arrays)
    chex.assert_trees_all_close(run("pallas"), run("sequential"), rtol=FLOAT32, atol=10 * FLOAT32)
    assert len(called) == 1


def test_the_family_lowers_with_it_for_hopper() -> None:
    of = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
    run = functools.partial(operators.selective_scan, method="pallas")
    arrays = (of(1, 32, 128), of(1, 32, 128), of(128, 8), of(1, 32, 8), of(1, 32, 8))
    assert shared_memory_of(run, *arrays) == [shared_bytes(32, 8)["inference"]]
