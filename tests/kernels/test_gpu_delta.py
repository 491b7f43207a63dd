"""`chunk_delta` for Hopper GPUs: interpreted against a loop in float64, lowered without a device."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import delta as tpu
from kernels_pallas.gpu import common, delta_program, delta_solve, walk
from kernels_pallas.gpu import delta as gpu
from kernels_pallas.gpu.delta import chunk_delta, shared_memory
from seqmodels.operators import delta_rule
from tests.kernels.common import REAL, assert_same, gpu_kernels_of, in_float64, pulled
from tests.kernels.hopper import (
    STRICT,
    assert_it_says_why_not,
    assert_the_family_calls_it,
    interpreted,
    shared_memory_of,
)
from tests.kernels.test_delta import NAMES, inputs, shapes
from tests.kernels.test_gpu_outer import BFLOAT16

# Where a chunk's writes turn each other round, their sums cancel, those of d log_decay most. What is lost is that of
# bfloat16 scores, states and writes: the TPU's kernel is off by as much on the same arrays.
STIFF, STIFF_DECAY = 5e-2, 1e-1
# Of an inverse in two terms of bfloat16 (16 bits, 2e-5) through five levels of products, relative to its largest entry:
# where it is near the identity, and where it is furthest from that.
INVERSE, STIFF_INVERSE = 2e-5, 2e-3


CASES = [
    # length, key and value size, batch, whether keys are almost one, whether states are kept
    pytest.param(70, 64, 64, 1, False, False, id="a chunk and a part"),
    *(
        pytest.param(*case, id=name, marks=pytest.mark.slow)
        for name, case in {
            "one step": (1, 64, 64, 2, False, False),
            "whole chunks, states kept": (192, 64, 64, 2, False, True),
            "two blocks": (200, 128, 128, 1, False, False),
            "wide keys": (130, 256, 64, 1, False, False),
            "wide values": (130, 64, 256, 1, False, True),
            "steps that turn round what was just written": (130, 64, 64, 1, True, False),
        }.items()
    ),
]


@interpreted
@pytest.mark.parametrize(("length", "key_size", "value_size", "batch", "stiff", "save"), CASES)
def test_the_kernels_equal_the_recurrence_in_float64(
    length: int, key_size: int, value_size: int, batch: int, stiff: bool, save: bool
) -> None:
    """Outputs, the state, and all gradients, strictly; two heads share their keys."""
    arrays = inputs(length, key_size, value_size, batch=batch, dtype=jnp.bfloat16, stiff=stiff)
    run = lambda *a: chunk_delta(*a, arrays[6], save, STRICT)
    found = jax.jit(functools.partial(pulled, run))(*arrays[:6])
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32, *(x.dtype for x in arrays[:6])]
    right = in_float64(lambda *a: tpu.reference(*a, arrays[6]), *arrays[:6], how=pulled)
    for name, x, y in zip(NAMES, found, right, strict=True):
        cancelled = STIFF_DECAY if name == "d log_decay" else STIFF
        assert_same((name,), [x], [y], cancelled if stiff else BFLOAT16)


@interpreted
@pytest.mark.parametrize("stiff", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_inverses_keep_sixteen_bits(stiff: bool) -> None:
    """With strengths along rows and along columns, against float64."""
    _, key, _, beta, log_decay, _, segment = inputs(64, 64, 64, batch=1, dtype=jnp.bfloat16, stiff=stiff)
    gates = delta_solve.strengths_and_gates(log_decay, beta, segment)
    start = np.diff(np.asarray(segment), prepend=0) != 0
    sums = np.cumsum(np.where(start, common.LOWEST, np.maximum(np.asarray(log_decay[0], np.float64), common.LOWEST)), 1)
    k, strength = np.asarray(key[0, 0], np.float64), np.asarray(beta[0], np.float64)
    scores = (k @ k.T) * np.tril(np.exp(np.tril(sums[:, :, None] - sums[:, None, :])), -1)
    for by_row in (True, False):
        found = jax.jit(lambda *a, by_row=by_row: delta_solve.inverses(*a, by_row, STRICT))(
            jnp.swapaxes(key, 1, 2), gates
        )
        right = np.linalg.inv(np.eye(64) + scores * (strength[:, :, None] if by_row else strength[:, None, :]))
        total = np.sum(np.asarray(found[0, :, 0], np.float64), axis=1)
        assert_same(("inverse",), [total], [right], STIFF_INVERSE if stiff else INVERSE)


def _lost(right: Any) -> Any:
    return lambda *a: right(*a).at[..., walk.CARRIED, -1].multiply(0.95)


def one_term(pair: Any, values: Any) -> None:
    """The low term is what the high one is."""
    pair[0] = values.astype(jnp.bfloat16)
    pair[1] = values.astype(jnp.bfloat16)


WRONG = {
    "a twentieth of the state is lost between chunks": (delta_solve, "gates_of", _lost),
    "what comes after a step is seen": (
        delta_program,
        "chunk_decays",
        lambda right: lambda *a: jnp.maximum(right(*a), 0.2),
    ),
    "what is left of a write counts whole": (delta_program, "split", lambda right: one_term),
}


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "wrong"), WRONG.values(), ids=WRONG)
def test_a_kernel_that_is_wrong_is_found(module: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a control of the first test."""
    arrays = inputs(66, 64, 64, batch=1, dtype=jnp.bfloat16)
    arrays[4], arrays[6] = jnp.full_like(arrays[4], -0.001), jnp.zeros_like(arrays[6])
    found = jax.jit(tpu.reference)(*(x.astype(jnp.float32) for x in arrays[:6]), arrays[6])
    run = lambda: jax.jit(lambda *a: chunk_delta(*a, False, STRICT))(*arrays)
    assert_same(NAMES, run(), found, BFLOAT16)
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    with pytest.raises(AssertionError, match="'out'"):
        assert_same(NAMES, run(), found, BFLOAT16)


@interpreted
@pytest.mark.slow
def test_a_gradient_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the state loses a twentieth between chunks, as a control too; what does not depend on it is right."""
    *arrays, segment = inputs(66, 64, 64, batch=1, dtype=jnp.bfloat16)
    arrays[4], segment = jnp.full_like(arrays[4], -0.001), jnp.zeros_like(segment)
    right = gpu.walk

    def wrong(interpret: Any, *arrays: Any, **others: Any) -> Any:
        if "errors" in others:
            arrays = (*arrays[:3], arrays[3].at[..., walk.CARRIED, -1].multiply(0.95), *arrays[4:])
        return right(interpret, *arrays, **others)

    monkeypatch.setattr(gpu, "walk", wrong)
    found = jax.jit(functools.partial(pulled, lambda *a: chunk_delta(*a, segment, True, STRICT)))(*arrays)
    expected = in_float64(lambda *a: tpu.reference(*a, segment), *arrays, how=pulled)
    with pytest.raises(AssertionError, match="'d key'"):
        assert_same(NAMES, found, expected, BFLOAT16)


def gradients(*arrays: Any, save: bool = False) -> Any:
    run = functools.partial(chunk_delta, save_states=save)
    loss = lambda *a: sum(jnp.sum(x.astype(jnp.float32)) for x in run(*a, arrays[6]))
    return jax.value_and_grad(loss, tuple(range(6)))(*arrays[:6])


@pytest.mark.parametrize("shape", [*REAL[:1], *(pytest.param(x, marks=pytest.mark.slow) for x in REAL[1:])], ids=str)
def test_the_kernels_lower_for_an_h100_at_real_shapes(shape: tuple[int, ...]) -> None:
    """Inverses and a walk forward; backward those two again, then inverses, a walk and gradients: each in as much
    memory as is counted."""
    taken = shared_memory_of(gradients, *shapes("per head", *shape, "bfloat16"))
    counted = shared_memory(shape[3], shape[3])
    order = ("inverses", "forward", "inverses", "forward", "inverses", "backward", "gradients")
    assert all(x <= counted[name] for x, name in zip(taken, order, strict=True))


@pytest.mark.slow
def test_fewer_kernels_run_where_states_are_kept() -> None:
    """The backward pass has three of its own; and heads that share keys."""
    query, key, *others = shapes("per head", *REAL[0], "bfloat16")
    shared = [jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // 4, *x.shape[2:]), x.dtype) for x in (query, key)]
    assert gpu_kernels_of(functools.partial(gradients, save=True), *shared, *others) == 5


@pytest.mark.parametrize(("key_size", "value_size"), list(itertools.product(common.SIZES, repeat=2)))
def test_programs_fit_into_shared_memory(key_size: int, value_size: int) -> None:
    assert max(shared_memory(key_size, value_size).values()) < common.SHARED


def test_errors_say_what_the_kernel_takes() -> None:
    arrays = shapes("per head", 1, 64, 2, 64, "bfloat16")
    with pytest.raises(ValueError, match="takes bfloat16 and heads of 64, 128, 256, but query is float32 and key is"):
        jax.eval_shape(chunk_delta, *shapes("per head", 1, 64, 2, 64, "float32"))
    with pytest.raises(ValueError, match="but that of keys is 96 and that of values is 96"):
        jax.eval_shape(chunk_delta, *shapes("per head", 1, 64, 2, 96, "bfloat16"))
    with pytest.raises(ValueError, match=r"log_decay \(1, 2, 64, 64\), not \(1, 2, 64\)"):
        jax.eval_shape(chunk_delta, *shapes("per key", 1, 64, 2, 64, "bfloat16"))
    with pytest.raises(ValueError, match=r"beta \(1, 2, 64, 64\), not \(1, 2, 64\)"):
        jax.eval_shape(chunk_delta, *arrays[:3], jax.ShapeDtypeStruct((1, 2, 64, 64), jnp.float32), *arrays[4:])


def called(dtype: Any = jnp.bfloat16, size: int = 64, *, per_key: bool = False) -> dict[str, Any]:
    """The arguments of the family's call."""
    query, key, value, beta, log_decay, *_ = inputs(20, size, size, dtype=dtype, per_key=per_key)
    given = {"query": query, "key": key, "value": value, "beta": beta, "log_decay": log_decay}
    return {name: jnp.swapaxes(x, 1, 2) for name, x in given.items()}


def family(arrays: Any, **options: Any) -> Any:
    return delta_rule(**arrays, **options)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("decays", [True, False])
def test_the_family_calls_it_on_a_hopper(decays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents and padding that is NaN, as `sequential` has them; with a decay and with none."""
    arrays = {name: x for name, x in called().items() if decays or name != "log_decay"}
    assert_the_family_calls_it(family, arrays, BFLOAT16, monkeypatch)


def test_the_family_lowers_to_it_and_says_why_it_does_not_serve() -> None:
    shaped = lambda *a, **how: jax.eval_shape(functools.partial(called, *a, **how))
    run = functools.partial(family, method="pallas")
    assert gpu_kernels_of(run, shaped()) == 2
    assert_it_says_why_not(run, shaped)
