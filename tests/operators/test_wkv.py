"""RWKV-4's WKV against float64 loops of its equation: laws, keys of any size, segments, gradients, sharding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from seqmodels.operators import wkv_recurrence, wkv_scan
from seqmodels.operators.wkv import Weighted, WKVState, empty_wkv
from seqmodels.testing import check_recurrence
from seqmodels.typing import Segments

# float32 rounding (6e-8) of exponents up to 100, over 70 steps whose weights are all positive.
ROUNDING = 5e-5
# bfloat16 keeps 8 bits: two parts in a thousand for each rounding of a value or the output, and keys are exponents.
BFLOAT16 = 3e-2
B, T, D = 2, 70, 8
METHODS = ("sequential", "associative", "chunked")
KINDS = ("gentle", "extreme", "huge")


def _segments() -> Segments:
    """Documents of lengths 1 and more, one row that goes on from its state, and padding at the end of the other."""
    start = np.zeros((B, T), bool)
    start[0, [0, 20, 21, 50]] = True
    start[1, 66] = True
    return Segments(jnp.asarray(start), jnp.asarray(np.arange(T)[None] < np.array([[T], [68]])))


def _inputs(kind: str, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """`key, value, log_decay, bonus`."""
    keys = jax.random.split(jax.random.key(3), 4)
    key, value = (jax.random.normal(k, (B, T, D)) for k in keys[:2])
    decay, bonus = (jax.random.normal(k, (D,)) for k in keys[2:])
    scale, rate = {"gentle": (2, -1), "extreme": (100, 3), "huge": (1e30, 40)}[kind]
    return (scale * key).astype(dtype), value.astype(dtype), -jnp.exp(decay + rate), scale * bonus


def _state() -> WKVState:
    keys = jax.random.split(jax.random.key(5), 3)
    log_max, numerator, rest = (jax.random.normal(k, (B, D)) for k in keys)
    return WKVState(log_max, numerator, jnp.exp(rest))


def _loop(inputs: Any, state: Any, segments: Segments | None = None) -> tuple[np.ndarray, tuple]:
    """Token by token, each channel on its own: the sums under their largest exponent, in float64."""
    key, value, log_decay, bonus = (np.asarray(x, np.float64) for x in inputs)
    m, num, den = (np.array(x, np.float64) for x in state)
    out = np.zeros(key.shape)
    for b, t, d in np.ndindex(key.shape):
        if segments is not None and segments.start[b, t]:
            m[b, d], num[b, d], den[b, d] = -np.inf, 0, 0
        if segments is not None and not segments.valid[b, t]:
            continue
        k, v = key[b, t, d], value[b, t, d]
        top = max(m[b, d], k + bonus[d])
        past, now = np.exp(m[b, d] - top), np.exp(k + bonus[d] - top)
        out[b, t, d] = (past * num[b, d] + now * v) / (past * den[b, d] + now)
        top = max(m[b, d] + log_decay[d], k)
        past, now = np.exp(m[b, d] + log_decay[d] - top), np.exp(k - top)
        m[b, d], num[b, d], den[b, d] = top, past * num[b, d] + now * v, past * den[b, d] + now
    return out, (m, num, den)


@functools.cache
def _compiled(method: str) -> Callable[..., Any]:
    """`(gradients, (out, state))` of the padded documents of `_segments`."""

    def run(inputs: Any, state: Any) -> Any:
        def loss(inputs: Any, state: Any) -> Any:
            out, final = wkv_scan(*inputs, state, segments=_segments(), method=method, chunk=16)
            total = jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(final.numerator)) + jnp.sum(jnp.sin(final.denominator))
            return total, (out, tuple(final))

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(inputs, state)

    return jax.jit(run)


@pytest.mark.parametrize("kind", KINDS)
def test_the_laws(kind: str) -> None:
    key, value, log_decay, bonus = _inputs(kind)
    one = Weighted(key[0, :6], value[0, :6])
    check_recurrence(wkv_recurrence(log_decay, bonus), one)
    out, state = _loop((key[:1, :6], value[:1, :6], log_decay, bonus), empty_wkv((1,), D))
    expected = out[0], WKVState(*(leaf[0] for leaf in state))
    check_recurrence(wkv_recurrence(log_decay, bonus), one, reference=expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["warm", "empty"])
def test_it_equals_its_equation(kind: str, start: str) -> None:
    """From a state that has seen tokens and from none, with NaN in the padding; gradients are finite everywhere."""
    segments, (key, value, *fixed) = _segments(), _inputs(kind)
    poison = lambda x: jnp.where(segments.valid[..., None], x, jnp.nan)
    inputs = (poison(key), poison(value), *fixed)
    state = _state() if start == "warm" else empty_wkv((B,), D)
    expected = _loop((key, value, *fixed), state, segments)
    gradients = {}
    for method in METHODS:
        gradients[method], got = _compiled(method)(inputs, state)
        chex.assert_trees_all_close(got, expected, rtol=ROUNDING, atol=ROUNDING)
        chex.assert_tree_all_finite(gradients[method])
    if kind == "gentle":
        chex.assert_trees_all_close(*gradients.values(), rtol=3 * ROUNDING, atol=3 * ROUNDING)


def test_without_a_state_it_starts_from_nothing_and_the_average_is_plain() -> None:
    """Equation 16 as it stands: weights of all earlier tokens and of the current one, no running maximum."""
    inputs = _inputs("gentle")
    key, value, log_decay, bonus = (np.asarray(x, np.float64) for x in inputs)
    expected = np.zeros(key.shape)
    for t in range(T):
        before = np.arange(t)
        weights = np.exp((t - 1 - before)[:, None] * log_decay + key[:, :t])
        now = np.exp(bonus + key[:, t])
        total = np.sum(weights * value[:, :t], axis=1) + now * value[:, t]
        expected[:, t] = total / (np.sum(weights, axis=1) + now)
    out, _ = jax.jit(wkv_scan)(*inputs)
    chex.assert_trees_all_close(out, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_everything_with_segments(method: str, x64: None) -> None:
    """Against differences, from a warm state and from none."""
    random = np.random.default_rng(3)
    key, value = random.standard_normal((2, 1, 7, 3))
    decay, bonus = random.standard_normal((2, 3))
    warm = (random.standard_normal((1, 3)), random.standard_normal((1, 3)), np.exp(random.standard_normal((1, 3))))
    segments = Segments(jnp.arange(7)[None] == 3, jnp.arange(7)[None] < 6)

    @jax.jit
    def loss(key: Any, value: Any, decay: Any, bonus: Any, state: Any) -> jax.Array:
        fixed = -jnp.exp(decay), bonus
        out, final = wkv_scan(key, value, *fixed, WKVState(*state), segments=segments, method=method, chunk=4)
        return jnp.sum(jnp.sin(out)) + sum(jnp.sum(jnp.cos(leaf)) for leaf in final)

    for state in (warm, (np.full((1, 3), -np.inf), *map(np.zeros_like, warm[1:]))):
        check_grads(loss, (key, value, decay, bonus, state), order=1, modes=["rev"])


@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_time(check_vma: bool) -> None:
    """Spans of nine tokens in chunks of four: what a device folds takes several."""
    key, value, log_decay, bonus = (x[:, :72] if x.ndim == 3 else x for x in _inputs("gentle"))
    key, value = (jnp.pad(x, ((0, 0), (0, 72 - T), (0, 0))) for x in (key, value))
    segments = Segments(*(jnp.pad(mask, ((0, 0), (0, 72 - T))) for mask in _segments()))
    mesh, along = jax.make_mesh((8,), ("time",), axis_types=(AxisType.Auto,)), P(None, "time")

    def run(key: Any, value: Any, segments: Segments, state: Any, axis: str | None = None) -> Any:
        options: Any = {"segments": segments, "method": "chunked", "chunk": 4, "sequence_axis": axis}
        return wkv_scan(key, value, log_decay, bonus, state, **options)

    spread = jax.shard_map(
        functools.partial(run, axis="time"),
        mesh=mesh,
        in_specs=(along, along, along, P()),
        out_specs=(along, P()),
        check_vma=check_vma,
    )
    expected = jax.jit(run)(key, value, segments, _state())
    got = jax.jit(spread)(key, value, segments, _state())
    chex.assert_trees_all_close(got, expected, rtol=ROUNDING, atol=ROUNDING)


def test_bfloat16_inputs_keep_float32_states() -> None:
    inputs = _inputs("gentle", jnp.bfloat16)
    out, final = jax.jit(wkv_scan)(*inputs)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in final} == {jnp.dtype(jnp.float32)}
    expected = _loop(inputs, empty_wkv((B,), D))[0]
    assert np.max(np.abs(np.asarray(out, np.float64) - expected)) < BFLOAT16 * np.abs(expected).max()


def test_shapes_that_do_not_fit_are_shown() -> None:
    key, value, log_decay, bonus = _inputs("gentle")
    with pytest.raises(ValueError, match=r"bonus \[D\]; not \(2, 70, 8\), \(2, 70, 8\), \(8,\), \(7,\)"):
        wkv_scan(key, value, log_decay, bonus[:7])
    with pytest.raises(ValueError, match=r"\(3, 8\).* cannot continue keys of \(2, 70, 8\)"):
        wkv_scan(key, value, log_decay, bonus, empty_wkv((3,), D))
    with pytest.raises(ValueError, match="no kernel runs this operator, a recurrence of the wkv family"):
        wkv_scan(key, value, log_decay, bonus, method="pallas")
