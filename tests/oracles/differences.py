"""Gradients of a numpy function by central differences, to hold against those of the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Balances truncation (step^2) against rounding (1e-16 / step): both are then near 1e-10.
STEP = 1e-5
# Relative to the largest derivative; leaves room for third derivatives of a few hundred.
TOLERANCE = 1e-6


def check_gradient(function: Callable[[Any], float], point: Any, gradient: Any, seed: int = 0) -> None:
    """Asserts that `gradient` is that of `function` at `point`, in a random direction of every leaf of its own."""
    random = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), point))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(point)]
    expected, found = [], []
    for index, slope in enumerate(jax.tree.leaves(gradient)):
        direction = random.standard_normal(leaves[index].shape)
        shifted = lambda step, index=index, direction=direction: function(
            jax.tree.unflatten(
                structure, [leaf + step * direction if n == index else leaf for n, leaf in enumerate(leaves)]
            )
        )
        expected.append((shifted(STEP) - shifted(-STEP)) / (2 * STEP))
        found.append(float(np.sum(np.asarray(slope) * direction)))
    wrong = {
        path: (f, e)
        for path, f, e in zip(paths, found, expected, strict=True)
        if abs(f - e) > TOLERANCE * max(map(abs, expected))
    }
    assert not wrong, f"(gradient, difference quotient) along a direction: {wrong}"
