"""Affine recurrences from a declared structure: a transition times a drive, with the chunk forms that fit it."""

from __future__ import annotations

import enum
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Inexact

from seqmodels.operators.diagonal import diagonal_recurrence
from seqmodels.operators.outer import outer_recurrence
from seqmodels.scan import Recurrence


class Transition(enum.StrEnum):
    """What a step does to the state before its drive is added."""

    IDENTITY = "identity"
    SCALAR = "scalar"
    DIAGONAL = "diagonal"
    DENSE = "dense"


class Drive(enum.StrEnum):
    """What a step adds: a vector, or the outer product of a key and a value."""

    VECTOR = "vector"
    OUTER = "outer"


class Dense(NamedTuple):
    """One step's inputs of a dense transition: `matrix` [D, D] and `drive` [D], or [D, V] for a matrix state."""

    matrix: Inexact[Array, "D D"]
    drive: Inexact[Array, "D *V"]


def affine_recurrence(transition: Transition | str, drive: Drive | str, *, read_before: bool = False) -> Recurrence:
    """state_t = transition_t state_{t-1} + drive_t with `fold` and `emit` where the structure has them.

    | transition | drive | one step's inputs | output |
    | --- | --- | --- | --- |
    | identity, scalar, diagonal | outer | `Outer(query, key, value, log_decay)`; log_decay None, [], [K] | q^T S |
    | identity, scalar, diagonal | vector | `Diagonal(log_decay, drive)`; log_decay zeros or [], [D] | h |
    | dense | vector, outer | `Dense(matrix, drive)`; drive [D], or the matrix [D, V] | the state |

    A dense transition has no cheaper form than its elements: chunks use an associative scan. `read_before` reads the
    state before the step (outer drives only). Raises ValueError on an unknown structure.
    """
    try:
        transition, drive = Transition(transition), Drive(drive)
    except ValueError as error:
        known = [", ".join(kind) for kind in (Transition, Drive)]
        raise ValueError(f"{error}: transitions are {known[0]}; drives are {known[1]}") from None
    if read_before and drive is not Drive.OUTER:
        raise ValueError("read_before belongs to outer drives; a vector state is read after its step")
    if transition is Transition.DENSE:
        return _dense_recurrence()
    return diagonal_recurrence() if drive is Drive.VECTOR else outer_recurrence(read_before=read_before)


def _dense_recurrence() -> Recurrence:
    eye = lambda x: jnp.eye(x.shape[-1], dtype=x.dtype)
    return Recurrence(
        elements=lambda x: x,
        combine=lambda a, b: Dense(b.matrix @ a.matrix, b.matrix @ a.drive + b.drive),
        identity=lambda e: Dense(eye(e.matrix), jnp.zeros_like(e.drive)),
        act=lambda e, s: e.matrix @ s + e.drive,
        initial=lambda x: jnp.zeros(x.drive.shape, jnp.result_type(x.matrix, x.drive, jnp.float32)),
        neutral=lambda x: Dense(eye(x.matrix), jnp.zeros_like(x.drive)),
    )
