"""The delta family against float64 numpy loops of its equations: every form, any decay, beta at its ends, gradients."""

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

from seqmodels.operators import Delta, delta_recurrence, delta_rule, diagonal_plus_rank_one
from seqmodels.operators.triangular import inverse_of_unit_lower
from seqmodels.testing import check_recurrence
from seqmodels.typing import Segments

# float32 rounding (6e-8) over 70 steps of corrections that read what was just written.
ROUNDING = 5e-5
# bfloat16 keeps 8 bits, and a correction that reads rounded writes rounds a few times more.
BFLOAT16 = 5e-2
B, T, G, H, K, V = 2, 70, 1, 2, 8, 6
METHODS = ({"method": "sequential"}, {"method": "chunked", "chunk": 32})
by_method = pytest.mark.parametrize("options", METHODS, ids=lambda m: "-".join(map(str, m.values())))


def _segments() -> Segments:
    """Documents of lengths 1 and more, one row that goes on from its state, and padding at the end of the other."""
    start = np.zeros((B, T), bool)
    start[0, [0, 20, 21, 50]] = True
    start[1, 66] = True
    return Segments(jnp.asarray(start), jnp.asarray(np.arange(T)[None] < np.array([[T], [68]])))


def _loop(step: Callable[..., Any], inputs: Any, state: Any, segments: Segments | None) -> tuple[np.ndarray, Any]:
    """Every head's steps in turn: `step(state [K, V], *inputs_t)` gives the state, read by the first input."""
    inputs, state = jax.tree.map(lambda x: np.asarray(x, np.float64), (list(inputs), state))
    state, out = state.copy(), np.zeros((*inputs[0].shape[:3], state.shape[-1]))
    for b, t, h in np.ndindex(inputs[0].shape[:3]):
        if segments is not None:
            if segments.start[b, t]:
                state[b, h] = 0
            if not segments.valid[b, t]:
                continue
        query, *rest = (x[b, t, h] for x in inputs)
        state[b, h] = step(state[b, h], *rest)
        out[b, t, h] = query @ state[b, h]
    return out, state


def _delta_step(s: np.ndarray, k: np.ndarray, v: np.ndarray, beta: Any, log_decay: Any) -> np.ndarray:
    s = np.exp(log_decay).reshape(-1, 1) * s
    error = v - s.T @ k
    return s + beta * np.outer(k, error)


def _rank_one_step(s: np.ndarray, k: Any, v: Any, left: Any, right: Any, log_decay: Any) -> np.ndarray:
    return (np.diag(np.broadcast_to(np.exp(log_decay), k.shape)) + np.outer(left, right)) @ s + np.outer(k, v)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _inputs(seed: int = 0) -> tuple[jax.Array, ...]:
    """`query, key, value, beta, state`; keys of unit length, beta at 0, 1 and 2 and in between."""
    keys = jax.random.split(jax.random.key(seed), 6)
    shapes = ((B, T, G, K), (B, T, G, K), (B, T, H, V), (B, H, K, V))
    query, key, value, state = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False))
    beta = jax.random.uniform(keys[4], (B, T, H), maxval=2.0)
    ends = jax.random.randint(keys[5], (B, T, H), 0, 6)
    return query, _unit(key), value, jnp.where(ends < 3, ends.astype(beta.dtype), beta), state


def _decays(kind: str) -> jax.Array | None:
    if kind == "none":
        return None
    noise = jax.random.normal(jax.random.key(9), (B, T, H, K))
    name, _, scalar = kind.partition(" ")
    per_key = {
        "gentle": -jnp.exp(noise - 3),
        "extreme": -jnp.exp(3 * noise),  # down to exp(-20000) beside exp(-1e-4) inside one chunk
        "gone": jnp.where(noise > 0.5, -jnp.inf, -jnp.exp(noise)),
    }[name]
    return per_key[..., 0] if scalar else per_key


@functools.cache
def _jitted(family: Any, method: str, chunk: int | None = None) -> Any:
    return jax.jit(functools.partial(family, method=method, chunk=chunk))


def _expected_delta(query: Any, key: Any, value: Any, beta: Any, log_decay: Any, state: Any, segments: Any) -> Any:
    query, key = (np.repeat(x, H // G, axis=2) for x in (query, key))
    log_decay = np.zeros(beta.shape) if log_decay is None else log_decay
    return _loop(_delta_step, (query, key, value, beta, log_decay), state, segments)


@by_method
@pytest.mark.parametrize("kind", ["none", "extreme per head", "gone per head", "extreme", "gone"])
def test_the_delta_rule_equals_its_recurrence(kind: str, options: dict) -> None:
    query, key, value, beta, state = _inputs()
    log_decay, segments = _decays(kind), _segments()
    poison = lambda x: jnp.where(jnp.expand_dims(segments.valid, range(2, x.ndim)), x, jnp.nan)
    run = _jitted(delta_rule, **options)
    got = run(poison(query), poison(key), poison(value), poison(beta), log_decay, state, segments=segments)
    expected = _expected_delta(query, key, value, beta, log_decay, state, segments)
    chex.assert_trees_all_close(got, expected, rtol=ROUNDING, atol=ROUNDING)


@by_method
@pytest.mark.parametrize("kind", ["extreme per head", "gone"])
def test_any_rank_one_equals_its_recurrence(kind: str, options: dict) -> None:
    """As RWKV-7 has it: what is removed and what is written are different vectors."""
    keys = jax.random.split(jax.random.key(1), 7)
    query, key, left, right = (jax.random.normal(k, (B, T, H, K)) for k in keys[:4])
    value, state = jax.random.normal(keys[4], (B, T, H, V)), jax.random.normal(keys[5], (B, H, K, V))
    left, right = -_unit(left) * jax.random.uniform(keys[6], left.shape), _unit(right)
    log_decay, segments = _decays(kind), _segments()
    got = _jitted(diagonal_plus_rank_one, **options)(
        query, key, value, left, right, log_decay, state, segments=segments
    )
    expected = _loop(_rank_one_step, (query, key, value, left, right, log_decay), state, segments)
    chex.assert_trees_all_close(got, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize(
    "form",
    ["delta", "scalar rank one", *(pytest.param(x, marks=pytest.mark.slow) for x in ("scalar delta", "rank one"))],
)
def test_the_laws_hold(form: str) -> None:
    noise = [jax.random.normal(k, (5, 4)) for k in jax.random.split(jax.random.key(0), 5)]
    log_decay = -jnp.exp(noise[0])
    log_decay = {"delta": None, "rank one": log_decay.at[2, 1].set(-jnp.inf)}.get(form, log_decay[:, 0])
    left = noise[4] if "rank one" in form else None
    value = jax.random.normal(jax.random.key(1), (5, 3))
    inputs = Delta(noise[1], noise[2], value, noise[3], left, log_decay)
    wide = [np.zeros(5) if x is None else x for x in (inputs.log_decay, -inputs.key if left is None else left)]
    ordered = [x[None, :, None] for x in (inputs.query, inputs.key, value, wide[1], inputs.right, wide[0])]
    state = np.ones((4, 3))
    out, last = _loop(_rank_one_step, ordered, state[None, None], None)
    check_recurrence(delta_recurrence(), inputs, state, reference=(out[0, :, 0], last[0, 0]))


@pytest.mark.parametrize("length", [1, 2, 7, 16, 17, 64, 65])
def test_the_inverse_of_a_unit_lower_matrix(length: int) -> None:
    lower = np.tril(np.random.default_rng(length).normal(size=(length, length)), -1) / 4
    for size in (1.0, 1e-30):  # products of the smaller ones underflow
        got = jax.jit(inverse_of_unit_lower)(jnp.asarray(size * lower, jnp.float32))
        chex.assert_trees_all_close(got, np.linalg.inv(np.eye(length) + size * lower), rtol=ROUNDING, atol=ROUNDING)


def test_unit_keys_and_beta_up_to_two_never_let_the_state_grow() -> None:
    """At beta 2 a step is a reflection, which keeps the state's size; beyond, it grows as every form says."""
    query, key, value, beta, state = _inputs(2)
    size = lambda s: np.sqrt(np.sum(np.square(np.asarray(s, np.float64)), axis=(2, 3)))
    run = _jitted(delta_rule, **METHODS[1])
    _, after = run(query, key, 0 * value, jnp.full_like(beta, 2.0), None, state)
    np.testing.assert_allclose(size(after), size(state), rtol=ROUNDING)
    _, after = run(query, key, 0 * value, beta, None, state)
    assert np.all(size(after) <= size(state))
    three = jnp.full_like(beta, 3.0)
    got = run(query, key, value, three, None, state)
    expected = _expected_delta(query, key, value, three, None, state, None)
    assert np.abs(expected[1]).max() > 1e5
    largest = [np.abs(x).max() for x in expected]
    scaled = lambda tree: [np.asarray(x) / m for x, m in zip(tree, largest, strict=True)]
    chex.assert_trees_all_close(scaled(got), scaled(expected), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("form", ["delta per key", "rank one per head"])
def test_gradients_of_everything_with_segments(form: str, x64: None) -> None:
    per_key, value = (1, 7, 1, 2), (1, 7, 1, 3)
    family, shapes = {
        "delta per key": (delta_rule, (per_key, per_key, value, (1, 7, 1), per_key)),
        "rank one per head": (diagonal_plus_rank_one, (per_key, per_key, value, per_key, per_key, (1, 7, 1))),
    }[form]
    keys = jax.random.split(jax.random.key(3), 7)
    shapes = (*shapes, (1, 1, 2, 3))
    *arrays, gate, state = (jax.random.normal(k, s, jnp.float64) for k, s in zip(keys, shapes, strict=False))
    segments = Segments(jnp.arange(7)[None] == 3, jnp.arange(7)[None] < 6)

    @jax.jit
    def loss(arrays: Any, gate: Any, state: Any) -> jax.Array:
        out, final = family(*arrays, -jnp.exp(gate), state, segments=segments, method="chunked", chunk=4)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(final))

    check_grads(loss, (arrays, gate, state), order=1, modes=["rev"])


@pytest.mark.parametrize("kind", ["gone per head", "gone", "extreme"])
def test_gradients_at_the_ends_of_the_range_are_finite_and_those_of_single_steps(kind: str) -> None:
    arguments = [*_inputs(4)[:4], _decays(kind), _inputs(4)[4]]
    gradients = []
    for method in ("sequential", "chunked"):
        gradients.append(_gradient(method)(*arguments))
        chex.assert_tree_all_finite(gradients[-1])
    largest = [max(1.0, float(jnp.abs(g).max())) for g in gradients[0]]
    scaled = [[g / m for g, m in zip(tree, largest, strict=True)] for tree in gradients]
    chex.assert_trees_all_close(*scaled, rtol=0, atol=ROUNDING)


@functools.cache
def _gradient(method: str) -> Any:
    loss = lambda *a: sum(jnp.sum(jnp.sin(x)) for x in delta_rule(*a, method=method, chunk=16))
    return jax.jit(jax.grad(loss, argnums=range(6)))


def test_bfloat16_inputs_keep_float32_states() -> None:
    narrow = [x.astype(jnp.bfloat16) for x in _inputs(5)[:4]]
    state = _inputs(5)[4]
    out, final = _jitted(delta_rule, **METHODS[1])(*narrow, _decays("gentle"), state)
    assert (out.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
    expected = _expected_delta(*narrow, _decays("gentle"), state, None)
    for got, exact in zip((out, final), expected, strict=True):
        error = np.abs(np.asarray(got, np.float64) - exact) / np.abs(exact).max()
        assert np.quantile(error, 0.99) < BFLOAT16


def test_one_step_and_odd_lengths() -> None:
    *arrays, state = _inputs(6)
    for length in (1, 5, 17):
        cut = [x[:, :length] for x in (*arrays, _decays("gentle per head"))]
        got = _jitted(delta_rule, "chunked")(*cut, state)
        chex.assert_trees_all_close(got, _expected_delta(*cut, state, None), rtol=ROUNDING, atol=ROUNDING)


def test_shapes_that_do_not_fit_are_shown() -> None:
    query, key, value, beta, state = _inputs()
    with pytest.raises(ValueError, match=r"beta \[B, T, H\].*\(2, 70, 2, 6\), \(2, 70, 1\)"):
        delta_rule(query, key, value, beta[:, :, :1])
    with pytest.raises(ValueError, match=r"log_decay \[B, T, H\].*\(2, 70, 2, 5\)"):
        delta_rule(query, key, value, beta, jnp.zeros((B, T, H, 5)))
    with pytest.raises(ValueError, match=r"state \[B, H, K, V\].*\(2, 2, 6, 8\)"):
        delta_rule(query, key, value, beta, state=state.swapaxes(2, 3))
    with pytest.raises(ValueError, match=r"left and right.*\(2, 70, 1, 8\)"):
        diagonal_plus_rank_one(query, key, value, key, key)
    with pytest.raises(ValueError, match="no kernel runs this operator, a recurrence of the delta family"):
        diagonal_plus_rank_one(query, query, query, query, query, method="pallas")
