"""`chunk_exponential` and `chunk_sigmoid` in interpret mode against a loop in float64, and their lowering for TPUs."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import exponential, exponential_kernels
from kernels_pallas.chunks import CHUNK, VMEM
from kernels_pallas.exponential import chunk_exponential, chunk_sigmoid, reference
from kernels_pallas.exponential_kernels import Form
from seqmodels.operators import kernels, mlstm_scan
from seqmodels.operators.exponential import ExponentialState
from seqmodels.operators.outer import normalised_linear_attention
from tests.kernels.common import STRICT, assert_same, ids_of, kernels_of, packed

# float32 rounding (6e-8) through chunks of 128 products, relative to the largest entry of an array.
FLOAT32 = 1e-5
# The same for bfloat16, which keeps 8 bits of scores and states in every product.
BFLOAT16 = 3e-2
B, H = 2, 2
EPS = 0.3  # as large as the rest of the denominator: outputs then depend on the maximum, whose gradient is seen
FORMS = {
    "exponential": Form("chunk_exponential", EPS),
    "sigmoid": Form("chunk_sigmoid", EPS, stabilised=False),
    "sigmoid alone": Form("chunk_sigmoid", 0.0, stabilised=False, normalised=False),
}
each = pytest.mark.parametrize("kind", FORMS)
NAMES = ("out", "log_max", "normaliser", "memory")
NAMES += tuple(f"d {name}" for name in ("query", "key", "value", "log_input", "log_forget", *NAMES[1:]))


def inputs(
    kind: str, length: int, key_size: int, value_size: int, *, batch: int = B, dtype: Any = jnp.float32, gates: str = ""
) -> list[Any]:
    """Gates from none to -inf and documents of one step, at a chunk's edges too, the last one of nothing; in the second
    row the state is read to the end. Keys lean to one side, a query to that or the other: where q^T n is near 0 beside
    its terms, no arithmetic keeps its digits."""
    keys = jax.random.split(jax.random.key(0), 8)
    normal = jax.random.normal
    query = (normal(keys[0], (batch, H, length, key_size)) + 1) * key_size**-0.75
    key = normal(keys[1], query.shape) + 1
    value = normal(keys[2], (batch, H, length, value_size))
    a, b = (normal(k, (batch, H, length)) for k in keys[3:5])
    query *= jnp.sign(b + 0.5)[..., None]
    log_input = jnp.where(a < -1.5, -jnp.inf, 4 * a - 4)
    log_forget = jnp.where(b > 1.8, -jnp.inf, -jnp.exp(3 * b - 3)).at[1:].set(-jnp.exp(b[1:] - 6))
    log_max, normaliser = normal(keys[5], (batch, H)), normal(keys[6], (batch, H, key_size)) + 1
    memory = normal(keys[7], (batch, H, key_size, value_size))
    if gates == "huge":  # beyond what any exponential holds, and far beyond where float32 tells 1 from 2
        log_input, log_forget = 1e30 * a, -1e20 * jnp.exp(3 * b)
    if gates == "equal":  # every token and the state are the maximum
        log_input, log_forget, log_max = 0 * a, 0 * b, 0 * log_max
    if gates == "gone":  # nothing before, and nothing written for the whole first chunk and more
        log_input = jnp.where((a > 0.3) | (jnp.arange(length)[None, None] < 140), -jnp.inf, 30 * a)
        log_max, normaliser, memory = jnp.full_like(log_max, -jnp.inf), 0 * normaliser, 0 * memory
    if kind != "exponential":
        log_input, log_max = jax.nn.log_sigmoid(log_input), jnp.zeros_like(log_max)
    start = np.zeros((batch, length), bool)
    start[0, [place for place in (3, 4, 127, 128, 129, length - 1) if place < length]] = True
    if batch > 1:
        log_input = log_input.at[0, :, length - 1].set(-jnp.inf)
    narrow = [x.astype(dtype) for x in (query, key, value)]
    return [*narrow, log_input, log_forget, log_max, normaliser, memory, ids_of(start)]


def run(kind: str, *arrays: Any, save: bool = False, interpret: Any = True) -> Any:
    """A kernel with the three parts of its state, which for `chunk_sigmoid` are two and a 0."""
    *given, log_max, normaliser, memory, segment = arrays
    form, options = FORMS[kind], {"chunk": CHUNK, "save_states": save, "interpret": interpret}
    if form.stabilised:
        return chunk_exponential(*given, (log_max, normaliser, memory), segment, form.eps, **options)
    out, after = chunk_sigmoid(*given, (normaliser, memory), segment, form.eps, form.normalised, **options)
    return out, (log_max, *after)


def graded(run: Any, *arrays: Any) -> Any:
    """Outputs, the state, and the gradients of a sum of both that counts every entry otherwise, and -inf not at all."""
    weighted = lambda x: jnp.sum(jnp.where(x == -jnp.inf, 0, x) * jnp.cos(jnp.arange(x.size)).reshape(x.shape))

    def loss(*arrays: Any) -> Any:
        out, state = run(*arrays)
        return sum(map(weighted, (out.astype(state[2].dtype), *state))), (out, *state)

    gradients, found = jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)(*arrays)
    return (*found, *gradients)


def expected(kind: str, arrays: list[Any]) -> Any:
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays[:8]]
        oracle = lambda *a: reference(*a, arrays[8], FORMS[kind])
        return jax.tree.map(np.asarray, jax.jit(functools.partial(graded, oracle))(*wide))


def check(kind: str, found: Any, right: Any, tolerance: float) -> None:
    """`assert_same`, or equal where all is 0 or -inf; without the gradient of a log_max that is no state."""
    for name, x, y in zip(NAMES, found, right, strict=True):
        if name != "d log_max" or FORMS[kind].stabilised:
            x, y = np.asarray(x), np.asarray(y)
            finite = y != -np.inf
            assert np.array_equal(x != -np.inf, finite), name
            if np.any(y[finite]):
                assert_same([name], [x[finite]], [y[finite]], tolerance)
            else:
                assert not np.any(x[finite]), name


# Interpretation takes the time of its grid points: strictly there is one head, and of two rows one has documents of a
# step and one a state that is carried to the end.
CASES = [
    # kind, length, key and value size, batch, type, gates, whether states are kept, how the kernel runs
    pytest.param("exponential", 130, 16, 8, 2, jnp.float32, "", True, STRICT, id="strictly"),
    pytest.param("sigmoid", 130, 16, 8, 2, jnp.float32, "", True, True, id="sigmoid"),
    *(
        pytest.param(*case, id=name, marks=pytest.mark.slow)
        for name, case in {
            "one step": ("exponential", 1, 16, 24, 2, jnp.float32, "", False, True),
            "huge gates": ("exponential", 200, 16, 16, 2, jnp.float32, "huge", False, True),
            "equal gates": ("exponential", 200, 16, 16, 2, jnp.float32, "equal", False, True),
            "nothing": ("exponential", 300, 16, 16, 2, jnp.float32, "gone", True, True),
            "chunk and a part": ("exponential", 200, 32, 16, 2, jnp.float32, "", False, True),
            "states computed again, strictly": ("exponential", 130, 16, 16, 2, jnp.bfloat16, "", False, STRICT),
            "bfloat16": ("exponential", 130, 64, 64, 2, jnp.bfloat16, "", False, True),
            "wide heads": ("exponential", 130, 256, 512, 1, jnp.float32, "", False, True),
            "wide heads in bfloat16": ("exponential", 300, 256, 256, 1, jnp.bfloat16, "", True, True),
            "sigmoid, strictly": ("sigmoid", 130, 16, 8, 2, jnp.float32, "", False, STRICT),
            "sigmoid in bfloat16": ("sigmoid", 130, 64, 64, 2, jnp.bfloat16, "", False, True),
            "sigmoid of nothing": ("sigmoid", 300, 16, 16, 2, jnp.float32, "gone", False, True),
            "sigmoid alone": ("sigmoid alone", 200, 32, 16, 2, jnp.float32, "", False, True),
            "sigmoid alone in bfloat16": ("sigmoid alone", 130, 64, 64, 2, jnp.bfloat16, "", False, True),
        }.items()
    ),
]


@pytest.mark.parametrize(
    ("kind", "length", "key_size", "value_size", "batch", "dtype", "gates", "save", "interpret"), CASES
)
def test_the_kernel_equals_the_recurrence_in_float64(
    kind: str, length: int, key_size: int, value_size: int, batch: int, dtype: Any, gates: str, save: bool,
    interpret: Any,
) -> None:  # fmt: skip
    """Outputs, the state, and all gradients; strictly: with every memory poisoned and races looked for."""
    arrays = inputs(kind, length, key_size, value_size, batch=batch, dtype=dtype, gates=gates)
    if interpret is STRICT:
        arrays[:8] = (x[:, :1] for x in arrays[:8])
    kernel = lambda *a: run(kind, *a, arrays[8], save=save, interpret=interpret)
    found = jax.jit(functools.partial(graded, kernel))(*arrays[:8])
    assert [x.dtype for x in found[:4]] == [dtype, *[jnp.float32] * 3]
    assert [x.dtype for x in found[4:]] == [*[dtype] * 3, *[jnp.float32] * 5]
    check(kind, found, expected(kind, arrays), FLOAT32 if dtype == jnp.float32 else BFLOAT16)


@pytest.mark.parametrize("kind", ["exponential", "sigmoid"])
def test_outputs_are_divided_by_either_side_of_the_denominator(kind: str) -> None:
    """In the cases above: with values of 1 and no eps, outputs are 1 where q^T n is the larger, and below it else."""
    arrays = inputs(kind, 200, 32, 1)
    arrays[2], arrays[7] = jnp.ones_like(arrays[2]), arrays[6][..., None]
    out, _ = jax.jit(lambda *a: reference(*a, FORMS[kind]._replace(eps=0.0)))(*arrays)
    below = np.mean(np.abs(out) < 1 - FLOAT32)
    assert 0.1 < below < 0.9


def spoiled(forward: Any, form: Form, *refs: Any) -> None:
    forward(form, *refs)
    refs[-1][...] *= 0.999


WRONG = {
    # what is lost: where, what instead, and what is found to be wrong
    "a thousandth of the memory": (
        "forward_kernel", functools.partial(spoiled, exponential_kernels.forward_kernel), "out",
    ),
    "a thousandth of its gradient": (
        "backward_kernel", functools.partial(spoiled, exponential_kernels.backward_kernel), "d key",
    ),
    "the gradient of the maximum": (
        "_through_maximum", lambda logs, d_inside, d_reach, d_max: (d_inside, d_reach), "d log_input",
    ),
}  # fmt: skip


SPOILT = [
    pytest.param("exponential", ("a thousandth of the memory", "the gradient of the maximum")),
    pytest.param("exponential", ("a thousandth of its gradient",), marks=pytest.mark.slow),
    pytest.param("sigmoid", ("a thousandth of the memory", "a thousandth of its gradient"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "lost"), SPOILT)
def test_a_kernel_that_is_wrong_is_found(kind: str, lost: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As controls of the test above; what comes before it in the order of names is right."""
    arrays = inputs(kind, 130, 16, 16, batch=1)
    arrays[4], arrays[8] = jnp.full_like(arrays[4], -0.01), jnp.zeros_like(arrays[8])
    right = expected(kind, arrays)
    found = lambda: jax.jit(functools.partial(graded, lambda *a: run(kind, *a, arrays[8], save=True)))(*arrays[:8])
    check(kind, found(), right, FLOAT32)
    for name, wrong, told in map(WRONG.__getitem__, lost):
        with monkeypatch.context() as patch:
            patch.setattr(exponential_kernels, name, wrong)
            spoilt = found()
        with pytest.raises(AssertionError, match=f"'{told}'"):
            check(kind, spoilt, right, FLOAT32)


def test_the_sigmoid_form_is_linear_attention_with_its_sum_of_weights() -> None:
    *given, _, normaliser, memory, _ = inputs("sigmoid", 200, 32, 16)
    swap = lambda x: jnp.swapaxes(x, 1, 2)

    def linear(query: Any, key: Any, value: Any, log_input: Any, log_forget: Any) -> Any:
        gated = swap(key * jnp.exp(log_input)[..., None])
        out = normalised_linear_attention(swap(query), gated, swap(value), swap(log_forget), (memory, normaliser))
        return swap(out[0] / (jnp.maximum(jnp.abs(out[1]), 1) + EPS)), (*out[2][::-1],)

    segment = jnp.zeros((B, 200), jnp.int32)
    kernel = lambda *a: run("sigmoid", *a, jnp.zeros((B, H)), normaliser, memory, segment)
    out, (_, *after) = jax.jit(kernel)(*given)
    chex.assert_trees_all_close((out, tuple(after)), jax.jit(linear)(*given), rtol=FLOAT32, atol=10 * FLOAT32)


def shapes(batch: int, length: int, heads: int, key_size: int, value_size: int, dtype: Any) -> list[Any]:
    of = lambda *shape, dtype="float32": jax.ShapeDtypeStruct((batch, heads, *shape), dtype)
    wide = [of(length, size, dtype=dtype) for size in (key_size, key_size, value_size)]
    state = [of(), of(key_size), of(key_size, value_size)]
    return [*wide, of(length), of(length), *state, jax.ShapeDtypeStruct((batch, length), "int32")]


# The first is xLSTM-7B's, the last the bench's.
REAL = [(2, 8192, 8, 256, 512), (8, 2048, 4, 128, 256), (4, 1000, 4, 64, 64), (4, 2048, 16, 128, 128)]


@pytest.mark.parametrize(
    ("kind", "shape", "dtype"),
    [*itertools.product(["exponential"], REAL, ("bfloat16", "float32")), ("sigmoid", REAL[0], "bfloat16")],
    ids=str,
)
def test_the_kernel_lowers_for_tpus_at_real_shapes(kind: str, shape: tuple[int, ...], dtype: str) -> None:
    """Forward, and backward with states computed again (three programs) and kept (two); all within the memory."""
    for save, programs in ((False, 3), (True, 2)):

        def gradients(*arrays: Any, save: bool = save) -> Any:
            return graded(lambda *a: run(kind, *a, arrays[8], save=save, interpret=False), *arrays[:8])

        assert kernels_of(gradients, *shapes(*shape, dtype)) == programs
    assert max(exponential.vmem_bytes(*shape[3:], CHUNK, dtype).values()) < VMEM


@each
def test_errors_name_the_shapes(kind: str) -> None:
    arrays = inputs(kind, 5, 4, 3)
    arrays[3], arrays[6], arrays[8] = arrays[3][:, :1], arrays[6][..., 1:], arrays[8][:, 1:]
    told = r"log_input \(2, 1, 5\), not \(2, 2, 5\); normaliser \(2, 2, 3\), not \(2, 2, 4\); segment \(2, 4\), not"
    with pytest.raises(ValueError, match=told):
        run(kind, *arrays)


def test_the_family_calls_it_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents and padding that is NaN, as a loop over tokens has them; and why it does not serve else."""
    *given, log_max, normaliser, memory, _ = inputs("exponential", 20, 8, 6)
    arrays = [jnp.swapaxes(x, 1, 2) for x in given]
    segments, poison = packed()
    with pytest.raises(ValueError, match="for TPUs and Hopper GPUs, and this is made for cpu; use 'auto'"):
        mlstm_scan(*arrays, method="pallas")
    monkeypatch.setattr(kernels, "INTERPRET", True)
    warm = ExponentialState(log_max, normaliser, memory)

    def gradients(method: str) -> Any:
        def scan(*a: Any) -> Any:
            return mlstm_scan(*a[:5], ExponentialState(*a[5:]), eps=EPS, segments=segments, method=method)

        return jax.jit(functools.partial(graded, scan))(*map(poison, arrays), *warm)

    chex.assert_trees_all_close(gradients("pallas"), gradients("sequential"), rtol=FLOAT32, atol=10 * FLOAT32)
    found, right = (jax.jit(functools.partial(mlstm_scan, method=m))(*arrays) for m in ("pallas", "sequential"))
    assert isinstance(found[1], ExponentialState)
    chex.assert_trees_all_close(found, right, rtol=FLOAT32, atol=10 * FLOAT32)
    refused = {
        "does not shard time": {"sequence_axis": "sequence"},
        "of one type, bfloat16 or float32, not": {"value": arrays[2].astype(jnp.bfloat16)},
        "chunks are a multiple of 128 steps, not 64": {"chunk": 64},
        "heads of 2000 keys and 6 values take .* bytes of VMEM": {
            name: jnp.zeros((B, 20, H, 2000)) for name in ("query", "key")
        },
    }
    names = dict(zip(("query", "key", "value", "log_input", "log_forget"), arrays, strict=True))
    for told, changes in refused.items():
        with pytest.raises(ValueError, match=told):
            mlstm_scan(**{**names, **changes}, method="pallas")
