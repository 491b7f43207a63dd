"""Griffin's recurrent block in float64 numpy, one token at a time (arXiv 2402.19427, equations 1 to 4 and figure 2).

Written from the paper and independent of the library. `parameters` is the nested dict of arrays of one mixer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def gate(u: np.ndarray, parameters: dict[str, np.ndarray]) -> np.ndarray:
    """A sigmoid of a block-diagonal map."""
    kernel = parameters["kernel"]
    blocks, size = kernel.shape[:2]
    out = np.concatenate([u[n * size : (n + 1) * size] @ kernel[n] for n in range(blocks)])
    return sigmoid(out + parameters["bias"])


def rg_lru_block(
    x: np.ndarray, parameters: dict[str, Any], starts: set[int], state: dict[str, np.ndarray] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`(y [T, D], state)` of one row of documents that begin at the positions `starts`, or at 0 go on from `state`."""
    taps, conv_bias = parameters["conv"]["kernel"], parameters["conv"]["bias"]
    width = taps.shape[0]
    y, history, h, begun = [], [], None, state is not None
    if state is not None:
        history, h = list(state["conv"]), state["hidden"]
    for t in range(x.shape[0]):
        if t in starts:
            history, h, begun = [], np.zeros(taps.shape[1]), False
        history.append(x[t] @ parameters["input"]["kernel"])
        u = conv_bias.copy()
        for back in range(min(width, len(history))):
            u = u + taps[width - 1 - back] * history[-1 - back]
        r, i = gate(u, parameters["recurrence_gate"]), gate(u, parameters["input_gate"])
        a = sigmoid(-parameters["decay"]) ** (8.0 * r)
        h = a * h + (np.sqrt(1.0 - a * a) if begun else 1.0) * (i * u)
        begun = True
        y.append((h * gelu(x[t] @ parameters["gate"]["kernel"])) @ parameters["out"]["kernel"])
    recent = ([np.zeros(taps.shape[1])] * (width - 1) + history)[-(width - 1) :]
    return np.stack(y), {"hidden": h, "conv": np.stack(recent)}
