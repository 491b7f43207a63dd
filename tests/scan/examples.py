"""Recurrences for the tests of the executors, each with a float64 numpy loop that shares no code with the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.scan import Recurrence

SIZE = 3


class Example(NamedTuple):
    name: str
    recurrence: Recurrence
    inputs: Callable[[np.random.Generator, int], Any]  # (rng, T) -> inputs [T, ...]
    state: Callable[[np.random.Generator], Any]
    start: Any  # the state before any token, as numpy
    step: Callable[[Any, Any], Any]  # (state, inputs_t) -> state, numpy
    read: Callable[[Any, Any], Any]


def loop(example: Example, inputs: Any, state: Any, reset: np.ndarray | None, valid: np.ndarray | None) -> Any:
    """Outputs and final state, one Python step at a time, as the contract words it."""
    wide = jax.tree.map(lambda x: np.asarray(x, np.result_type(np.asarray(x).dtype, np.float64)), (inputs, state))
    inputs, state = wide
    state = example.start if state is None else state
    outputs = []
    for t in range(jax.tree.leaves(inputs)[0].shape[0]):
        x = jax.tree.map(lambda leaf, t=t: leaf[t], inputs)
        if reset is not None and reset[t]:
            state = example.start
        if valid is not None and not valid[t]:
            outputs.append(None)
            continue
        after = example.step(state, x)
        outputs.append(example.read(state if example.recurrence.read_before else after, x))
        state = after
    zero = jax.tree.map(np.zeros_like, next((y for y in outputs if y is not None), example.read(state, x)))
    return np.stack([zero if y is None else y for y in outputs]), state


def _affine(read_before: bool = False, start: float = 0.5) -> Recurrence:
    return Recurrence(
        elements=lambda x: (x["log_decay"], x["drive"]),
        combine=lambda a, b: (a[0] + b[0], jnp.exp(b[0]) * a[1] + b[1]),
        identity=lambda e: jax.tree.map(jnp.zeros_like, e),
        act=lambda e, s: jnp.exp(e[0]) * s + e[1],
        read=lambda s, x: s * x["gate"],
        initial=lambda x: jnp.full(x["drive"].shape, start),
        read_before=read_before,
    )


def _affine_inputs(rng: np.random.Generator, length: int) -> dict[str, jax.Array]:
    normal = lambda: jnp.asarray(rng.normal(size=(length, SIZE)), jnp.float32)
    return {"log_decay": -jnp.exp(normal()), "drive": normal(), "gate": normal()}


def _affine_step(state: np.ndarray, x: dict[str, np.ndarray]) -> np.ndarray:
    return np.exp(x["log_decay"]) * state + x["drive"]


AFFINE = Example(
    "affine",
    _affine(),
    _affine_inputs,
    lambda rng: jnp.asarray(rng.normal(size=SIZE), jnp.float32),
    np.full(SIZE, 0.5),
    _affine_step,
    lambda s, x: s * x["gate"],
)
# A product of matrices: the state is an element, and the order matters.
PRODUCT = Example(
    "product",
    Recurrence(
        elements=lambda x: x,
        combine=lambda a, b: b @ a,
        identity=lambda e: jnp.eye(e.shape[-1], dtype=e.dtype),
        read=lambda s, x: s[0] + x[0],
    ),
    lambda rng, length: jnp.asarray(rng.normal(size=(length, SIZE, SIZE)) / np.sqrt(SIZE), jnp.float32),
    lambda rng: jnp.asarray(rng.normal(size=(SIZE, SIZE)), jnp.float32),
    np.eye(SIZE),
    lambda s, x: x @ s,
    lambda s, x: s[0] + x[0],
)
# A maximum and how often it was met: exact, with an integer in the state, and -inf where nothing was seen.
COUNT = Example(
    "running maximum",
    Recurrence(
        elements=lambda x: (x, jnp.ones((), jnp.int32)),
        combine=lambda a, b: (
            jnp.maximum(a[0], b[0]),
            jnp.where(a[0] >= b[0], a[1], 0) + jnp.where(b[0] >= a[0], b[1], 0),
        ),
        identity=lambda e: (jnp.full_like(e[0], -jnp.inf), jnp.zeros_like(e[1])),
        read=lambda s, x: jnp.stack([s[0], s[1].astype(s[0].dtype), x]),
    ),
    lambda rng, length: jnp.asarray(rng.integers(0, 4, length), jnp.float32),
    lambda rng: (jnp.asarray(2.0), jnp.asarray(3, jnp.int32)),
    (np.asarray(-np.inf), np.asarray(0)),
    lambda s, x: (np.maximum(s[0], x), (s[1] if s[0] >= x else 0) + (1 if x >= s[0] else 0)),
    lambda s, x: np.stack([s[0], np.float64(s[1]), x]),
)
EXAMPLES = (
    AFFINE,
    AFFINE._replace(name="affine, read before", recurrence=_affine(read_before=True)),
    PRODUCT,
    COUNT,
)
