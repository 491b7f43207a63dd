"""The Mamba block in float64 numpy, one token and one channel's state at a time (arXiv 2312.00752, algorithm 2).

The drive is dt_t B_t x_t, as in the authors' code. Independent of the library. `parameters` is the nested dict of
arrays of one mixer.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def affine(x: np.ndarray, layer: dict[str, np.ndarray]) -> np.ndarray:
    return x @ layer["kernel"] + layer.get("bias", 0.0)


def mamba1_block(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: dict[str, np.ndarray] | None = None,
    *,
    norm_eps: float | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`(y [T, D], state)` of one row of documents that begin at the positions `starts`, or at 0 go on from `state`."""
    inner, size = parameters["a_log"].shape
    rank = parameters["step"]["kernel"].shape[0]
    taps = parameters["conv"]["kernel"]
    width = taps.shape[0]
    history, h = ([], np.zeros((inner, size))) if state is None else (list(state["conv"]), state["ssm"].copy())
    y = []
    for t in range(x.shape[0]):
        if t in starts:
            history, h = [], np.zeros((inner, size))
        projected = affine(x[t], parameters["input"])
        history.append(projected[:inner])
        mixed = np.zeros(inner) + parameters["conv"].get("bias", 0.0)
        for back in range(min(width, len(history))):
            mixed = mixed + taps[width - 1 - back] * history[-1 - back]
        u = silu(mixed)
        selected = u @ parameters["select"]["kernel"]
        parts = [selected[:rank], selected[rank : rank + size], selected[rank + size :]]
        if norm_eps is not None:
            parts = [part / np.sqrt(np.sum(part**2) / part.size + norm_eps) for part in parts]
        low, b, c = parts
        dt = np.log1p(np.exp(affine(low, parameters["step"]) + parameters["dt_bias"]))
        out = np.zeros(inner)
        for d in range(inner):
            h[d] = np.exp(-dt[d] * np.exp(parameters["a_log"][d])) * h[d] + dt[d] * b * u[d]
            out[d] = c @ h[d] + parameters["skip"][d] * u[d]
        y.append(affine(out * silu(projected[inner:]), parameters["out"]))
    recent = ([np.zeros(inner)] * (width - 1) + history)[-(width - 1) :]
    return np.stack(y), {"ssm": h, "conv": np.stack(recent)}
