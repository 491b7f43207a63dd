"""mLSTM's exponential gates against float64 loops of the equations: laws, gates of any size, segments, gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from seqmodels.operators import mlstm_scan
from seqmodels.operators.exponential import Exponential, ExponentialState, empty_state, exponential_recurrence
from seqmodels.scan import scan
from seqmodels.testing import check_recurrence
from seqmodels.typing import Segments

# float32 rounding (6e-8) over 70 steps with sums of 8 products; gates of 1e2 round their exponents by 1e-5.
ROUNDING = 1e-4
# bfloat16 keeps 8 bits: two parts in a thousand for each rounding of an input or a score.
BFLOAT16 = 3e-2
# Gradients pass the recurrence twice.
GRADIENT = 3e-4
B, T, H, K, V = 2, 70, 2, 8, 6
METHODS = ("sequential", "chunked")
CHUNK = 16  # four of them and a tail
KINDS = ("gentle", "extreme", "huge", "gone")


def _segments() -> Segments:
    """Documents of lengths 1 and more, one row that goes on from its state, and padding at the end of the other."""
    start = np.zeros((B, T), bool)
    start[0, [0, 20, 21, 50]] = True
    start[1, 66] = True
    return Segments(jnp.asarray(start), jnp.asarray(np.arange(T)[None] < np.array([[T], [68]])))


def _qkv(seed: int = 0, dtype: Any = jnp.float32, length: int = T) -> tuple[jax.Array, ...]:
    """Queries and keys lean to one side: where q^T n is near 0 beside its terms, no arithmetic keeps its digits."""
    keys = jax.random.split(jax.random.key(seed), 3)
    noise = [jax.random.normal(k, (B, length, H, n)) for k, n in zip(keys, (K, K, V), strict=True)]
    return (noise[0] + 2).astype(dtype), (noise[1] + 2).astype(dtype), noise[2].astype(dtype)


def _gates(kind: str) -> tuple[jax.Array, jax.Array]:
    """`(log_input, log_forget)`."""
    keys = jax.random.split(jax.random.key(9), 2)
    a, b = (jax.random.normal(k, (B, T, H)) for k in keys)
    return {
        "gentle": (2 * a, jax.nn.log_sigmoid(b + 3)),
        "extreme": (100 * a, -jnp.exp(3 * b)),  # down to exp(-20000) beside exp(-1e-4) inside one chunk
        "huge": (1e30 * a, -1e20 * jnp.exp(3 * b)),
        # Nothing written at the first steps and between; everything forgotten now and then.
        "gone": (
            jnp.where((a > 0.3) | (jnp.arange(T)[None, :, None] < 3), -jnp.inf, 30 * a),
            jnp.where(b > 1, -jnp.inf, -jnp.exp(b)),
        ),
        "faint": (0 * a - 128, 0 * b - 0.125),  # exp(128) is no float32, and neither is exp(-128)
    }[kind]


def _state(seed: int = 5) -> ExponentialState:
    keys = jax.random.split(jax.random.key(seed), 3)
    normal = jax.random.normal
    return ExponentialState(normal(keys[0], (B, H)), 1 + normal(keys[1], (B, H, K)), normal(keys[2], (B, H, K, V)))


def _loop(inputs: Any, state: Any, segments: Segments | None = None, eps: float = 1e-6) -> tuple[np.ndarray, tuple]:
    """The stabilised recurrence (arXiv 2405.04517, appendix), one head at a time, from m = -inf."""
    query, key, value, log_input, log_forget = (np.asarray(x, np.float64) for x in inputs)
    m, n, c = (np.array(x, np.float64) for x in state)
    out = np.zeros(value.shape)
    for b, t, h in np.ndindex(value.shape[:3]):
        if segments is not None and segments.start[b, t]:
            m[b, h], n[b, h], c[b, h] = -np.inf, 0, 0
        if segments is not None and not segments.valid[b, t]:
            continue
        before, i, f = m[b, h], log_input[b, t, h], log_forget[b, t, h]
        m[b, h] = max(f + before, i)
        with np.errstate(over="ignore"):
            forget = 0.0 if f + before == -np.inf else np.exp(f + before - m[b, h])
            write = 0.0 if i == -np.inf else np.exp(i - m[b, h])
            n[b, h] = forget * n[b, h] + write * key[b, t, h]
            c[b, h] = forget * c[b, h] + write * np.outer(key[b, t, h], value[b, t, h])
            below = max(abs(query[b, t, h] @ n[b, h]), np.exp(-m[b, h]))
        out[b, t, h] = query[b, t, h] @ c[b, h] / (below + eps)
    return out, (m, n, c)


@functools.cache
def _compiled(method: str) -> Callable[..., Any]:
    """`(out, state, gradients)` of the padded documents of `_segments`."""

    def run(inputs: Any, state: Any) -> Any:
        def loss(inputs: Any, state: Any) -> Any:
            out, final = mlstm_scan(*inputs, state, segments=_segments(), method=method, chunk=CHUNK)
            total = jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(final.normaliser)) + jnp.sum(jnp.sin(final.memory))
            return total, (out, tuple(final))

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(inputs, state)

    return jax.jit(run)


@pytest.mark.parametrize("kind", KINDS)
def test_the_laws(kind: str) -> None:
    one = jax.tree.map(lambda x: x[0, :6, 0], (*_qkv(), *_gates(kind)))
    check_recurrence(exponential_recurrence(), Exponential(*one))


@pytest.mark.parametrize("kind", [*KINDS, "faint"])
@pytest.mark.parametrize("start", ["warm", "empty"])
def test_it_equals_its_recurrence(kind: str, start: str) -> None:
    """From a state that has seen tokens and from none, with NaN in the padding; gradients are finite everywhere."""
    segments, inputs = _segments(), (*_qkv(), *_gates(kind))
    mask = lambda x: segments.valid.reshape(B, T, *[1] * (x.ndim - 2))
    poisoned = tuple(jnp.where(mask(x), x, jnp.nan) for x in inputs)
    state = _state() if start == "warm" else empty_state((B, H), K, V)
    expected = _loop(inputs, state, segments)
    gradients = {}
    for method in METHODS:
        gradients[method], got = _compiled(method)(poisoned, state)
        chex.assert_trees_all_close(got, expected, rtol=ROUNDING, atol=ROUNDING)
        chex.assert_tree_all_finite(gradients[method])
    if kind == "gentle":
        chex.assert_trees_all_close(*gradients.values(), rtol=GRADIENT, atol=GRADIENT)


def test_without_a_state_it_starts_from_nothing() -> None:
    inputs = (*_qkv(), *_gates("gentle"))
    expected = _loop(inputs, empty_state((B, H), K, V))
    out, final = jax.jit(mlstm_scan)(*inputs)
    chex.assert_trees_all_close((out, tuple(final)), expected, rtol=ROUNDING, atol=ROUNDING)


def test_the_stabilised_form_means_the_plain_one(x64: None) -> None:
    """C = f C + i k v^T, n = f n + i k, out = C^T q / max(|n^T q|, 1), where nothing overflows."""
    query, key, value, log_input, log_forget = (np.asarray(x, np.float64) for x in (*_qkv(1), *_gates("gentle")))
    run = jax.jit(functools.partial(mlstm_scan, eps=0.0, method="chunked", chunk=CHUNK))
    out, final = run(query, key, value, log_input, log_forget)
    n, c, expected = np.zeros((B, H, K)), np.zeros((B, H, K, V)), np.zeros(value.shape)
    for b, t, h in np.ndindex(value.shape[:3]):
        forget, write = np.exp(log_forget[b, t, h]), np.exp(log_input[b, t, h])
        n[b, h] = forget * n[b, h] + write * key[b, t, h]
        c[b, h] = forget * c[b, h] + write * np.outer(key[b, t, h], value[b, t, h])
        expected[b, t, h] = query[b, t, h] @ c[b, h] / max(abs(query[b, t, h] @ n[b, h]), 1)
    scale = np.exp(final.log_max)
    true = (out, scale[..., None] * final.normaliser, scale[..., None, None] * final.memory)
    chex.assert_trees_all_close(true, (expected, n, c), rtol=1e-10, atol=1e-10)


def test_gradients_of_everything_with_segments(x64: None) -> None:
    """Against differences, from a warm state and from none."""
    random = np.random.default_rng(3)
    query, key, value, log_input, gate = (random.standard_normal((1, 7, 1, n)) for n in (3, 3, 2, 1, 1))
    warm = (random.standard_normal((1, 1)), random.standard_normal((1, 1, 3)), random.standard_normal((1, 1, 3, 2)))
    segments = Segments(jnp.arange(7)[None] == 3, jnp.arange(7)[None] < 6)

    @jax.jit
    def loss(query: Any, key: Any, value: Any, log_input: Any, gate: Any, state: Any) -> jax.Array:
        gates = 3 * log_input[..., 0], jax.nn.log_sigmoid(gate[..., 0])
        options: Any = {"segments": segments, "method": "chunked", "chunk": 4}
        out, final = mlstm_scan(query, key, value, *gates, ExponentialState(*state), **options)
        return jnp.sum(jnp.sin(out)) + sum(jnp.sum(jnp.cos(leaf)) for leaf in final)

    for state in (warm, (np.full((1, 1), -np.inf), *map(np.zeros_like, warm[1:]))):
        check_grads(loss, (query, key, value, log_input, gate, state), order=1, modes=["rev"])


def test_bfloat16_inputs_keep_float32_states() -> None:
    inputs = _qkv(5, jnp.bfloat16)
    out, final = jax.jit(mlstm_scan)(*inputs, *_gates("gentle"))
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in final} == {jnp.dtype(jnp.float32)}
    expected = _loop((*inputs, *_gates("gentle")), empty_state((B, H), K, V))
    for got, exact in zip((out, final.memory), (expected[0], expected[1][2]), strict=True):
        error = np.abs(np.asarray(got, np.float64) - exact) / np.abs(exact).max()
        assert np.quantile(error, 0.99) < BFLOAT16


def test_shapes_that_do_not_fit_are_shown() -> None:
    query, key, value = _qkv()
    log_input, log_forget = _gates("gentle")
    with pytest.raises(ValueError, match=r"log_forget \[B, T, H\]; not .*\(2, 70, 1\)"):
        mlstm_scan(query, key, value, log_input, log_forget[..., :1])
    with pytest.raises(ValueError, match=r"\(2, 70, 1, 6\)"):
        mlstm_scan(query, key, value[:, :, :1], log_input, log_forget)
    with pytest.raises(ValueError, match=r"the state of .*\(2, 2, 6, 8\)"):
        mlstm_scan(query, key, value, log_input, log_forget, empty_state((B, H), V, K))
    with pytest.raises(ValueError, match="the kernel is for TPUs"):
        mlstm_scan(query, key, value, log_input, log_forget, method="pallas")


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_xla_program_lowers_and_holds_no_state_per_token(platform: str) -> None:
    length, size = 256, 32
    inputs = Exponential(*(jnp.ones((length, size)) for _ in range(3)), jnp.ones(length), -jnp.ones(length))
    loss = lambda x: jnp.sum(scan(exponential_recurrence(), x, method="chunked", chunk=64)[0])
    text = jax.jit(jax.grad(loss)).trace(inputs).lower(lowering_platforms=(platform,)).as_text()
    assert f"tensor<4x{size}x{size}xf32>" in text, "the carry of every chunk"
    for shape in ((length, size, size), (64, 64, size), (4, 64, 64, size)):
        assert f"tensor<{'x'.join(map(str, shape))}xf32>" not in text
