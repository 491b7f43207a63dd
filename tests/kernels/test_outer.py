"""`chunk_outer` and `chunk_outer_keys` in interpret mode against a loop in float64, and their lowering for TPUs."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import outer, outer_keys
from kernels_pallas.chunks import VMEM
from kernels_pallas.outer import chunk_outer
from kernels_pallas.outer_keys import chunk_outer_keys
from seqmodels.operators import gated_linear_attention, kernels
from tests.kernels.common import (
    LOWERED,
    STRICT,
    assert_a_loss_is_found,
    assert_same,
    graded,
    ids_of,
    in_float64,
    kernels_of,
    packed,
    parts,
)

# float32 rounding (6e-8) through chunks of 128 products, relative to the largest entry of an array.
FLOAT32 = 1e-5
# The same for bfloat16, which keeps 8 bits of scores and states in every product.
BFLOAT16 = 3e-2
B, G, H = 2, 1, 2


def inputs(
    length: int,
    key_size: int,
    value_size: int,
    *,
    batch: int = B,
    heads: int = H,
    dtype: Any = jnp.float32,
    per_key: bool = False,
) -> list[Any]:
    """Decays from none to -inf; documents of one step, at a chunk's edges too; a state that is read to the end."""
    keys = jax.random.split(jax.random.key(0), 5)
    query, key = (jax.random.normal(k, (batch, G, length, key_size)) * key_size**-0.25 for k in keys[:2])
    value = jax.random.normal(keys[2], (batch, heads, length, value_size))
    noise = jax.random.normal(keys[3], (batch, heads, length, *((key_size,) if per_key else ())))
    log_decay = jnp.where(noise > 1.8, -jnp.inf, -jnp.exp(4 * noise - 3))
    log_decay = log_decay.at[1:].set(-jnp.exp(noise[1:] - 4))
    state = jax.random.normal(keys[4], (batch, heads, key_size, value_size))
    start = np.zeros((batch, length), bool)
    start[0, [place for place in (3, 4, 127, 128, 129, length - 1) if place < length]] = True
    narrow = [x.astype(dtype) for x in (query, key, value)]
    return [*narrow, log_decay, state, ids_of(start)]


KERNELS = {"per head": (outer, chunk_outer), "per key": (outer_keys, chunk_outer_keys)}
each = pytest.mark.parametrize("kind", KERNELS)


def expected(kind: str, arrays: list[Any]) -> Any:
    return in_float64(lambda *a: outer.reference(*a, arrays[5]), *arrays[:5])


NAMES = ("out", "state", "d query", "d key", "d value", "d log_decay", "d state")


# Interpretation takes the time of its grid points: strictly there is one head, and of two rows one has documents of a
# step and one a state that is carried to the end.
CASES = [
    # length, key and value size, batch, type, whether states are kept, how the kernel runs
    pytest.param(130, 16, 8, 2, jnp.float32, True, STRICT, id="strictly"),
    *(
        pytest.param(*case, id=name, marks=pytest.mark.slow)
        for name, case in {
            "one step": (1, 16, 24, 2, jnp.float32, False, True),
            "chunk and a part": (200, 32, 16, 2, jnp.float32, False, True),
            "states computed again, strictly": (130, 16, 16, 2, jnp.bfloat16, False, STRICT),
            "bfloat16": (130, 64, 64, 2, jnp.bfloat16, False, True),
            "wide heads": (130, 256, 256, 1, jnp.float32, False, True),
            "wide heads in bfloat16": (300, 128, 256, 1, jnp.bfloat16, True, True),
        }.items()
    ),
]


@each
@pytest.mark.parametrize(("length", "key_size", "value_size", "batch", "dtype", "save", "interpret"), CASES)
def test_the_kernel_equals_the_recurrence_in_float64(
    kind: str, length: int, key_size: int, value_size: int, batch: int, dtype: Any, save: bool, interpret: Any
) -> None:
    """Outputs, the state, and all gradients; strictly: with every memory poisoned and races looked for."""
    heads = 1 if interpret is STRICT else H
    arrays = inputs(length, key_size, value_size, batch=batch, heads=heads, dtype=dtype, per_key=kind == "per key")
    run = lambda *a: KERNELS[kind][1](*a, arrays[5], outer.CHUNK, save, interpret)
    found = jax.jit(functools.partial(graded, run))(*arrays[:5])
    assert found[0].dtype == dtype
    assert all(x.dtype == dtype for x in found[2:5])
    assert found[1].dtype == jnp.float32
    assert_same(NAMES, found, expected(kind, arrays), FLOAT32 if dtype == jnp.float32 else BFLOAT16)


@each
@parts
def test_a_kernel_that_is_wrong_is_found(part: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control of the test above."""
    module, kernel = KERNELS[kind]
    *arrays, segment = inputs(130, 16, 16, batch=1, per_key=kind == "per key")
    arrays[3], segment = jnp.full_like(arrays[3], -0.01), jnp.zeros_like(segment)
    run = lambda *a: kernel(*a, segment, outer.CHUNK, True, True)
    right = lambda *a: outer.reference(*a, segment)
    assert_a_loss_is_found(part, module, run, right, arrays, NAMES, FLOAT32, monkeypatch)


def shapes(kind: str, batch: int, length: int, heads: int, size: int, dtype: Any) -> list[Any]:
    of = jax.ShapeDtypeStruct
    wide = [of((batch, heads, length, size), dtype)] * 3
    decays = (batch, heads, length, size) if kind == "per key" else (batch, heads, length)
    gates = of(decays, jnp.float32), of((batch, heads, size, size), jnp.float32)
    return [*wide, *gates, of((batch, length), jnp.int32)]


# float32 once a size of heads: batches, lengths and heads are but grid points.
@each
@pytest.mark.parametrize(("shape", "dtype"), LOWERED, ids=str)
def test_the_kernel_lowers_for_tpus_at_real_shapes(kind: str, shape: tuple[int, ...], dtype: str) -> None:
    """Forward, and backward with states computed again (three programs) and kept (two); all within the memory."""
    for save, programs in ((False, 3), (True, 2)):

        def gradients(*arrays: Any, save: bool = save) -> Any:
            run = functools.partial(KERNELS[kind][1], save_states=save)
            loss = lambda *a: sum(jnp.sum(x.astype(jnp.float32)) for x in run(*a, arrays[5]))
            return jax.value_and_grad(loss, (0, 1, 2, 3, 4))(*arrays[:5])

        assert kernels_of(gradients, *shapes(kind, *shape, dtype)) == programs
    assert max(KERNELS[kind][0].vmem_bytes(shape[3], shape[3], outer.CHUNK, dtype).values()) < VMEM


@each
def test_errors_name_the_shapes(kind: str) -> None:
    kernel, arrays = KERNELS[kind][1], inputs(5, 4, 4, per_key=kind == "per key")
    with pytest.raises(ValueError, match=r"key \(2, 1, 4, 4\), not \(2, 1, 5, 4\); segment \(2, 4\), not \(2, 5\)"):
        kernel(arrays[0], arrays[1][:, :, 1:], *arrays[2:5], arrays[5][:, 1:])
    wide = [jnp.repeat(x, 3, axis=1) for x in arrays[:2]]
    with pytest.raises(ValueError, match="3 groups of queries for 2 heads"):
        kernel(*wide, *arrays[2:])


@each
def test_the_family_calls_it_where_it_serves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents and padding that is NaN, as `auto` has them; and why it does not serve else."""
    query, key, value, log_decay, state, _ = inputs(20, 8, 8, per_key=kind == "per key")
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    arrays = [swap(x) for x in (query, key, value, log_decay)]
    segments, poison = packed()
    with pytest.raises(ValueError, match=r"the kernel is for TPUs.*, and this is made for cpu; use 'auto'"):
        gated_linear_attention(*arrays, method="pallas")
    monkeypatch.setattr(kernels, "INTERPRET", True)
    for given, told in (((state, segments)), ((None, None))):
        fill = (lambda x: x) if told is None else poison
        found, right = (
            jax.jit(functools.partial(gated_linear_attention, segments=told, method=method))(*map(fill, arrays), given)
            for method in ("pallas", "sequential")
        )
        chex.assert_trees_all_close(found, right, rtol=FLOAT32, atol=10 * FLOAT32)
    refused = {
        "does not shard time": {"sequence_axis": "sequence"},
        "of one type, bfloat16 or float32, not": {"value": arrays[2].astype(jnp.bfloat16)},
        "chunks are a multiple of 128 steps, not 64": {"chunk": 64},
    }
    for told, changes in refused.items():
        names = dict(zip(("query", "key", "value", "log_decay"), arrays, strict=True))
        with pytest.raises(ValueError, match=told):
            gated_linear_attention(**{**names, **changes}, method="pallas")
