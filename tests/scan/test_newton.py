"""Newton's method over time against one token at a time: states, gradients, resets, padding; and where it fails."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.scan import Jacobian, Newton, NotConvergedError, newton_scan
from tests.oracles.differences import check_gradient

LENGTH, SIZE = 23, 4
# float64: 64 roundings are left of a residual, and one more correction follows.
EXACT = 1e-12
# The residual's tolerance in float32, and room for the steps after it, through which an error decays.
SINGLE = 3e-5

kinds = pytest.mark.parametrize("jacobian", list(Jacobian))


class State(NamedTuple):
    """A vector, and the log of a weight, which is -inf before any token."""

    hidden: Any
    log_weight: Any


def step(weights: Any, x: Any, state: State) -> State:
    """A tanh unit and the log of a sum, either of which the other one enters."""
    mixed = weights["inner"] @ state.hidden + weights["outer"] * x
    log_weight = jnp.logaddexp(state.log_weight - jax.nn.softplus(mixed), x)
    share = jax.nn.sigmoid(state.log_weight - x)
    return State(share * state.hidden + (1 - share) * jnp.tanh(mixed), log_weight)


START = State(np.zeros(SIZE), np.full(SIZE, -np.inf))


def loop(weights: Any, inputs: Any, state: State, reset: np.ndarray, valid: np.ndarray) -> State:
    def body(state: State, token: Any) -> tuple[State, State]:
        x, reset, valid = token
        choose = lambda condition, *states: jax.tree.map(lambda a, b: jnp.where(condition, a, b), *states)
        empty = jax.tree.map(lambda a, s: jnp.asarray(a, s.dtype), START, state)
        before = choose(reset, empty, state)
        after = choose(valid, step(weights, x, before), before)
        return after, after

    return jax.lax.scan(body, jax.tree.map(jnp.asarray, state), (inputs, reset, valid))[1]


def problem(seed: int = 0, dtype: Any = np.float64) -> tuple[Any, Any, State]:
    random = np.random.default_rng(seed)
    draw = lambda *shape: random.standard_normal(shape).astype(dtype)
    return {"inner": draw(SIZE, SIZE), "outer": draw(SIZE)}, draw(LENGTH, SIZE), State(draw(SIZE), draw(SIZE))


def masks(pattern: str) -> tuple[np.ndarray, np.ndarray]:
    """`+` starts a document, `-` goes on with it, `.` is padding."""
    drawn = np.array(list(pattern))
    return drawn == "+", drawn != "."


LAYOUTS = {"continued": "-" * LENGTH, "packed": "---++-------+---..+----", "padded": "..---.---....+......---"}


def finite(states: State) -> State:
    return jax.tree.map(lambda a: jnp.where(jnp.isfinite(a), a, 0), states)


@functools.cache
def differentiated(run: Any) -> Any:
    """Compiled once for all layouts: values and gradients of a weighted sum of all states."""
    scale = State(*np.random.default_rng(1).standard_normal((2, LENGTH, SIZE)))

    def loss(weights: Any, inputs: Any, state: State, reset: Any, valid: Any) -> Any:
        states = run(weights, inputs, state, reset, valid)
        return sum(jnp.sum(w * a) for w, a in zip(scale, finite(states), strict=True)), states

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


@functools.cache
def by_newton(newton: Newton) -> Any:
    def run(weights: Any, inputs: Any, state: State, reset: Any, valid: Any) -> State:
        poisoned = jnp.where(valid[:, None], inputs, jnp.nan)
        unit = functools.partial(step, weights)
        return newton_scan(unit, poisoned, state, initial=START, reset=reset, valid=valid, newton=newton)[0]

    return run


@kinds
@pytest.mark.parametrize("method", ["sequential", "associative", "chunked"])
@pytest.mark.usefixtures("x64")
def test_states_and_gradients_equal_a_loop(method: str, jacobian: Jacobian) -> None:
    """To parameters that the step closes over, to inputs and to the state, with NaN in the padding."""
    weights, inputs, carried = problem()
    solve = differentiated(by_newton(Newton(jacobian=jacobian, method=method)))
    for layout in LAYOUTS.values():
        for state in (carried, START):
            point = (weights, inputs, state, *masks(layout))
            (_, expected), slopes = differentiated(loop)(*point)
            (_, found), ours = solve(*point)
            chex.assert_trees_all_close(found, expected, rtol=EXACT, atol=EXACT)
            chex.assert_trees_all_close(ours, slopes, rtol=EXACT, atol=10 * EXACT)
            chex.assert_tree_all_finite(ours)


@pytest.mark.usefixtures("x64")
def test_gradients_equal_differences() -> None:
    """Independent of any automatic differentiation, and a wrong one is seen."""
    weights, inputs, state = problem(2)
    reset, valid = masks(LAYOUTS["packed"])
    scale = np.random.default_rng(3).standard_normal((LENGTH, SIZE))

    @jax.jit
    def loss(point: Any) -> Any:
        unit = functools.partial(step, point[0])
        states, _ = newton_scan(unit, point[1], point[2], initial=START, reset=reset, valid=valid)
        return jnp.sum(scale * states.hidden)

    point = (weights, inputs, state)
    gradient = jax.grad(loss)(point)
    check_gradient(lambda p: float(loss(p)), point, gradient)
    wrong = ({**gradient[0], "inner": gradient[0]["inner"] * 1.001}, *gradient[1:])
    with pytest.raises(AssertionError, match="inner"):
        check_gradient(lambda p: float(loss(p)), point, wrong)


@kinds
def test_float32_and_bfloat16_inputs(jacobian: Jacobian) -> None:
    """States are float32, whatever the inputs, and those of the loop on the same inputs."""
    weights, inputs, state = problem(4, np.float32)
    narrow = jnp.asarray(inputs, jnp.bfloat16)
    reset, valid = masks(LAYOUTS["packed"])
    unit = lambda x, s: step(weights, x.astype(jnp.float32), s)
    for given in (inputs, narrow):
        states, report = newton_scan(
            unit, given, state, initial=START, reset=reset, valid=valid, newton=Newton(jacobian=jacobian)
        )
        expected = loop(weights, jnp.asarray(given, jnp.float32), state, reset, valid)
        assert states.hidden.dtype == jnp.float32
        chex.assert_trees_all_close(states, expected, rtol=SINGLE, atol=SINGLE)
        assert bool(report.converged)
        assert float(report.residual) <= 64 * np.finfo(np.float32).eps


@pytest.mark.usefixtures("x64")
def test_iterations_are_reported() -> None:
    """Newton converges quadratically, its diagonal linearly; a linear step needs one correction, and one to see it."""
    weights, inputs, state = problem(5)
    unit = functools.partial(step, weights)
    counts = {}
    for jacobian in Jacobian:
        _, report = newton_scan(unit, inputs, state, newton=Newton(jacobian=jacobian))
        counts[jacobian] = int(report.iterations)
    assert counts[Jacobian.DENSE] < counts[Jacobian.DIAGONAL] <= LENGTH + 1
    assert counts[Jacobian.DENSE] <= 8
    turn = weights["inner"] / 4
    _, report = newton_scan(lambda x, s: turn @ s + x, inputs, state.hidden)
    assert int(report.iterations) == 2


def logistic(x: Any, s: Any) -> Any:
    """Chaotic: a difference doubles at every step, on average."""
    return 4 * s * (1 - s) + 0 * x


CHAOS = {"inputs": np.zeros((200, 1), np.float32), "state": np.full(1, 0.3, np.float32)}


def test_what_does_not_converge_raises() -> None:
    """With the residual, the iterations, the tolerance and the way out; also while a gradient is taken."""
    few = Newton(max_iterations=5)
    message = r"residual of .* after 5 iterations; the tolerance is 7\.6e-06 and max_iterations=5.*'sequential'"
    with pytest.raises(NotConvergedError, match=message):
        newton_scan(logistic, CHAOS["inputs"], CHAOS["state"], newton=few)
    loss = lambda s: jnp.sum(newton_scan(logistic, CHAOS["inputs"], s, newton=few)[0])
    with pytest.raises(NotConvergedError, match="sequential"):
        jax.grad(loss)(CHAOS["state"])


def test_what_does_not_converge_is_nan_under_jit() -> None:
    """Values and gradients; in a batch, only of the sequence that it happens to."""
    run = lambda s: newton_scan(logistic, CHAOS["inputs"], s, newton=Newton(max_iterations=5))
    starts = jnp.array([[0.3], [0.0]])  # 0 is a fixed point
    states, pull, report = jax.vjp(jax.jit(jax.vmap(run)), starts, has_aux=True)
    np.testing.assert_array_equal(report.converged, [False, True])
    assert np.isnan(states[0]).all()
    np.testing.assert_array_equal(states[1], 0)
    (slope,) = pull(jnp.zeros_like(states).at[:, 0].set(1.0))
    assert np.isnan(slope[0]).all()
    np.testing.assert_allclose(slope[1], 4.0)


@pytest.mark.usefixtures("x64")
def test_as_many_iterations_as_steps_suffice() -> None:
    """One more step is exact after every iteration, chaotic or not, and although iterates overflow on the way."""
    length = 12
    inputs, s, expected = np.zeros((length, 1)), np.full(1, 0.3), []
    states, report = newton_scan(logistic, inputs, s, newton=Newton(tolerance=1e-9, max_iterations=length + 1))
    for _ in range(length):
        s = 4 * s * (1 - s)
        expected.append(s)
    assert int(report.iterations) > 8
    np.testing.assert_allclose(states, np.stack(expected), rtol=0, atol=4.0**length * 1e-15)


def test_values_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown jacobian 'full': choose one of dense, diagonal"):
        Newton(jacobian="full")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_iterations must be at least 1, not 0"):
        Newton(max_iterations=0)
    with pytest.raises(ValueError, match="tolerance must be positive"):
        Newton(tolerance=0.0)
    with pytest.raises(ValueError, match="method='pallas': an affine scan is auto"):
        Newton(method="pallas")
    with pytest.raises(ValueError, match=r"float32\[2\] into float32\[1\]"):
        newton_scan(lambda x, s: s[:1], np.zeros((3, 1), np.float32), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="real floating numbers"):
        newton_scan(lambda x, s: s, np.zeros((3, 1), np.float32), np.zeros(2, np.complex64))
