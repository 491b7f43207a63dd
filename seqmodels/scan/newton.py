"""Nonlinear recurrences in parallel over time: Newton's method, whose every iteration is one affine scan."""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from seqmodels import compat
from seqmodels.scan.affine import affine_scan
from seqmodels.scan.recurrence import Tree, precise, select, shapes, take

ROUNDINGS = 64
"""The default tolerance in units of the state's type: what is left when each of a step's sums has rounded."""


class Jacobian(enum.StrEnum):
    """What a Newton iteration keeps of a step's derivative."""

    DENSE = "dense"
    DIAGONAL = "diagonal"


@dataclasses.dataclass(frozen=True)
class Newton:
    """How `newton_scan` solves.

    `jacobian`: dense is Newton's method, which converges quadratically and holds [T, N, N] for a state of N numbers
    (DEER, arXiv 2309.12252); diagonal holds [T, N] and takes more iterations (quasi-DEER, arXiv 2407.19115).
    `tolerance`: of the largest residual, relative to the largest entry of its leaf of the state; None: 64 roundings.
    After k iterations the first k steps are exact but for rounding, so that about T of them suffice; cells that forget
    need a few, chaotic ones nearly all, and may never reach the tolerance.
    `method`: of the affine scan, by default what `scan` would choose.
    """

    jacobian: Jacobian = Jacobian.DENSE
    tolerance: float | None = None
    max_iterations: int = 100
    method: str = "auto"

    def __post_init__(self):
        if self.jacobian not in list(Jacobian):
            raise ValueError(f"unknown jacobian {self.jacobian!r}: choose one of {', '.join(Jacobian)}")
        if self.tolerance is not None and self.tolerance <= 0:
            raise ValueError(f"tolerance must be positive, or None for {ROUNDINGS} roundings, not {self.tolerance}")
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, not {self.max_iterations}")
        if self.method not in ("auto", "sequential", "associative", "chunked"):
            raise ValueError(f"method={self.method!r}: an affine scan is auto, sequential, associative or chunked")

    def tolerance_of(self, dtype: Any) -> float:
        return ROUNDINGS * float(jnp.finfo(dtype).eps) if self.tolerance is None else self.tolerance


class NewtonReport(NamedTuple):
    """How a solution was reached. `residual` is that of the iterate before the last correction."""

    iterations: Int[Array, "*B"]
    residual: Float[Array, "*B"]
    converged: Bool[Array, "*B"]


class NotConvergedError(ArithmeticError):
    """Newton's method has not found the states of a recurrence."""


class _Problem(NamedTuple):
    """What the solution depends on; states are vectors of N numbers."""

    constants: Any
    inputs: Tree
    start: Float[Array, "N"]
    initial: Float[Array, "N"]


class _Masks(NamedTuple):
    """`known`: the state before the step is `initial` (`restarted`) or `start`, no token having come in between."""

    known: Bool[Array, "T"]
    restarted: Bool[Array, "T"]
    valid: Bool[Array, "T"]


def newton_scan(
    step: Callable[[Tree, Tree], Tree],
    inputs: Tree,
    state: Tree,
    *,
    initial: Tree | None = None,
    reset: Bool[Array, "T"] | None = None,
    valid: Bool[Array, "T"] | None = None,
    newton: Newton | None = None,
) -> tuple[Tree, NewtonReport]:
    """All states of s_t = step(x_t, s_{t-1}) at once: `(states [T, ...], report)` from inputs [T, ...].

    Newton's method on all T equations (arXiv 2309.12252): with A_t the derivative of `step` at the last iterate, the
    correction is the affine scan d_t = A_t d_{t-1} + (step(x_t, s_{t-1}) - s_t). The gradient is that of the solution
    (implicit function theorem), to inputs, `state`, `initial` and what `step` closes over: one affine scan backwards in
    time, whatever the iterations did; with diagonal derivatives, iterations of such.

    `state` is a pytree of real floating arrays, as `step` returns it. `reset`, `valid` as in `scan`; a reset restores
    `initial`, default zeros. Both states may hold -inf, where `step` and its derivative are finite there. Batch and
    heads come from `jax.vmap`.

    Raises NotConvergedError where the residual stays above the tolerance. Under `jit` and `vmap` nothing can raise:
    states and gradients are NaN then, and `check_converged` on the report raises outside.
    """
    newton = newton or Newton()
    length = jax.tree.leaves(inputs)[0].shape[0]
    reset = jnp.zeros(length, bool) if reset is None else jnp.asarray(reset)
    valid = jnp.ones(length, bool) & (True if valid is None else valid)  # never a numpy array, which vmap would pass on
    inputs = select(valid, inputs, jax.tree.map(jnp.zeros_like, inputs))
    inputs, state, initial = compat.vary_alike((inputs, *_settled(step, inputs, state, initial)))
    start, unravel = ravel_pytree(state)
    function = lambda x, s: ravel_pytree(step(x, unravel(s)))[0].astype(start.dtype)
    function, constants = jax.closure_convert(function, take(inputs, 0), start)

    before = jnp.cumsum(valid) - valid  # how many tokens came before the step, and before its document
    document = lax.cummax(jnp.where(reset, before, 0))
    masks = _Masks(before == document, jnp.cumsum(reset) > 0, valid)
    problem = _Problem(tuple(constants), inputs, start, ravel_pytree(initial)[0])
    sizes = tuple(leaf.size for leaf in jax.tree.leaves(state))
    states, iterations, residual = _solve(function, sizes, newton, problem, masks)
    iterations, residual = lax.stop_gradient((iterations, residual))
    report = NewtonReport(iterations.astype(jnp.int32), residual, residual <= newton.tolerance_of(residual.dtype))
    check_converged(report, newton)
    return jax.vmap(unravel)(jnp.where(report.converged, states, jnp.nan)), report


def check_converged(report: NewtonReport, newton: Newton) -> None:
    """Raises NotConvergedError on a report, of any batch, that says so; under `jit` it cannot look, and passes."""
    try:
        if bool(jnp.all(report.converged)):
            return
    except jax.errors.ConcretizationTypeError:
        return
    tolerance = newton.tolerance_of(report.residual.dtype)
    raise NotConvergedError(
        f"Newton's method left a residual of {float(jnp.max(report.residual)):.2g}, relative to the state, after "
        f"{int(jnp.max(report.iterations))} iterations; the tolerance is {tolerance:.2g} and "
        f"max_iterations={newton.max_iterations}. Run method='sequential', which has nothing to converge, or allow "
        "more iterations: there are never much more than tokens"
    )


def _settled(step: Callable[..., Tree], inputs: Tree, state: Tree, initial: Tree | None) -> tuple[Tree, Tree]:
    """`(state, initial)`, all leaves in the one type that holds the state and what a step returns."""
    state = precise(state)
    after = jax.eval_shape(lambda x, s: precise(step(x, s)), take(inputs, 0), state)
    leaves = jax.tree.leaves(state)
    same = jax.tree.structure(after) == jax.tree.structure(state)
    if not same or any(a.shape != b.shape for a, b in zip(jax.tree.leaves(after), leaves, strict=True)):
        raise ValueError(f"a step turns the state {shapes(state)} into {shapes(after)}: structure and shapes must stay")
    kind = jnp.result_type(*leaves, *jax.tree.leaves(after))
    if not jnp.issubdtype(kind, jnp.floating):
        raise ValueError(f"Newton's method needs a state of real floating numbers, not {shapes(state)}")
    state = jax.tree.map(lambda a: a.astype(kind), state)
    initial = jax.tree.map(jnp.zeros_like, state) if initial is None else initial
    return state, jax.tree.map(lambda a, s: jnp.broadcast_to(a, s.shape).astype(kind), initial, state)


def _before(problem: _Problem, masks: _Masks, states: Float[Array, "T N"]) -> Float[Array, "T N"]:
    base = select(masks.restarted, problem.initial[None], problem.start[None])
    return select(masks.known, base, jnp.concatenate([problem.start[None], states[:-1]]))


def _after(function: Callable[..., Array], problem: _Problem, masks: _Masks, states: Array) -> Float[Array, "T N"]:
    """Every step from the state before it; the solution is the fixed point."""
    before = _before(problem, masks, states)
    after = jax.vmap(lambda x, s: function(x, s, *problem.constants))(problem.inputs, before)
    return select(masks.valid, after, before)


def _jacobian(
    function: Callable[..., Array], problem: _Problem, masks: _Masks, states: Array, kind: Jacobian
) -> Float[Array, "T N *N"]:
    """d states_t / d states_{t-1} of every step, or its diagonal."""
    before = _before(problem, masks, states)
    run = jax.vmap(lambda x, s: function(x, s, *problem.constants))
    eye = compat.vary_over(jnp.eye(before.shape[1], dtype=before.dtype), compat.varying_axes(before))
    along = lambda basis: (jnp.broadcast_to(basis, before.shape),)
    column = lambda basis: jax.jvp(lambda s: run(problem.inputs, s), (before,), along(basis))[1]
    if kind == Jacobian.DENSE:
        steps, unmoved = jax.vmap(column, out_axes=2)(eye), eye[None]
    else:  # one column at a time, so that [T, N, N] never exists
        diagonal = lax.map(lambda basis: column(basis) @ basis, eye)
        steps, unmoved = diagonal.T, jnp.ones_like(eye[:1])
    return select(masks.known, jnp.zeros_like(steps), select(masks.valid, steps, unmoved))


def _iterate(
    residual: Callable[[Array], Array],
    correct: Callable[[Array, Array], Array],
    guess: Float[Array, "T N"],
    sizes: tuple[int, ...],
    newton: Newton,
) -> tuple[Float[Array, "T N"], Float[Array, ""], Float[Array, ""]]:
    """x + correct(x, residual(x)) until the residual is small, then `(x, iterations, residual)`, all of x's type.

    The residual is that before the last correction, which makes it smaller still.
    """
    tolerance = newton.tolerance_of(guess.dtype)
    vary = lambda a: compat.vary_over(jnp.asarray(a), compat.varying_axes(guess))
    ends = list(itertools.accumulate(sizes))[:-1]

    def relative(x: Array, r: Array) -> Array:
        finite = jnp.where(jnp.isfinite(x), x, 0)  # -inf stands where a document has not begun
        parts = jnp.split(jnp.max(jnp.maximum(abs(finite), abs(finite + r)), axis=0), ends)
        errors = jnp.split(jnp.max(abs(r), axis=0), ends)
        ratio = lambda error, scale: jnp.where(scale == 0, 0, error / jnp.where(scale == 0, 1, scale))
        return jnp.max(jnp.stack([ratio(jnp.max(e), jnp.max(p)) for e, p in zip(errors, parts, strict=True)]))

    def body(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x, iterations, _ = carry
        r = residual(x)
        corrected, size = x + correct(x, r), relative(x, r)
        # Overflow spoils what comes later in time; that begins again, and what is exact already stays.
        corrected = jnp.where(jnp.isfinite(corrected), corrected, guess)
        return corrected, iterations + 1, jnp.where(jnp.isnan(size), jnp.inf, size)

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        _, iterations, size = carry
        return (iterations < newton.max_iterations) & (size > tolerance)  # never on NaN

    size = jnp.where(jnp.any(jnp.isnan(guess)), jnp.nan, jnp.inf).astype(guess.dtype)
    carry = (guess, vary(jnp.zeros((), guess.dtype)), size)
    return lax.while_loop(unfinished, body, carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _solve(
    function: Callable[..., Array], sizes: tuple[int, ...], newton: Newton, problem: _Problem, masks: _Masks
) -> tuple[Float[Array, "T N"], Float[Array, ""], Float[Array, ""]]:
    """`(states, iterations, residual)`."""
    after = lambda states: _after(function, problem, masks, states)
    fixed = masks.known & ~masks.valid  # padding before a document: nothing to solve

    def residual(states: Array) -> Array:
        return jnp.where(fixed[:, None], 0, after(states) - states)

    def correct(states: Array, r: Array) -> Array:
        return affine_scan(_jacobian(function, problem, masks, states, newton.jacobian), r, newton.method)

    zeros = jnp.zeros((fixed.shape[0], problem.start.shape[0]), problem.start.dtype)
    return _iterate(residual, correct, after(zeros), sizes, newton)


def _solve_forward(function: Any, sizes: Any, newton: Newton, problem: _Problem, masks: _Masks) -> tuple[Any, Any]:
    solution = _solve(function, sizes, newton, problem, masks)
    return solution, (problem, masks, *solution)


def _solve_backward(
    function: Callable[..., Array], sizes: tuple[int, ...], newton: Newton, saved: Any, cotangents: Any
) -> tuple[_Problem, None]:
    """l_t = g_t + A_{t+1}^T l_{t+1}, then every step's own derivative to what the problem depends on."""
    problem, masks, states, _, error = saved
    given = cotangents[0]
    steps = _jacobian(function, problem, masks, states, newton.jacobian)
    steps = jnp.concatenate([steps[1:], jnp.zeros_like(steps[:1])])[::-1]
    transposed = jnp.swapaxes(steps, 1, 2) if steps.ndim == 3 else steps
    backwards = lambda drive: affine_scan(transposed, drive[::-1], newton.method)[::-1]
    if newton.jacobian == Jacobian.DENSE:
        slopes = backwards(given)
    else:  # the same scan as the approximate inverse of a linear system
        _, pull = jax.vjp(lambda states: _after(function, problem, masks, states), states)
        residual = lambda slopes: given + pull(slopes)[0] - slopes
        slopes, _, own = _iterate(residual, lambda _, r: backwards(r), backwards(given), sizes, newton)
        error = jnp.maximum(error, own)
    slopes = jnp.where(error <= newton.tolerance_of(error.dtype), slopes, jnp.nan)
    _, pull = jax.vjp(lambda problem: _after(function, problem, masks, states), problem)
    return pull(slopes)[0], None


_solve.defvjp(_solve_forward, _solve_backward)
