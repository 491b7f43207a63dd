"""`chunk_exponential` and `chunk_sigmoid` for Hopper GPUs: interpreted against a loop in float64, and lowered."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.exponential import reference
from kernels_pallas.gpu import common, exponential_walk
from kernels_pallas.gpu import exponential as gpu
from kernels_pallas.gpu.exponential import chunk_exponential, chunk_sigmoid, shared_memory
from kernels_pallas.gpu.walk import CARRIED
from seqmodels.operators import mlstm_scan
from seqmodels.operators.exponential import ExponentialState
from tests.kernels import test_exponential as tpu
from tests.kernels.common import assert_same, gpu_kernels_of, ids_of, packed
from tests.kernels.hopper import (
    STRICT,
    assert_it_says_why_not,
    interpreted,
    pretend_hopper,
    shared_memory_of,
)
from tests.kernels.test_exponential import EPS, FORMS, NAMES, expected, graded, shapes

# bfloat16 keeps 8 bits (4e-3) of scores, weighted values and states in every product, and of the outputs.
BFLOAT16 = 2e-2
# Gates' gradients are sums of k . dk and q . dq over a chunk, each with such an error; relative to the largest dot.
SUMS = 3e-2
# The state's own part in decays' gradients is a sum of K V products, each off by such a rounding, to either side.
ROUNDED = 4e-3
# float32 rounding (6e-8) of gates, and of sums over 200 steps.
FLOAT32 = 2e-6


def inputs(kind: str, length: int, key_size: int, value_size: int, heads: int, gates: str = "") -> list[Any]:
    """Those of the kernels for TPUs, in bfloat16: row 0 has documents of one step, at chunks' edges too, and ends with
    one of nothing; row 1 reads its state to the end."""
    arrays = tpu.inputs(kind, length, key_size, value_size, dtype=jnp.bfloat16, gates=gates)
    start = np.zeros((2, length), bool)
    start[0, [place for place in (3, 4, 63, 64, 65, length - 1) if place < length]] = True
    return [*(x[:, :heads] for x in arrays[:8]), ids_of(start)]


def run(kind: str, *arrays: Any, interpret: Any = False) -> Any:
    """A kernel with the three parts of its state, which for `chunk_sigmoid` are two and a 0."""
    *given, log_max, normaliser, memory, segment = arrays
    form = FORMS[kind]
    if form.stabilised:
        return chunk_exponential(*given, (log_max, normaliser, memory), segment, form.eps, interpret)
    out, after = chunk_sigmoid(*given, (normaliser, memory), segment, form.eps, form.normalised, interpret)
    return out, (log_max, *after)


def check(kind: str, arrays: list[Any], found: Any, right: Any) -> None:
    """As for TPUs, each array within its tolerance; gates' gradients, which cancel, by the size of what is summed."""
    named = dict(zip(NAMES, right, strict=True))
    wide = lambda x: np.asarray(x, np.float64)
    dots = [np.sum(wide(x) * named[f"d {name}"], axis=3) for name, x in zip(("query", "key"), arrays, strict=False)]
    for name, x in zip(NAMES, found, strict=False):
        if name != "d log_max" or FORMS[kind].stabilised:
            x, y = wide(x), wide(named[name])
            finite = y != -np.inf
            assert np.array_equal(x != -np.inf, finite), name
            gates = name in ("d log_input", "d log_forget", "d log_max")
            sizes = [y[finite], *dots] if gates else [y[finite]]
            most = (SUMS if gates else BFLOAT16) * max(np.max(np.abs(part), initial=0) for part in sizes)
            if name == "d log_forget":
                most += ROUNDED * np.max(np.linalg.norm(wide(arrays[7]) * named["d memory"], axis=(2, 3)))
            assert np.all(np.abs(x[finite] - y[finite]) <= most), name


CASES = [
    # kind, length, key and value size, heads, gates
    pytest.param("exponential", 70, 64, 64, 1, "", id="a chunk and a part"),
    *(
        pytest.param(*case, id=name, marks=pytest.mark.slow)
        for name, case in {
            "one step": ("exponential", 1, 64, 64, 2, ""),
            "whole chunks": ("exponential", 192, 64, 64, 2, ""),
            "two blocks of keys": ("exponential", 130, 128, 64, 1, ""),
            "two blocks of values": ("exponential", 200, 64, 128, 2, ""),
            "wide keys": ("exponential", 130, 256, 64, 1, ""),
            "wide values": ("exponential", 130, 64, 256, 1, ""),
            "two blocks of both": ("exponential", 66, 128, 128, 1, ""),
            "the widest": ("exponential", 66, 256, 256, 1, ""),
            "huge gates": ("exponential", 200, 64, 64, 2, "huge"),
            "equal gates": ("exponential", 200, 64, 64, 2, "equal"),
            "nothing": ("exponential", 200, 64, 64, 2, "gone"),
            "sigmoid": ("sigmoid", 130, 64, 64, 2, ""),
            "sigmoid of nothing": ("sigmoid", 200, 64, 64, 2, "gone"),
            "sigmoid alone": ("sigmoid alone", 130, 64, 128, 1, ""),
        }.items()
    ),
]


@interpreted
@pytest.mark.parametrize(("kind", "length", "key_size", "value_size", "heads", "gates"), CASES)
def test_the_kernel_equals_the_recurrence_in_float64(
    kind: str, length: int, key_size: int, value_size: int, heads: int, gates: str
) -> None:
    """Outputs, the state, and all gradients, strictly."""
    arrays = inputs(kind, length, key_size, value_size, heads, gates)
    kernel = lambda *a: run(kind, *a, arrays[8], interpret=STRICT)
    found = jax.jit(functools.partial(graded, kernel))(*arrays[:8])
    assert [x.dtype for x in found[:4]] == [jnp.bfloat16, *[jnp.float32] * 3]
    assert [x.dtype for x in found[4:]] == [x.dtype for x in arrays[:8]]
    check(kind, arrays, found, expected(kind, arrays))


def _lost(right: Any) -> Any:
    return lambda *a: right(*a).at[..., CARRIED, -1].multiply(0.95)


WRONG = [
    # kind, where, what instead, and what is found to be wrong; programs are traced anew for each
    pytest.param(
        "exponential",
        exponential_walk._Program,
        "with_normaliser",
        lambda right: lambda self, slot: 0 * right(self, slot),
        "out",
        id="the normaliser begins anew in every chunk",
    ),
    *(
        pytest.param(*case, id=name, marks=pytest.mark.slow)
        for name, case in {
            "a twentieth of the state is lost between chunks": ("exponential", gpu, "gates_of", _lost, "normaliser"),
            "a twentieth of it is lost under sigmoid gates": ("sigmoid", gpu, "gates_of", _lost, "normaliser"),
            "the gradient of a maximum stays where it is": (
                "exponential",
                gpu,
                "_from_later",
                lambda right: lambda d_max, carried: d_max,
                "d log_input",
            ),
        }.items()
    ),
]


@interpreted
@pytest.mark.parametrize(("kind", "where", "name", "wrong", "told"), WRONG)
def test_a_kernel_that_is_wrong_is_found(
    kind: str, where: Any, name: str, wrong: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As controls of the test above."""
    arrays = inputs(kind, 66, 64, 64, 1)
    arrays = [x[1:] for x in arrays]
    arrays[4] = jnp.full_like(arrays[4], -0.001)
    kernel = lambda *a: run(kind, *a, arrays[8], interpret=STRICT)

    def found() -> Any:
        if told.startswith("d "):
            return jax.jit(functools.partial(graded, kernel))(*arrays[:8])
        out, state = jax.jit(lambda *a: kernel(*a))(*arrays[:8])
        return out, *state

    right = expected(kind, arrays)
    check(kind, arrays, found(), right)
    monkeypatch.setattr(where, name, wrong(getattr(where, name)))
    with pytest.raises(AssertionError, match=f"^{told}"):
        check(kind, arrays, found(), right)


@pytest.mark.parametrize("gates", ["", "huge", "equal", "gone"])
def test_with_gates_under_the_maximum_the_recurrence_is_a_plain_one(gates: str) -> None:
    """What the kernels are built on, for any gates: its states are those under a running maximum."""
    query, key, value, log_input, log_forget, *state, segment = tpu.inputs("exponential", 200, 16, 16, gates=gates)
    steps = jax.jit(functools.partial(gpu._steps, FORMS["exponential"]))(log_input, log_forget, state[0], segment)
    assert max(np.max(steps.decay), np.max(steps.weight)) <= 0
    with jax.enable_x64(True):
        wide = lambda *arrays: [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        plain, state = FORMS["sigmoid alone"], wide(*state)
        given = wide(query, key, value)
        right = reference(*given, *wide(log_input, log_forget), *state, segment, FORMS["exponential"])[1]
        found = reference(*given, *wide(steps.weight, steps.decay), jnp.zeros((2, 2)), *state[1:], segment, plain)[1]
        np.testing.assert_allclose(steps.log_max[..., -1], right[0], rtol=FLOAT32)
        assert_same(["normaliser", "memory"], found[1:], right[1:], FLOAT32)


# The last is the bench's.
REAL = [(4, 1000, 4, 64, 64), (8, 2048, 4, 128, 256), (2, 8192, 8, 256, 256), (4, 2048, 16, 128, 128)]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("exponential", REAL[0]),
        *(pytest.param("exponential", shape, marks=pytest.mark.slow) for shape in REAL[1:]),
        pytest.param("sigmoid", REAL[1], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_kernel_lowers_for_an_h100_at_real_shapes(kind: str, shape: tuple[int, ...]) -> None:
    """One program for the output and three for the gradients, on any host, each in as much memory as is counted."""
    gradients = lambda *a: graded(lambda *b: run(kind, *b, a[8]), *a[:8])
    taken = shared_memory_of(gradients, *shapes(*shape, "bfloat16"))
    counted = shared_memory(*shape[3:]).values()
    assert all(x <= y for x, y in zip(taken, counted, strict=True))


@pytest.mark.parametrize(("key_size", "value_size"), list(itertools.product(common.SIZES, repeat=2)))
def test_programs_fit_into_shared_memory(key_size: int, value_size: int) -> None:
    assert max(shared_memory(key_size, value_size).values()) < common.SHARED


@pytest.mark.parametrize("kind", ["exponential", "sigmoid"])
def test_errors_say_what_the_kernel_takes(kind: str) -> None:
    traced = lambda *arrays: jax.eval_shape(functools.partial(run, kind), *arrays)
    with pytest.raises(ValueError, match="takes bfloat16 and heads of 64, 128, 256, but query is float32 and key is"):
        traced(*shapes(1, 64, 2, 64, 64, "float32"))
    with pytest.raises(ValueError, match=f"chunk_{kind}: .* but that of values is 512"):
        traced(*shapes(1, 64, 2, 64, 512, "bfloat16"))
    arrays = shapes(1, 64, 2, 64, 64, "bfloat16")
    arrays[3] = jax.ShapeDtypeStruct((1, 2, 63), jnp.float32)
    with pytest.raises(ValueError, match=r"log_input \(1, 2, 63\), not \(1, 2, 64\)"):
        traced(*arrays)


@interpreted
@pytest.mark.slow
def test_the_family_calls_it_on_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents and padding that is NaN, as a loop over tokens has them."""
    *given, log_max, normaliser, memory, _ = inputs("exponential", 20, 64, 64, 1)
    segments, poison = packed()
    arrays = [*(poison(jnp.swapaxes(x, 1, 2)) for x in given), log_max, normaliser, memory]

    def gradients(method: str) -> Any:
        def scan(*a: Any) -> Any:
            return mlstm_scan(*a[:5], ExponentialState(*a[5:]), eps=EPS, segments=segments, method=method)

        return jax.jit(functools.partial(graded, scan))(*arrays)

    right = gradients("sequential")
    pretend_hopper(monkeypatch)
    found = gradients("pallas")
    check(
        "exponential",
        [jnp.where(jnp.isnan(x), 0, x) for x in arrays],
        found,
        [np.asarray(x, np.float64) for x in right],
    )
    assert not np.any(found[0][1, 18:])


def test_the_family_lowers_to_it_and_says_why_it_does_not_serve() -> None:
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((1, 20, 2, *shape), dtype)
    shaped = lambda dtype=jnp.bfloat16, size=64: [*[of(size, dtype=dtype)] * 3, of(), of()]
    run = lambda arrays, **changes: mlstm_scan(*arrays, method="pallas", **changes)
    assert gpu_kernels_of(run, shaped()) == 1
    assert_it_says_why_not(run, shaped)
