"""`chunk_delta` and `chunk_delta_keys` in interpret mode against a loop in float64, and their lowering for TPUs."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import chunks, delta, delta_keys
from kernels_pallas.chunks import VMEM
from kernels_pallas.delta import chunk_delta
from kernels_pallas.delta_keys import chunk_delta_keys
from seqmodels.operators import delta_rule, kernels
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

# float32 rounding (6e-8) through chunks of 128 products and their inverse, relative to the largest entry of an array.
FLOAT32 = 1e-5
# The same for bfloat16, which keeps 8 bits of scores, states and writes in every product.
BFLOAT16 = 3e-2
# Where a chunk's writes turn each other round, their sums cancel: the XLA form in chunks of 32 to 128 loses as much.
STIFF = 1e-4
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
    stiff: bool = False,
) -> list[Any]:
    """Unit keys, strengths of 0 to 2, both ends among them, decays from none to -inf; documents that go on, and of one
    step, at a chunk's edges too. `stiff`: keys that are almost one, strengths near 2 and no decay, where every step
    turns round what those before it wrote, in one document."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)
    query, key = (normal(batch, G, length, key_size) for _ in range(2))
    value, state = normal(batch, heads, length, value_size), normal(batch, heads, key_size, value_size)
    noise = normal(batch, heads, length, *((key_size,) if per_key else ()))
    log_decay = np.where(noise > 1.8, -np.inf, -np.exp(4 * noise - 3)).astype(np.float32)
    beta = np.clip(1 + 1.2 * normal(batch, heads, length), 0, 2)
    start = np.zeros((batch, length), bool)
    for row, places in enumerate(((3, 4, 127, 128, 129), (0, length - 1))[:batch]):
        start[row, [place for place in places if place < length]] = True
    if stiff:
        key, beta = key[:, :, :1] + 0.1 * key, np.maximum(beta, 1.9)
        log_decay, start = np.zeros_like(log_decay), np.zeros_like(start)
    key = key / np.linalg.norm(key, axis=-1, keepdims=True)
    narrow = [jnp.asarray(x, dtype) for x in (query * key_size**-0.5, key, value)]
    return [*narrow, *map(jnp.asarray, (beta, log_decay, state)), ids_of(start)]


KERNELS: dict[str, Any] = {"per head": (delta, chunk_delta), "per key": (delta_keys, chunk_delta_keys)}
each = pytest.mark.parametrize("kind", KERNELS)


@functools.cache
def graded_kernel(kind: str, save: bool, interpret: Any) -> Any:
    """Of all arrays: outputs, the state and gradients, compiled once for tests of the same shapes."""
    kernel = KERNELS[kind][1]
    return jax.jit(lambda *a: graded(lambda *b: kernel(*b, a[6], chunks.CHUNK, save, interpret), *a[:6]))


def expected(arrays: list[Any]) -> Any:
    return in_float64(lambda *a: delta.reference(*a, arrays[6]), *arrays[:6])


NAMES = ("out", "state", "d query", "d key", "d value", "d beta", "d log_decay", "d state")


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
    found = graded_kernel(kind, save, interpret)(*arrays)
    assert [x.dtype for x in found] == [dtype, jnp.float32, dtype, dtype, dtype, *[jnp.float32] * 3]
    assert_same(NAMES, found, expected(arrays), FLOAT32 if dtype == jnp.float32 else BFLOAT16)


@each
def test_steps_that_turn_round_what_was_just_written_lose_little(kind: str) -> None:
    """Keys that are almost one, strengths near 2 and no decay: the furthest an inverse gets from the identity."""
    arrays = inputs(130, 16, 8, heads=1, per_key=kind == "per key", stiff=True)
    assert_same(NAMES, graded_kernel(kind, True, STRICT)(*arrays), expected(arrays), STIFF)


@each
@pytest.mark.slow
def test_chunks_of_other_lengths_give_the_same(kind: str) -> None:
    """A power of two where decays are per key; any where they are per head."""
    arrays = inputs(300, 16, 8, batch=1, per_key=kind == "per key")
    right = jax.jit(delta.reference)(*arrays)
    run = lambda chunk: KERNELS[kind][1](*arrays, chunk, False, True)
    assert_same(NAMES, run(256), right, FLOAT32)
    if kind == "per head":
        assert_same(NAMES, run(384), right, FLOAT32)
    else:
        with pytest.raises(ValueError, match="a power of two of them, not 384"):
            run(384)


@each
@parts
def test_a_kernel_that_is_wrong_is_found(part: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control of the tests above."""
    module, kernel = KERNELS[kind]
    *arrays, segment = inputs(130, 16, 16, batch=1, per_key=kind == "per key")
    arrays[4], segment = jnp.full_like(arrays[4], -0.01), jnp.zeros_like(segment)
    run = lambda *a: kernel(*a, segment, chunks.CHUNK, True, True)
    right = lambda *a: delta.reference(*a, segment)
    assert_a_loss_is_found(part, module, run, right, arrays, NAMES, FLOAT32, monkeypatch)


def shapes(kind: str, batch: int, length: int, heads: int, size: int, dtype: Any) -> list[Any]:
    of = jax.ShapeDtypeStruct
    wide = [of((batch, heads, length, size), dtype)] * 3
    gates = [of((batch, heads, length), jnp.float32)] * 2
    if kind == "per key":
        gates[1] = of((batch, heads, length, size), jnp.float32)
    return [*wide, *gates, of((batch, heads, size, size), jnp.float32), of((batch, length), jnp.int32)]


# float32 once a size of heads: batches, lengths and heads are but grid points.
@each
@pytest.mark.parametrize(("shape", "dtype"), LOWERED, ids=str)
def test_the_kernel_lowers_for_tpus_at_real_shapes(kind: str, shape: tuple[int, ...], dtype: str) -> None:
    """Forward, and backward with states computed again (three programs) and kept (two); all within the memory."""
    for save, programs in ((False, 3), (True, 2)):

        def gradients(*arrays: Any, save: bool = save) -> Any:
            run = functools.partial(KERNELS[kind][1], save_states=save)
            loss = lambda *a: sum(jnp.sum(x.astype(jnp.float32)) for x in run(*a, arrays[6]))
            return jax.value_and_grad(loss, tuple(range(6)))(*arrays[:6])

        assert kernels_of(gradients, *shapes(kind, *shape, dtype)) == programs
    assert max(KERNELS[kind][0].vmem_bytes(shape[3], shape[3], chunks.CHUNK, dtype).values()) < VMEM


@each
def test_errors_name_the_shapes(kind: str) -> None:
    kernel, arrays = KERNELS[kind][1], inputs(5, 4, 4, per_key=kind == "per key")
    with pytest.raises(ValueError, match=r"key \(2, 1, 4, 4\), not \(2, 1, 5, 4\); segment \(2, 4\), not \(2, 5\)"):
        kernel(arrays[0], arrays[1][:, :, 1:], *arrays[2:6], arrays[6][:, 1:])
    with pytest.raises(ValueError, match=r"query \(2, 1, 5, 4\): beta \(2, 2, 4\), not \(2, 2, 5\)"):
        kernel(*arrays[:3], arrays[3][:, :, 1:], *arrays[4:])
    wide = [jnp.repeat(x, 3, axis=1) for x in arrays[:2]]
    with pytest.raises(ValueError, match="3 groups of queries for 2 heads"):
        kernel(*wide, *arrays[2:])


@pytest.mark.parametrize("kind", [*KERNELS, "none"])
def test_the_family_calls_it_where_it_serves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents and padding that is NaN, as a loop over tokens has them; and why it does not serve else."""
    *arrays, state, _ = inputs(20, 8, 8, per_key=kind == "per key")
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    names = dict(zip(("query", "key", "value", "beta", "log_decay"), map(swap, arrays), strict=True))
    if kind == "none":
        del names["log_decay"]
    segments, poison = packed()
    with pytest.raises(ValueError, match="for TPUs and Hopper GPUs, and this is made for cpu; use 'auto'"):
        delta_rule(**names, method="pallas")
    monkeypatch.setattr(kernels, "INTERPRET", True)
    for given, told in (((state, segments)), ((None, None))):
        fill = (lambda x: x) if told is None else poison
        run = lambda method, given=given, told=told: functools.partial(
            delta_rule, state=given, segments=told, method=method
        )
        found, right = (jax.jit(run(method))(**jax.tree.map(fill, names)) for method in ("pallas", "sequential"))
        chex.assert_trees_all_close(found, right, rtol=FLOAT32, atol=10 * FLOAT32)
    refused: dict[str, dict[str, Any]] = {
        "does not shard time": {"sequence_axis": "sequence"},
        "of one type, bfloat16 or float32, not": {"value": names["value"].astype(jnp.bfloat16)},
        "chunks are a multiple of 128 steps, not 64": {"chunk": 64},
        r"state \[B, H, K, V\].*\(2, 2, 8, 7\)": {"state": state[..., 1:]},
    }
    for told, changes in refused.items():
        with pytest.raises(ValueError, match=told):
            delta_rule(**{**names, **changes}, method="pallas")
