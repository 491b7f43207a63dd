"""`chunk_outer_keys` with the bonus of RWKV-6 against a loop in float64, and its lowering for TPUs."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import outer_keys
from kernels_pallas.chunks import CHUNK, VMEM
from kernels_pallas.outer_keys import chunk_outer_keys, reference
from seqmodels.operators import gated_linear_attention, kernels
from tests.kernels import test_outer
from tests.kernels.common import REAL, STRICT, assert_same, graded, in_float64, kernels_of, packed
from tests.kernels.test_outer import BFLOAT16, FLOAT32, H

NAMES = (*test_outer.NAMES, "d bonus")


def inputs(*sizes: int, heads: int = H, **options: Any) -> tuple[list[Any], Any]:
    """`([query, key, value, log_decay, state, bonus], segment)`."""
    *arrays, segment = test_outer.inputs(*sizes, heads=heads, **options, per_key=True)
    return [*arrays, 1 + jax.random.normal(jax.random.key(7), (heads, sizes[1]))], segment


def run(segment: Any, *arrays: Any, save: bool = False, interpret: Any = True) -> Any:
    *given, bonus = arrays
    return chunk_outer_keys(*given, segment, CHUNK, save, interpret, bonus)


# As without a bonus, strictly there is one head, and of two rows one has a state that is carried to the end.
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
        }.items()
    ),
]


@pytest.mark.parametrize(("length", "key_size", "value_size", "batch", "dtype", "save", "interpret"), CASES)
def test_the_kernel_equals_the_recurrence_in_float64(
    length: int, key_size: int, value_size: int, batch: int, dtype: Any, save: bool, interpret: Any
) -> None:
    """Outputs, the state, and all gradients; strictly: with every memory poisoned and races looked for."""
    heads = 1 if interpret is STRICT else H
    arrays, segment = inputs(length, key_size, value_size, batch=batch, heads=heads, dtype=dtype)
    kernel = functools.partial(run, segment, save=save, interpret=interpret)
    found = jax.jit(functools.partial(graded, kernel))(*arrays)
    assert [x.dtype for x in found] == [dtype, jnp.float32, *[dtype] * 3, *[jnp.float32] * 3]
    right = in_float64(lambda *a: reference(*a, segment), *arrays)
    assert_same(NAMES, found, right, FLOAT32 if dtype == jnp.float32 else BFLOAT16)


def test_a_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose outputs see a thousandth too little of the bonus, and one whose gradient of it is the last chunk's."""
    arrays, segment = inputs(130, 16, 16, batch=1)
    right = in_float64(lambda *a: reference(*a, segment), *arrays)
    kernel = functools.partial(run, segment)
    found = lambda call: jax.jit(call)(*arrays)
    assert_same(NAMES, found(lambda *a: kernel(*a)), right, FLOAT32)

    def forward(*refs: Any) -> None:
        refs[6][...] *= 0.999
        outer_keys._forward_kernel(*refs, bonus=True)

    def backward(*refs: Any) -> None:
        refs[-2][...] = jnp.zeros_like(refs[-2])
        outer_keys._backward_kernel(*refs, bonus=True)

    right_form = outer_keys.BONUS
    monkeypatch.setattr(outer_keys, "BONUS", right_form._replace(forward=forward))
    with pytest.raises(AssertionError, match="'out'"):
        assert_same(NAMES, found(lambda *a: kernel(*a)), right, FLOAT32)
    monkeypatch.setattr(outer_keys, "BONUS", right_form._replace(backward=backward))
    with pytest.raises(AssertionError, match="'d bonus'"):
        assert_same(NAMES, found(functools.partial(graded, kernel)), right, FLOAT32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(8, 4096, 40, 64), REAL[1], REAL[4]], ids=str)
def test_the_kernel_lowers_for_tpus_at_real_shapes(shape: tuple[int, ...], dtype: str) -> None:
    """Forward, and backward with states computed again (three programs) and kept (two); all within the memory."""
    *arrays, segment = test_outer.shapes("per key", *shape, dtype)
    bonus = jax.ShapeDtypeStruct((shape[2], shape[3]), jnp.float32)
    for save, programs in ((False, 3), (True, 2)):

        def gradients(segment: Any, *arrays: Any, save: bool = save) -> Any:
            return graded(functools.partial(run, segment, save=save, interpret=False), *arrays)

        assert kernels_of(gradients, segment, *arrays, bonus) == programs
    assert max(outer_keys.vmem_bytes(shape[3], shape[3], CHUNK, dtype).values()) < VMEM


def test_errors_name_the_shapes() -> None:
    arrays, segment = inputs(5, 4, 4)
    with pytest.raises(ValueError, match=r"chunk_outer_keys_bonus.*: bonus \(2, 3\), not \(2, 4\)"):
        run(segment, *arrays[:5], arrays[5][:, 1:])


@pytest.mark.parametrize("kind", ["per key", *(pytest.param(x, marks=pytest.mark.slow) for x in ("per head", "none"))])
def test_the_family_calls_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents and padding that is NaN, as a loop over tokens has them, whatever decays."""
    (query, key, value, log_decay, state, bonus), _ = inputs(20, 8, 8)
    log_decay = {"per key": log_decay, "per head": log_decay[..., 0], "none": None}[kind]
    segments, poison = packed()
    given = [None if x is None else poison(jnp.swapaxes(x, 1, 2)) for x in (query, key, value, log_decay)]
    monkeypatch.setattr(kernels, "INTERPRET", True)

    def gradients(method: str) -> Any:
        options: Any = {"segments": segments, "method": method}
        of = lambda value, state, bonus: gated_linear_attention(
            *given[:2], value, given[3], state, bonus=bonus, **options
        )
        return jax.jit(functools.partial(graded, of))(given[2], state, bonus)

    chex.assert_trees_all_close(gradients("pallas"), gradients("sequential"), rtol=FLOAT32, atol=10 * FLOAT32)
