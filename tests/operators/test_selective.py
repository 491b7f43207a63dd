"""The selective scan against a float64 numpy loop of its equation: laws, gradients, segments, extremes, and memory."""

from __future__ import annotations

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from seqmodels.operators import Selective, selective_recurrence, selective_scan
from seqmodels.scan.auto import choose
from seqmodels.testing import check_recurrence
from seqmodels.typing import Segments

# float32 rounding (6e-8) over 70 steps with sums of 4 products.
ROUNDING = 2e-5
# bfloat16 keeps 8 bits: two parts in a thousand for each rounding of an input.
BFLOAT16 = 3e-2
B, T, D, N = 2, 70, 6, 4
METHODS = (
    {"method": "sequential"},
    {"method": "sequential", "chunk": 32},
    {"method": "chunked", "chunk": 16},
    {"method": "associative"},
)
by_method = pytest.mark.parametrize("options", METHODS, ids=lambda m: "-".join(map(str, m.values())))


def _inputs(seed: int = 0, length: int = T, dtype: Any = np.float64) -> tuple[np.ndarray, ...]:
    """x, dt, a, b, c, d, state."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.standard_normal(shape).astype(dtype)
    dt, a = np.exp(normal(B, length, D) - 2), -np.exp(normal(D, N))
    return normal(B, length, D), dt, a, normal(B, length, N), normal(B, length, N), normal(D), normal(B, D, N)


def _loop(x: Any, dt: Any, a: Any, b: Any, c: Any, d: Any, state: Any, segments: Segments | None = None) -> Any:
    x, dt, a, b, c, d, h = (np.array(y, np.float64) for y in (x, dt, a, b, c, d, state))
    y = np.zeros(x.shape)
    for row, t in np.ndindex(x.shape[:2]):
        if segments is not None:
            if segments.start[row, t]:
                h[row] = 0
            if not segments.valid[row, t]:
                continue
        for channel in range(x.shape[2]):
            decay = np.exp(dt[row, t, channel] * a[channel])
            h[row, channel] = decay * h[row, channel] + dt[row, t, channel] * x[row, t, channel] * b[row, t]
            y[row, t, channel] = h[row, channel] @ c[row, t] + d[channel] * x[row, t, channel]
    return y, h


def _segments(length: int = T) -> Segments:
    """Documents of lengths 1 and more, one row that goes on from its state, and padding at the end of the other."""
    start = np.zeros((B, length), bool)
    start[0, [0, length // 3, length // 3 + 1, length - 2]] = True
    start[1, length - 3] = True
    return Segments(jnp.asarray(start), jnp.asarray(np.arange(length)[None] < np.array([[length], [length - 1]])))


def test_laws() -> None:
    x, dt, a, b, c, _, state = _inputs(length=6)
    inputs = Selective(*(y[0] for y in (x, dt, b, c)))
    y, after = _loop(x, dt, a, b, c, np.zeros(D), state)
    with jax.enable_x64(True):
        recurrence = selective_recurrence(jnp.asarray(a))
        check_recurrence(recurrence, inputs, state[0].T, reference=(y[0], after[0].T))


@by_method
def test_against_a_loop(options: dict) -> None:
    inputs = _inputs(1, dtype=np.float32)
    run = jax.jit(functools.partial(selective_scan, **options))
    chex.assert_trees_all_close(run(*inputs), _loop(*inputs), rtol=ROUNDING, atol=ROUNDING)
    segments, (x, dt, *rest) = _segments(), inputs
    padded = [np.where(segments.valid[..., None], y, np.nan) for y in (x, dt)]
    expected = _loop(*inputs, segments)
    chex.assert_trees_all_close(run(*padded, *rest, segments=segments), expected, rtol=ROUNDING, atol=ROUNDING)


@by_method
def test_gradients_with_segments(options: dict, x64: None) -> None:
    x, dt, a, b, c, d, state = _inputs(2, length=9)
    segments = _segments(9)
    if "chunk" in options:
        options = {**options, "chunk": 4}

    @jax.jit
    def loss(x: Any, dt: Any, a: Any, b: Any, c: Any, d: Any, state: Any) -> jax.Array:
        x = jnp.where(segments.valid[..., None], x, jnp.nan)
        y, after = selective_scan(x, dt, a, b, c, d, state, segments=segments, **options)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(after))

    assert np.isfinite(loss(x, dt, a, b, c, d, state))
    check_grads(loss, (x, dt, a, b, c, d, state), order=1, modes=["rev"])


@by_method
def test_steps_of_any_size(options: dict) -> None:
    """No step, and steps after which nothing of the state is left, beside each other in one chunk."""
    x, dt, a, b, c, d, state = _inputs(3, dtype=np.float32)
    dt = np.where(dt > 0.3, 1e5, np.where(dt < 0.05, 0, dt)).astype(np.float32)
    loss = lambda *y: jnp.sum(selective_scan(*y, **options)[0] / jnp.maximum(dt, 1))
    got, slopes = jax.jit(lambda *y: (selective_scan(*y, **options), jax.grad(loss, range(7))(*y)))(
        x, dt, a, b, c, d, state
    )
    for found, exact in zip(got, _loop(x, dt, a, b, c, d, state), strict=True):
        chex.assert_trees_all_close(np.asarray(found), exact, rtol=ROUNDING, atol=ROUNDING * np.abs(exact).max())
    chex.assert_tree_all_finite(slopes)


def test_bfloat16_inputs_keep_a_float32_state() -> None:
    x, dt, a, b, c, d, state = (jnp.asarray(y, jnp.float32) for y in _inputs(4))
    rounded = [y.astype(jnp.bfloat16) for y in (x, b, c)]
    y, after = jax.jit(selective_scan)(rounded[0], dt, a, *rounded[1:], d, state)
    assert (y.dtype, after.dtype) == (jnp.bfloat16, jnp.float32)
    for got, exact in zip((y, after), _loop(x, dt, a, b, c, d, state), strict=True):
        assert np.quantile(np.abs(np.asarray(got, np.float64) - exact) / np.abs(exact).max(), 0.99) < BFLOAT16


LONG, CHANNELS, SIZE = 2048, 32, 16


def _training(method: str) -> Any:
    """The compiled gradient of a selective scan over LONG steps of one row."""
    shapes = ((1, LONG, CHANNELS), (1, LONG, CHANNELS), (CHANNELS, SIZE), (1, LONG, SIZE), (1, LONG, SIZE))
    loss = lambda *inputs: jnp.sum(jnp.sin(selective_scan(*inputs, method=method)[0]))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(jax.grad(loss, range(5))).lower(*inputs).compile()


def _largest(program: Any) -> int:
    """The number of entries of the largest array of the optimised program, inside of fusions included."""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", program.as_text())
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


@pytest.mark.optimised
@pytest.mark.parametrize("method", ["auto", "sequential", "chunked"])
def test_no_array_over_all_steps_channels_and_states(method: str) -> None:
    program = _training(method)
    # An input is the largest there is: over all steps, but without states.
    assert _largest(program) <= LONG * max(CHANNELS, SIZE)
    if method != "chunked":  # which holds a few elements for each step of its chunk, not one state
        rows, states = 6 * LONG * CHANNELS, 2 * (LONG // 64 + 64) * CHANNELS * SIZE  # inputs and slopes; states
        assert rows + states < LONG * CHANNELS * SIZE / 2
        assert program.memory_analysis().temp_size_in_bytes <= 4 * (rows + states)


@pytest.mark.optimised
def test_what_all_states_at_once_would_look_like() -> None:
    """The test above can fail: the one method that holds an element a step is seen to."""
    assert _largest(_training("associative")) >= LONG * CHANNELS * SIZE / 2


def test_on_a_cpu_auto_is_sequential() -> None:
    assert choose(matmul_form=True, length=1024, family="selective", platform="cpu") == "sequential"


def test_shapes_that_do_not_fit_are_shown() -> None:
    x, dt, a, b, c, _, state = (jnp.asarray(y, jnp.float32) for y in _inputs())
    with pytest.raises(ValueError, match=r"b and c \[B, T, N\].*\(2, 70, 3\)"):
        selective_scan(x, dt, a, b[..., :3], c)
    with pytest.raises(ValueError, match=r"d \[D\] or None.*d \(4,\)"):
        selective_scan(x, dt, a, b, c, jnp.ones(4))
    with pytest.raises(ValueError, match=r"state \[B, D, N\].*\(2, 4, 6\)"):
        selective_scan(x, dt, a, b, c, None, state.swapaxes(1, 2))
    with pytest.raises(ValueError, match="the kernel is for TPUs and Hopper GPUs, and this is made for cpu"):
        selective_scan(x, dt, a, b, c, method="pallas")
