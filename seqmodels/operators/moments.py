"""Running mean and variance over time by exact merges of (count, mean, sum of squared deviations)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqmodels.operators.diagonal import since_last_reset
from seqmodels.operators.family import run_family
from seqmodels.scan import Recurrence
from seqmodels.typing import Segments


class Moments(NamedTuple):
    """What is known of G groups after `steps` steps, each step a population of its own with equal weight.

    The mean is origin + offset: `origin` is the first value seen, so that the offset and the deviations keep their
    digits where the mean is large beside them. `squares` is the sum over steps of the mean squared deviation from the
    mean. Before any step all four are 0.
    """

    steps: Int[Array, "*B"]
    origin: Float[Array, "*B G"]
    offset: Float[Array, "*B G"]
    squares: Float[Array, "*B G"]

    @property
    def mean(self) -> Float[Array, "*B G"]:
        return self.origin + self.offset

    @property
    def variance(self) -> Float[Array, "*B G"]:
        """Around the mean, and biased (divided by the count); 0 before any step."""
        return self.squares / jnp.maximum(self.steps, 1).astype(self.squares.dtype)[..., None]


def moments_recurrence() -> Recurrence:
    """Merges of neighbouring spans' moments (Chan, Golub and LeVeque's form of Welford's update); the state is one.

        n = n_a + n_b,  d = mean_b - mean_a
        mean = mean_a + d n_b / n,  squares = squares_a + squares_b + d^2 n_a n_b / n

    Read as `(mean, variance)`. Inputs are each step's own `Moments` with steps 1, or 0 where the step does not count.
    Counts are integers; no large number is subtracted from another one, as E[x^2] - E[x]^2 does.
    """
    return Recurrence(
        elements=lambda x: x,
        combine=_merge,
        identity=lambda e: jax.tree.map(jnp.zeros_like, e),
        read=lambda state, _: (state.mean, state.variance),
        neutral=lambda x: jax.tree.map(jnp.zeros_like, x),
        fold=_fold,
        emit=_emit,
    )


def _merge(earlier: Moments, later: Moments) -> Moments:
    count = earlier.steps + later.steps
    share = _as(later.steps, later.squares) / _as(jnp.maximum(count, 1), later.squares)
    origin = jnp.where(earlier.steps == 0, later.origin, earlier.origin)
    apart = later.offset + (later.origin - origin) - earlier.offset
    apart = jnp.where(later.steps == 0, 0, apart)  # an origin of nothing may lie far enough away to overflow below
    squares = earlier.squares + later.squares + _as(earlier.steps, apart) * share * jnp.square(apart)
    return Moments(count, origin, earlier.offset + share * apart, squares)


def _as(count: Array, like: Array) -> Array:
    return count.astype(like.dtype)


def _fold(inputs: Moments, reset: Bool[Array, "C"]) -> Moments:
    count = jnp.where(since_last_reset(reset), inputs.steps, 0)
    total, weight = jnp.sum(count, dtype=count.dtype), _as(count, inputs.squares)[:, None]
    origin = jnp.where(total > 0, inputs.origin[jnp.argmax(count > 0)], 0)
    away = jnp.where(weight > 0, inputs.offset + (inputs.origin - origin[None]), 0)
    offset = jnp.sum(weight * away, axis=0) / _as(jnp.maximum(total, 1), away)
    squares = jnp.where(weight > 0, inputs.squares + weight * jnp.square(away - offset[None]), 0)
    return Moments(total, origin, offset, jnp.sum(squares, axis=0))


def _emit(inputs: Moments, state: Moments, reset: Bool[Array, "C"]) -> tuple[Array, Array]:
    """The state is one step more, in front. Sums over each step's own segment are matmuls with a mask; squares grow by
    n_before n_own / n_after (x - mean before)^2 >= 0 a step, as Welford has them, so that nothing cancels."""
    rows = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), state, inputs)
    segment = jnp.pad(jnp.cumsum(reset.astype(jnp.int32)), (1, 0))
    past = (segment[:, None] == segment[None]) & jnp.tri(segment.shape[0], dtype=bool)
    total = lambda x: jnp.einsum("ij,jg->ig", _as(past, x), x, precision="highest")
    count = jnp.sum(jnp.where(past, rows.steps[None], 0), axis=1, dtype=rows.steps.dtype)
    # Of the first step that counts. Whatever it is, it cancels in what is read: it has no gradient.
    origin = rows.origin[jnp.argmax(past & (rows.steps > 0)[None], axis=1)]
    origin = jax.lax.stop_gradient(jnp.where(count[:, None] > 0, origin, 0))
    own, after = (_as(n, rows.squares)[:, None] for n in (rows.steps, jnp.maximum(count, 1)))
    away = jnp.where(own > 0, rows.offset + (rows.origin - origin), 0)
    offset = total(own * away) / after
    before = _as(count - rows.steps, away)[:, None]
    step = jnp.where(before * own > 0, away - jnp.concatenate([offset[:1], offset[:-1]]), 0)
    squares = total(jnp.where(own > 0, rows.squares, 0) + own * (before / after) * jnp.square(step))
    return (origin + offset)[1:], (squares / after)[1:]


def running_moments(
    x: Float[Array, "B T D"],
    groups: int,
    state: Moments | None = None,
    *,
    segments: Segments | None = None,
    method: str = "auto",
    chunk: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T G"], Float[Array, "B T G"], Moments]:
    """Mean and biased variance of each group of D / groups channels over all steps so far: `(mean, variance, state)`.

    The statistics of a timestep norm (arXiv 2404.08801): at step t over the t D / groups values of the own document,
    the own step included. Results are at least float32; squares of what differs from the first value must not overflow
    (1e19 in float32). `state` None starts at nothing; `segments` None: one document a row, which continues `state`. On
    CPUs the chunk form of a long row has a gradient of its own, which forward-mode differentiation alone does not pass;
    `sequential` does. Raises ValueError on shapes that do not fit.
    """
    if x.ndim != 3 or groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"running_moments takes x [B, T, D] with groups dividing D, not {x.shape} and groups={groups}")
    kind = jnp.promote_types(x.dtype, jnp.float32)
    if state is None:
        state = empty_moments(x.shape[0], groups, kind)
    elif state.steps.shape != x.shape[:1] or state.origin.shape != (x.shape[0], groups):
        raise ValueError(
            f"the state of x {x.shape} in {groups} groups has steps [B] and origin [B, G], "
            f"not {state.steps.shape} and {state.origin.shape}"
        )
    if segments is not None:  # padding may hold anything
        x = jnp.where(segments.valid[..., None], x, 0)
    values = x.astype(kind).reshape(*x.shape[:2], groups, -1)
    origin = values[..., 0]
    away = values - origin[..., None]
    offset = jnp.mean(away, axis=-1)
    squares = jnp.mean(jnp.square(away - offset[..., None]), axis=-1)
    (mean, variance), state = run_family(
        "moments",
        moments_recurrence(),
        Moments(jnp.ones(x.shape[:2], jnp.int32), origin, offset, squares),
        state,
        segments=segments,
        method=method,
        chunk=chunk,
        sequence_axis=sequence_axis,
    )
    return mean, variance, state


def empty_moments(batch: int, groups: int, dtype: Any = jnp.float32) -> Moments:
    """Nothing seen yet, in at least float32."""
    zeros = jnp.zeros((batch, groups), jnp.promote_types(dtype, jnp.float32))
    return Moments(jnp.zeros((batch,), jnp.int32), zeros, zeros, zeros)
