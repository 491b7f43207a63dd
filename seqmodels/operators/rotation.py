"""Running angles: a sum over time modulo one turn, which keeps its digits at any length and any step."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqmodels.operators.diagonal import since_last_reset
from seqmodels.operators.family import run_family
from seqmodels.scan import Recurrence
from seqmodels.typing import Segments


def wrapped(turns: Float[Array, "..."]) -> Float[Array, "..."]:
    """Without whole turns, in [-1/2, 1/2], exactly; the gradient of that is 1."""
    return turns - jnp.round(turns)


def rotation_recurrence() -> Recurrence:
    """phi_t = phi_{t-1} + turns_t without whole turns, read as phi_t; the state is an element.

    In turns, not in radians: a whole turn is then dropped without rounding, however many of them a step makes.
    """

    def fold(turns: Float[Array, "C D"], reset: Bool[Array, "C"]) -> Float[Array, "D"]:
        return wrapped(jnp.sum(jnp.where(since_last_reset(reset)[:, None], own(turns), 0), axis=0))

    def emit(turns: Float[Array, "C D"], state: Float[Array, "D"], reset: Bool[Array, "C"]) -> Float[Array, "C D"]:
        segment = jnp.cumsum(reset.astype(jnp.int32))
        steps = jnp.arange(reset.shape[0])
        seen = (segment[:, None] == segment[None]) & (steps[:, None] >= steps[None])
        inside = seen.astype(state.dtype) @ own(turns)
        return wrapped(inside + jnp.where(segment[:, None] == 0, state[None], 0))

    return Recurrence(
        elements=own,
        combine=lambda earlier, later: wrapped(earlier + later),
        identity=jnp.zeros_like,
        neutral=jnp.zeros_like,
        fold=fold,
        emit=emit,
    )


def own(turns: Float[Array, "*C D"]) -> Float[Array, "*C D"]:
    """A step's own angle: sums over a chunk are then small, however many turns its steps make."""
    return wrapped(turns.astype(jnp.promote_types(turns.dtype, jnp.float32)))


def running_angles(
    turns: Float[Array, "B T D"],
    state: Float[Array, "B D"] | None = None,
    *,
    segments: Segments | None = None,
    method: str = "auto",
    chunk: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """phi_t = phi_{t-1} + turns_t without whole turns, over a batch: `(phi [B, T, D], state [B, D])`, at least float32.

    A plain sum of a million steps would be off by a hundredth of a turn in float32. `segments` None: one document a
    row, which continues `state`. On CPUs the chunk form of a long row has a gradient of its own, which forward-mode
    differentiation alone does not pass; `sequential` does. Raises ValueError on shapes that do not fit.
    """
    if turns.ndim != 3 or (state is not None and state.shape != (turns.shape[0], turns.shape[2])):
        raise ValueError(
            f"running_angles takes turns [B, T, D] and a state [B, D] or None, not {turns.shape} and "
            f"{getattr(state, 'shape', None)}"
        )
    return run_family(
        "rotation",
        rotation_recurrence(),
        turns,
        state,
        segments=segments,
        method=method,
        chunk=chunk,
        sequence_axis=sequence_axis,
    )
