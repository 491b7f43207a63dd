"""Classical cells in float64 numpy, one token at a time. Written from the papers and independent of the library.

`parameters` is the nested dict of arrays of one mixer; every function gives `(y [T, D], state)` of one row of documents
that begin at the positions `starts`, or at 0 go on from `state`.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def g(x: np.ndarray) -> np.ndarray:
    """The positive candidate of 2410.01201."""
    return np.array([value + 0.5 if value >= 0 else 1.0 / (1.0 + np.exp(-value)) for value in x])


def affine(parameters: dict[str, Any], name: str, x: np.ndarray) -> np.ndarray:
    layer = parameters[name]
    return x @ layer["kernel"] + layer.get("bias", 0.0)


def mingru(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: np.ndarray | None = None,
    *,
    positive: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """2410.01201, section 3.1."""
    h, y = state, []
    for t, token in enumerate(x):
        if t in starts:
            h = np.zeros(parameters["out"]["kernel"].shape[0])
        z = sigmoid(affine(parameters, "gate", token))
        candidate = affine(parameters, "candidate", token)
        h = (1 - z) * h + z * (g(candidate) if positive else candidate)
        y.append(affine(parameters, "out", h))
    return np.stack(y), h


def minlstm(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: np.ndarray | None = None,
    *,
    positive: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """2410.01201, section 3.2, with the gates normalised to f + i = 1."""
    h, y = state, []
    for t, token in enumerate(x):
        if t in starts:
            h = np.zeros(parameters["out"]["kernel"].shape[0])
        f = sigmoid(affine(parameters, "forget", token) + parameters["forget_bias"])
        i = sigmoid(affine(parameters, "input", token) + parameters["input_bias"])
        candidate = affine(parameters, "candidate", token)
        h = f / (f + i) * h + i / (f + i) * (g(candidate) if positive else candidate)
        y.append(affine(parameters, "out", h))
    return np.stack(y), h


def gated_rnn(
    x: np.ndarray, parameters: dict[str, Any], starts: set[int], state: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """1611.01576: `fo`-pooling, and `ifo`-pooling where there is an input gate."""
    c, y = state, []
    for t, token in enumerate(x):
        if t in starts:
            c = np.zeros(parameters["out"]["kernel"].shape[0])
        f = sigmoid(affine(parameters, "forget", token) + parameters["forget_bias"])
        i = sigmoid(affine(parameters, "input", token)) if "input" in parameters else 1 - f
        c = f * c + i * np.tanh(affine(parameters, "candidate", token))
        y.append(affine(parameters, "out", sigmoid(affine(parameters, "output", token)) * c))
    return np.stack(y), c
