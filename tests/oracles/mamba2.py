"""The Mamba-2 block in float64 numpy, one token at a time, from the state-space form (arXiv 2405.21060).

h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T with h of [head size, state size], as the paper writes it; the library keeps
the transpose. Independent of the library. `parameters` is the nested dict of arrays of one mixer.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def mamba2_block(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: dict[str, np.ndarray] | None = None,
    *,
    head_size: int,
    state_size: int,
    groups: int,
    eps: float = 1e-5,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`(y [T, D], state)` of one row of documents that begin at the positions `starts`, or at 0 go on from `state`."""
    heads = parameters["a_log"].shape[0]
    inner, shared = heads * head_size, groups * state_size
    taps, conv_bias = parameters["conv"]["kernel"], parameters["conv"]["bias"]
    width = taps.shape[0]
    negative_a = -np.exp(parameters["a_log"])
    y, history, h = [], [], None
    if state is not None:
        history, h = list(state["conv"]), state["ssm"].copy()
    for t in range(x.shape[0]):
        if t in starts:
            history, h = [], np.zeros((heads, head_size, state_size))
        projected = x[t] @ parameters["input"]["kernel"]
        z, xbc, dt = np.split(projected, [inner, 2 * inner + 2 * shared])
        history.append(xbc)
        mixed = conv_bias.copy()
        for back in range(min(width, len(history))):
            mixed = mixed + taps[width - 1 - back] * history[-1 - back]
        mixed = silu(mixed)
        inputs = mixed[:inner].reshape(heads, head_size)
        b = mixed[inner : inner + shared].reshape(groups, state_size)
        c = mixed[inner + shared :].reshape(groups, state_size)
        dt = np.log1p(np.exp(dt + parameters["dt_bias"]))
        out = np.zeros((heads, head_size))
        for n in range(heads):
            group = n * groups // heads
            h[n] = np.exp(dt[n] * negative_a[n]) * h[n] + dt[n] * np.outer(inputs[n], b[group])
            out[n] = h[n] @ c[group] + parameters["skip"][n] * inputs[n]
        gated = out.reshape(inner) * silu(z)
        parts = gated.reshape(groups, -1)
        normed = (parts / np.sqrt(np.mean(parts**2, axis=1, keepdims=True) + eps)).reshape(inner)
        normed = normed * parameters["norm"]["scale"]
        y.append(normed @ parameters["out"]["kernel"])
    recent = ([np.zeros(taps.shape[1])] * (width - 1) + history)[-(width - 1) :]
    return np.stack(y), {"ssm": h, "conv": np.stack(recent)}
