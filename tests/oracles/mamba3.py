"""The Mamba-3 block in float64 numpy, one token and one head at a time, from the equations of arXiv 2603.15569.

h_t of [head size, state size] keeps to the paper's form with both ends of the trapezoid as they are written; the
library keeps another state in between. Independent of the library. `parameters` is the nested dict of arrays of one
mixer.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def rms(x: np.ndarray, scale: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2) + eps) * scale


def turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Each pair of neighbours as a complex number, times exp(i angle); what has no angle stays."""
    pairs = x[: 2 * angles.size : 2] + 1j * x[1 : 2 * angles.size : 2]
    pairs = pairs * np.exp(1j * angles)
    out = x.copy()
    out[: 2 * angles.size : 2], out[1 : 2 * angles.size : 2] = pairs.real, pairs.imag
    return out


def fresh(heads: int, angles: int, rank: int, head_size: int, state_size: int) -> dict[str, np.ndarray]:
    return {
        "angle": np.zeros((heads, angles)),
        "h": np.zeros((heads, head_size, state_size)),
        "k": np.zeros((heads, rank, state_size)),
        "v": np.zeros((heads, head_size)),
    }


def mamba3_block(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: dict[str, np.ndarray] | None = None,
    *,
    groups: int,
    angles: int,
    floor: float = 1e-4,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`(y [T, D], state)` of one row of documents that begin at the positions `starts`, or at 0 go on from `state`."""
    heads, rank, size = parameters["bias_b"].shape
    inner = parameters["out"]["kernel"].shape[0]
    p = inner // heads
    ones = np.ones((heads, rank, p))
    up_x, up_z, down = (parameters.get(name, ones) for name in ("copies_x", "copies_z", "copies_y"))
    shared = rank * groups * size
    new = lambda: fresh(heads, angles, rank, p, size)
    state = new() if state is None else {name: leaf.copy() for name, leaf in state.items()}
    y = []
    for t in range(x.shape[0]):
        if t in starts:
            state = new()
        parts = np.split(x[t] @ parameters["input"]["kernel"], np.cumsum([inner, inner, shared, shared] + 3 * [heads]))
        z, v, b, c, dd_dt, dd_a, trap, angle = parts
        z, v = z.reshape(heads, p), v.reshape(heads, p)
        b, c = b.reshape(rank, groups, size), c.reshape(rank, groups, size)
        out = np.zeros((heads, p))
        for n in range(heads):
            group = n * groups // heads
            dt = np.log1p(np.exp(dd_dt[n] + parameters["dt_bias"][n]))
            tail = 1 + dd_a[n] if dd_a[n] >= 0 else 1 / (1 - dd_a[n])
            alpha, share = np.exp(-max(tail, floor) * dt), 1 / (1 + np.exp(-trap[n]))
            state["angle"][n] += np.pi * np.tanh(angle) * dt
            k, q = np.zeros((rank, size)), np.zeros((rank, size))
            for r in range(rank):
                k[r] = rms(b[r, group], parameters["norm_b"]["scale"]) + parameters["bias_b"][n, r]
                q[r] = rms(c[r, group], parameters["norm_c"]["scale"]) + parameters["bias_c"][n, r]
                k[r], q[r] = turned(k[r], state["angle"][n]), turned(q[r], state["angle"][n])
            h = alpha * state["h"][n]
            for r in range(rank):
                h = h + (1 - share) * dt * alpha * np.outer(up_x[n, r] * state["v"][n], state["k"][n, r])
                h = h + share * dt * np.outer(up_x[n, r] * v[n], k[r])
            state["h"][n], state["k"][n], state["v"][n] = h, k, v[n]
            for r in range(rank):
                read = h @ q[r] + parameters["skip"][n] * up_x[n, r] * v[n]
                if "norm" in parameters:
                    read = rms(read, parameters["norm"]["scale"][n * p : (n + 1) * p])
                out[n] += down[n, r] * read * silu(up_z[n, r] * z[n])
        y.append(out.reshape(inner) @ parameters["out"]["kernel"])
    return np.stack(y), state
