"""`linear_scan` in interpret mode against a loop in float64, and its lowering for TPUs at the shapes of real models."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import linear
from kernels_pallas.chunks import VMEM
from kernels_pallas.linear import linear_scan, reference, vmem_bytes
from seqmodels.operators import diagonal_scan, kernels
from tests.kernels.common import (
    STRICT,
    assert_same,
    graded,
    ids_of,
    in_float64,
    kernels_of,
    losing,
    packed,
    parts,
    result_of,
)

# float32 rounding (6e-8) through sums of up to 128 steps, relative to the largest entry of an array.
FLOAT32 = 1e-5
BFLOAT16 = 1e-2  # 8 bits of the gradients and of what is given out
NAMES = ("h", "state", "d log_decay", "d drive", "d state")
B = 2


def inputs(length: int, channels: int, *, batch: int = B, dtype: Any = jnp.float32) -> list[Any]:
    """Decays from none to -inf, turned where numbers are complex; documents that go on, and some of one step."""
    keys = jax.random.split(jax.random.key(0), 6)
    shape = (batch, length, channels)
    noise = jax.random.normal(keys[0], shape)
    log_decay = jnp.where(noise > 1.8, -jnp.inf, -jnp.exp(3 * noise - 3))
    drive, state = jax.random.normal(keys[1], shape), jax.random.normal(keys[2], (batch, channels))
    if dtype == jnp.complex64:
        log_decay = jax.lax.complex(log_decay, 3 * jax.random.normal(keys[3], shape))
        drive = jax.lax.complex(drive, jax.random.normal(keys[4], shape))
        state = jax.lax.complex(state, jax.random.normal(keys[5], state.shape))
    start = np.zeros((batch, length), bool)
    for row, places in enumerate(((3, 4, 127, 128, 129), (0, length - 1))[:batch]):
        start[row, [place for place in places if place < length]] = True
    return [log_decay.astype(dtype), drive.astype(dtype), state, ids_of(start)]


CASES = [
    # length, channels, batch, type, how the kernel runs
    pytest.param(130, 8, 2, jnp.float32, STRICT, id="strictly"),
    pytest.param(200, 6, 2, jnp.complex64, True, id="complex"),
    *(
        pytest.param(*case, id=name, marks=pytest.mark.slow)
        for name, case in {
            "one step": (1, 128, 2, jnp.float32, True),
            "chunk and a part": (200, 20, 2, jnp.float32, True),
            "complex, strictly": (130, 6, 2, jnp.complex64, STRICT),
            "several blocks": (257, 256 * 3, 1, jnp.float32, True),
            "bfloat16": (130, 24, 2, jnp.bfloat16, True),
        }.items()
    ),
]


@pytest.mark.parametrize(("length", "channels", "batch", "dtype", "interpret"), CASES)
def test_the_kernel_equals_the_recurrence_in_float64(
    length: int, channels: int, batch: int, dtype: Any, interpret: Any
) -> None:
    """Outputs, the state, and all gradients; strictly: with every memory poisoned and races looked for."""
    *arrays, segment = inputs(length, channels, batch=batch, dtype=dtype)
    run = lambda *a: linear_scan(*a, segment, linear.CHUNK, interpret)
    found = jax.jit(functools.partial(graded, run))(*arrays)
    assert [x.dtype for x in found] == [dtype, arrays[2].dtype, dtype, dtype, arrays[2].dtype]
    right = in_float64(lambda *a: reference(*a, segment), *arrays)
    assert_same(NAMES, found, right, BFLOAT16 if dtype == jnp.bfloat16 else FLOAT32)


@parts
def test_a_kernel_that_is_wrong_is_found(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that loses a thousandth of the state between chunks, or of its gradient, as a control of the test above."""
    log_decay, drive, state, segment = inputs(130, 8, batch=1)
    arrays, segment = (jnp.full_like(log_decay, -0.01), drive, state), jnp.zeros_like(segment)
    how = result_of[part]
    right = in_float64(lambda *a: reference(*a, segment), *arrays, how=how)
    run = lambda: jax.jit(lambda *a: how(lambda *b: linear_scan(*b, segment, linear.CHUNK, True), *a))(*arrays)
    if part == "forward":
        assert_same(NAMES, run(), right, FLOAT32)
    monkeypatch.setattr(linear, f"_{part}_kernel", losing(getattr(linear, f"_{part}_kernel")))
    with pytest.raises(AssertionError, match="'h'" if part == "forward" else "'d log_decay'"):
        assert_same(NAMES, run(), right, FLOAT32)


REAL = [(8, 8192, 4096), (2, 16384, 2560), (4, 1000, 192)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_the_kernel_lowers_for_tpus_at_real_shapes(shape: tuple[int, int, int], dtype: str) -> None:
    of = jax.ShapeDtypeStruct
    state = of(shape[::2], "complex64" if dtype == "complex64" else "float32")
    gradients = lambda *a: graded(lambda *arrays: linear_scan(*arrays, a[3]), *a[:3])
    assert kernels_of(gradients, of(shape, dtype), of(shape, dtype), state, of(shape[:2], "int32")) == 2
    planes = 2 if dtype == "complex64" else 1
    assert max(vmem_bytes(shape[2], planes=planes, dtype=dtype).values()) < VMEM


def test_errors_name_the_shapes() -> None:
    log_decay, drive, state, segment = inputs(5, 4)
    with pytest.raises(ValueError, match=r"log_decay \(2, 4, 4\), not \(2, 5, 4\); segment \(2, 4\), not \(2, 5\)"):
        linear_scan(log_decay[:, 1:], drive, state, segment[:, 1:])
    with pytest.raises(ValueError, match="types float32, float32, complex64: all real, or all complex"):
        linear_scan(log_decay, drive, state.astype(jnp.complex64), segment)


@pytest.mark.parametrize("kind", ["each step", "a complex state", "fixed and complex, with gaps"])
def test_the_family_calls_it_where_it_serves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents and padding that is NaN, as a loop over tokens has them; and why it does not serve else."""
    log_decay, drive, state, _ = inputs(20, 6)
    segments, poison = packed()
    options: dict[str, Any] = {}
    if kind == "a complex state":
        state = jax.lax.complex(state, drive[:, 0])
    if kind == "fixed and complex, with gaps":
        log_decay, state = jax.lax.complex(log_decay, drive)[0, 0], state.astype(jnp.complex64)
        options["elapsed"] = poison(jnp.abs(drive[:, :, 0]).at[0, 3].set(0))
    else:
        log_decay = poison(log_decay)
    with pytest.raises(ValueError, match="for TPUs and Hopper GPUs, and this is made for cpu; use 'auto'"):
        diagonal_scan(log_decay, drive, method="pallas", **options)
    monkeypatch.setattr(kernels, "INTERPRET", True)

    def run(method: str) -> Any:
        """Values, and gradients of all arguments."""
        scan = lambda log_decay, drive, state, options: diagonal_scan(
            log_decay, drive, state, segments=segments, method=method, **options
        )
        found, back = jax.vjp(jax.jit(scan), log_decay, poison(drive), state, options)
        return found, back(jax.tree.map(jnp.ones_like, found))

    chex.assert_trees_all_close(run("pallas"), run("sequential"), rtol=FLOAT32, atol=FLOAT32)
    chex.assert_tree_all_finite(run("pallas"))
    with pytest.raises(ValueError, match="does not shard time"):
        diagonal_scan(log_decay, drive, method="pallas", sequence_axis="sequence", **options)
    with jax.enable_x64(True), pytest.raises(ValueError, match="float32 or complex64 at most, not float64"):
        diagonal_scan(log_decay.real, drive, state.real.astype(jnp.float64), method="pallas")
    for chunk, told in (
        (64, "chunks are a multiple of 128 steps, not 64"),
        (0, "a number of steps of at least 1, not 0"),
    ):
        with pytest.raises(ValueError, match=told):
            diagonal_scan(log_decay, drive, method="pallas", chunk=chunk, **options)
