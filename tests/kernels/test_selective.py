"""`selective_scan` in interpret mode against a loop in float64, and its lowering for TPUs at real models' shapes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import selective, selective_kernels
from kernels_pallas.chunks import VMEM
from kernels_pallas.selective import reference, selective_scan, vmem_bytes
from seqmodels import operators as families
from seqmodels.operators import kernels
from tests.kernels.common import STRICT, TPU, assert_same, graded, ids_of, in_float64, losing, packed, parts, result_of

# float32 rounding (6e-8) through states of up to 128 steps and sums over them, relative to the largest entry.
FLOAT32 = 1e-5
BFLOAT16 = 1e-2  # 8 bits of what is given out, and of the gradients
NAMES = ("y", "state", "d x", "d dt", "d a", "d b", "d c", "d state")
B = 2


def inputs(length: int, channels: int, size: int, *, batch: int = B, dtype: Any = jnp.float32) -> list[Any]:
    """Rates from 0 to -inf, steps of no time among others; documents that go on, and some of one step."""
    normal = np.random.default_rng(0).standard_normal
    x, state = normal((batch, length, channels)), normal((batch, channels, size))
    dt = np.maximum(normal(x.shape) + 1, 0) / 2
    noise = 2 * normal((channels, size))
    a = np.where(noise > 3, -np.inf, np.where(noise < -3, 0, -np.exp(3 * noise)))
    b, c = (normal((batch, length, size)) / size**0.5 for _ in range(2))
    start = np.zeros((batch, length), bool)
    for row, places in enumerate(((3, 4, 127, 128, 129), (0, length - 1))[:batch]):
        start[row, [place for place in places if place < length]] = True
    kinds = (dtype, dtype, jnp.float32, dtype, dtype, jnp.float32, jnp.int32)
    arrays = (x, dt, a, b, c, state, ids_of(start))
    return [jnp.asarray(y, kind) for y, kind in zip(arrays, kinds, strict=True)]


CASES = [
    # length, channels, state size, batch, type, whether states are kept, how the kernel runs
    pytest.param(130, 8, 8, 2, jnp.float32, True, STRICT, id="strictly"),
    *(
        pytest.param(*case, id=name, marks=pytest.mark.slow)
        for name, case in {
            "one step": (1, 128, 16, 2, jnp.float32, True, True),
            "chunk and a part": (200, 20, 6, 2, jnp.float32, True, True),
            "several blocks, states computed again, strictly": (130, 132, 8, 1, jnp.float32, False, STRICT),
            "several blocks": (257, 256 * 2, 16, 1, jnp.float32, False, True),
            "large states": (130, 24, 32, 1, jnp.float32, True, True),
            "bfloat16": (130, 24, 16, 2, jnp.bfloat16, True, True),
        }.items()
    ),
]


@pytest.mark.parametrize(("length", "channels", "size", "batch", "dtype", "save", "interpret"), CASES)
def test_the_kernel_equals_the_recurrence_in_float64(
    length: int, channels: int, size: int, batch: int, dtype: Any, save: bool, interpret: Any
) -> None:
    """Outputs, the state, and all gradients; strictly: with every memory poisoned and races looked for."""
    *arrays, segment = inputs(length, channels, size, batch=batch, dtype=dtype)
    run = lambda *y: selective_scan(*y, segment, selective.CHUNK, save, interpret)
    found = jax.jit(functools.partial(graded, run))(*arrays)
    assert [y.dtype for y in found] == [dtype, jnp.float32, *(y.dtype for y in arrays)]
    chex.assert_tree_all_finite(found)
    arrays[2] = jnp.maximum(arrays[2], -1e30)  # no time at all is no NaN in float64 either
    right = in_float64(lambda *y: reference(*y, segment), *arrays)
    assert_same(NAMES, found, right, BFLOAT16 if dtype == jnp.bfloat16 else FLOAT32)


@parts
def test_a_kernel_that_is_wrong_is_found(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that loses a thousandth of the state between chunks, or of its gradient, as a control of the test above."""
    *arrays, segment = inputs(130, 8, 8, batch=1)
    arrays[2], segment = jnp.full_like(arrays[2], -0.01), jnp.zeros_like(segment)
    how = result_of[part]
    right = in_float64(lambda *y: reference(*y, segment), *arrays, how=how)
    run = lambda: jax.jit(lambda *y: how(lambda *z: selective_scan(*z, segment, selective.CHUNK, True, True), *y))(
        *arrays
    )
    if part == "forward":
        assert_same(NAMES, run(), right, FLOAT32)
    held = {"forward": -7, "backward": -13}[part]  # among the scratch, what is held from chunk to chunk
    monkeypatch.setattr(selective_kernels, part, losing(getattr(selective_kernels, part), held))
    with pytest.raises(AssertionError, match="'y'" if part == "forward" else "'d x'"):
        assert_same(NAMES, run(), right, FLOAT32)


def shapes(batch: int, length: int, channels: int, size: int, dtype: Any) -> list[Any]:
    of = jax.ShapeDtypeStruct
    x, b = of((batch, length, channels), dtype), of((batch, length, size), dtype)
    return [x, x, of((channels, size), "float32"), b, b, of((batch, channels, size), "float32")]


def program(scan: Callable[..., Any], *arrays: Any) -> str:
    """The text of outputs and all gradients, lowered for TPUs."""
    loss = lambda *y: sum(jnp.sum(x.astype(jnp.float32)) for x in scan(*y))
    with jax.sharding.use_abstract_mesh(TPU):
        run = jax.jit(jax.value_and_grad(loss, tuple(range(len(arrays)))))
        return run.trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()


def largest(text: str) -> int:
    """The number of entries of the largest array of a program; what stays inside of kernels is not in its text."""
    found = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
    return max(int(np.prod([int(n) for n in shape[:-1].split("x")])) for shape in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(8, 2048, 4096, 16), (1, 4096, 4096, 16), (2, 1000, 1536, 16)], ids=str)
def test_the_kernel_lowers_for_tpus_at_real_shapes(shape: tuple[int, int, int, int], dtype: str) -> None:
    """Forward, and backward with states kept (two programs) and computed again (three); no array of all states."""
    batch, length, channels, size = shape
    for save, programs in ((True, 2), (False, 3)):
        segment = jnp.zeros((batch, length), jnp.int32)
        scan = lambda *y, save=save, segment=segment: selective_scan(*y, segment, selective.CHUNK, save)
        text = program(scan, *shapes(*shape, dtype))
        assert text.count("tpu_custom_call") == programs
        assert largest(text) == batch * (length + -length % selective.CHUNK) * channels < length * channels * size
    assert max(vmem_bytes(channels, size, dtype=dtype).values()) < VMEM


def test_what_all_states_at_once_would_look_like() -> None:
    """The test above can fail: the one method that holds all states is seen to."""
    scan = functools.partial(families.selective_scan, d=None, method="associative")
    arrays = shapes(1, 256, 128, 16, "float32")
    text = program(lambda *y: scan(*y[:5], state=y[5]), *arrays)
    assert largest(text) >= 256 * 128 * 16


def test_errors_name_the_shapes() -> None:
    x, dt, a, b, c, state, segment = inputs(5, 4, 3)
    with pytest.raises(ValueError, match=r"dt \(2, 4, 4\), not \(2, 5, 4\); .*state \(2, 3, 4\), not \(2, 4, 3\)"):
        selective_scan(x, dt[:, 1:], a, b, c, state.swapaxes(1, 2), segment)
    with pytest.raises(ValueError, match=r"states of 64 in chunks of 128 steps take .* bytes of VMEM"):
        selective_scan(*inputs(5, 4, 64))


def test_the_family_calls_it_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents and padding that is NaN, as a loop over tokens has them; and why it does not serve else."""
    x, dt, a, b, c, state, _ = inputs(20, 6, 4)
    a = jnp.maximum(a, -1e30)
    segments, poison = packed()
    arrays = (poison(x), poison(dt), a, poison(b), poison(c), jnp.arange(6.0), state)
    scan = families.selective_scan
    with pytest.raises(ValueError, match="for TPUs and Hopper GPUs, and this is made for cpu; use 'auto'"):
        scan(*arrays, method="pallas")
    monkeypatch.setattr(kernels, "INTERPRET", True)
    run = lambda method: jax.jit(functools.partial(scan, segments=segments, method=method))(*arrays)
    found, right = run("pallas"), run("sequential")
    chex.assert_trees_all_close(found, right, rtol=FLOAT32, atol=FLOAT32)
    with pytest.raises(ValueError, match="does not shard time"):
        scan(*arrays, method="pallas", sequence_axis="sequence")
    with pytest.raises(ValueError, match="x, dt, b and c are bfloat16 or float32, not float16, float32"):
        scan(x.astype(jnp.float16), *arrays[1:], method="pallas")
    with pytest.raises(ValueError, match="chunks are a multiple of 128 steps, not 64"):
        scan(*arrays, method="pallas", chunk=64)
