"""The trapezoidal recurrence and running angles against float64 numpy loops: laws, segments, extremes, long sums."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from seqmodels.operators import (
    LastToken,
    Trapezoid,
    rotation_recurrence,
    running_angles,
    trapezoid_recurrence,
    trapezoidal_scan,
)
from seqmodels.testing import check_recurrence
from seqmodels.typing import Segments

# float32 rounding (6e-8) over 35 steps with sums of a few dozen products.
ROUNDING = 3e-5
B, T, H, R, K, V = 2, 35, 2, 3, 4, 5
METHODS = ({"method": "sequential"}, {"method": "chunked", "chunk": 8}, {"method": "associative"})
by_method = pytest.mark.parametrize("options", METHODS, ids=lambda m: m["method"])


def _inputs(length: int = T, dtype: Any = np.float32) -> dict[str, Any]:
    random = np.random.default_rng(0)
    normal = lambda *shape: random.standard_normal(shape).astype(dtype)
    positive = lambda: np.exp(normal(B, length, H) - 1)
    return {
        "query": normal(B, length, H, R, K),
        "key": normal(B, length, H, R, K),
        "value": normal(B, length, H, R, V),
        "log_decay": -positive(),
        "now": positive(),
        "before": positive(),
        "memory": normal(B, H, K, V),
        "last": LastToken(normal(B, H, R, K), normal(B, H, R, V)),
    }


def _segments(length: int = T) -> Segments:
    """Documents of lengths 1 and more, one row that goes on from its state, and padding at the end of the other."""
    start = np.zeros((B, length), bool)
    start[0, [0, length // 3, length // 3 + 1, length - 2]] = True
    start[1, length - 3] = True
    return Segments(jnp.asarray(start), jnp.asarray(np.arange(length)[None] < np.array([[length], [length - 1]])))


def _loop(inputs: dict[str, Any], segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of every step's trapezoid, as they are written."""
    inputs = jax.tree.map(lambda x: np.array(x, np.float64), inputs)
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    memory, (last_key, last_value) = inputs["memory"], inputs["last"]
    out = np.zeros(value.shape)
    for b, t in np.ndindex(query.shape[:2]):
        if segments.start[b, t]:
            memory[b], last_key[b], last_value[b] = 0, 0, 0
        if not segments.valid[b, t]:
            continue
        for h in range(query.shape[2]):
            decay, now, before = (inputs[name][b, t, h] for name in ("log_decay", "now", "before"))
            own, earlier = key[b, t, h].T @ value[b, t, h], last_key[b, h].T @ last_value[b, h]
            memory[b, h] = np.exp(decay) * (memory[b, h] + before * earlier) + now * own
            out[b, t, h] = query[b, t, h] @ memory[b, h]
        last_key[b], last_value[b] = key[b, t], value[b, t]
    return out, memory


def test_laws() -> None:
    inputs = {name: x[0, :, 0] if name not in ("memory", "last") else x for name, x in _inputs(6, np.float64).items()}
    steps = Trapezoid(*(inputs[name] for name in ("query", "key", "value", "log_decay", "now", "before")))
    state, reads, after = inputs["memory"][0, 0], [], inputs["memory"][0, 0]
    for q, k, v, log_decay, now, later in zip(*steps, strict=True):
        reads.append(q @ (np.exp(log_decay) * after + now * k.T @ v))
        after = np.exp(log_decay) * after + (now + later) * k.T @ v
    check_recurrence(trapezoid_recurrence(), steps, state, reference=(np.stack(reads), after))


@by_method
def test_against_a_loop(options: dict) -> None:
    inputs, segments = _inputs(), _segments()
    run = jax.jit(functools.partial(trapezoidal_scan, **options))
    padded = {
        name: np.where(segments.valid.reshape(B, T, *[1] * (x.ndim - 2)), x, np.nan)
        for name, x in inputs.items()
        if name not in ("memory", "last")
    }
    expected = _loop(inputs, segments)
    chex.assert_trees_all_close(
        run(**{**inputs, **padded}, segments=segments), expected, rtol=ROUNDING, atol=ROUNDING * 10
    )


@by_method
def test_two_calls_are_one(options: dict) -> None:
    """What the last step of a call cannot know, the weight of its drive in the next, the next call adds."""
    inputs, segments = _inputs(), Segments.whole(B, T, fresh=False)
    steps = {name: x for name, x in inputs.items() if name not in ("memory", "last")}
    part = lambda begin, end: jax.tree.map(lambda x: x[:, begin:end], (steps, segments))
    run = jax.jit(
        lambda steps, segments, memory, last: trapezoidal_scan(
            **steps, segments=segments, memory=memory, last=last, **options
        )
    )
    expected = run(steps, segments, inputs["memory"], inputs["last"])
    first, memory = run(*part(0, 13), inputs["memory"], inputs["last"])
    last = LastToken(steps["key"][:, 12], steps["value"][:, 12])
    second, memory = run(*part(13, T), memory, last)
    chex.assert_trees_all_close((jnp.concatenate([first, second], axis=1), memory), expected, rtol=ROUNDING, atol=1e-4)


@by_method
def test_gradients_with_segments(options: dict, x64: None) -> None:
    inputs, segments = _inputs(7, np.float64), _segments(7)
    options = options | ({"chunk": 4} if "chunk" in options else {})

    @jax.jit
    def loss(inputs: dict[str, Any]) -> jax.Array:
        out, memory = trapezoidal_scan(**inputs, segments=segments, **options)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(memory))

    check_grads(loss, (inputs,), order=1, modes=["rev"])


@by_method
def test_decays_of_any_size(options: dict) -> None:
    inputs, segments = _inputs(), _segments()
    gate = inputs["log_decay"]
    inputs["log_decay"] = np.where(gate < -0.8, -np.inf, np.where(gate < -0.4, -1e4, np.where(gate > -0.1, 0, gate)))

    def loss(inputs: dict[str, Any]) -> Any:
        out, memory = trapezoidal_scan(**inputs, segments=segments, **options)
        return jnp.sum(out**2) + jnp.sum(memory**2), (out, memory)

    slopes, found = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    chex.assert_trees_all_close(found, _loop(inputs, segments), rtol=ROUNDING, atol=ROUNDING * 10)
    chex.assert_tree_all_finite(slopes)


def test_shapes_that_do_not_fit_are_shown() -> None:
    inputs, segments = _inputs(), _segments()
    with pytest.raises(ValueError, match=r"value \[B, T, H, R, V\].*\(2, 35, 2, 2, 5\)"):
        trapezoidal_scan(**{**inputs, "value": inputs["value"][:, :, :, :2]}, segments=segments)
    with pytest.raises(ValueError, match=r"now and before \[B, T, H\].*\(2, 35\)"):
        trapezoidal_scan(**{**inputs, "now": inputs["now"][..., 0]}, segments=segments)
    with pytest.raises(ValueError, match=r"the memory \[B, H, K, V\].*\(2, 2, 5, 4\)"):
        trapezoidal_scan(**{**inputs, "memory": inputs["memory"].swapaxes(2, 3)}, segments=segments)
    with pytest.raises(ValueError, match=r"turns \[B, T, D\].*\(2, 3, 4\) and \(2, 3\)"):
        running_angles(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3)))


def _apart(a: Any, b: Any) -> np.ndarray:
    """Angles apart, in turns."""
    apart = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return np.abs(apart - np.round(apart))


def test_laws_of_angles() -> None:
    turns = np.random.default_rng(1).uniform(-0.4, 0.4, (6, 3)) * np.array([1, 1e-3, 3])
    state = np.array([0.1, -0.2, 0.3])
    phi = state + np.cumsum(turns, axis=0)
    phi -= np.round(phi)
    check_recurrence(rotation_recurrence(), turns, state, reference=(phi, phi[-1]))


@by_method
def test_angles_with_segments(options: dict) -> None:
    random, segments = np.random.default_rng(2), _segments()
    turns, state = (random.standard_normal(shape).astype(np.float32) for shape in ((B, T, 3), (B, 3)))
    expected, phi = np.zeros(turns.shape), np.array(state, np.float64)
    for b, t in np.ndindex(B, T):
        phi[b] = 0 if segments.start[b, t] else phi[b]
        if segments.valid[b, t]:
            phi[b] += turns[b, t]
            expected[b, t] = phi[b]
    turns = np.where(segments.valid[..., None], turns, np.nan)
    found, after = jax.jit(functools.partial(running_angles, segments=segments, **options))(turns, state)
    assert np.max(_apart(found, expected)) < ROUNDING
    assert np.max(_apart(after, phi)) < ROUNDING


def test_a_long_sum_of_angles_keeps_its_digits() -> None:
    """Half a million steps of about a third of a turn: a plain float32 sum is off by a hundredth of a turn and more."""
    turns = (0.3 + 0.1 * np.random.default_rng(3).random((1, 2**19, 1))).astype(np.float32)
    exact = np.cumsum(turns.astype(np.float64), axis=1)
    found = jax.jit(running_angles)(turns)[0]
    assert np.max(_apart(found, exact)) < 1e-3
    assert np.max(_apart(np.cumsum(turns, axis=1, dtype=np.float32), exact)) > 1e-2
