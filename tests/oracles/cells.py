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


def split_heads(x: np.ndarray, kernel: np.ndarray, head: int, gate: int) -> np.ndarray:
    """W_a x of one head and gate, W of [D, H, gates, V]."""
    return x @ kernel[:, head, gate]


def lstm(
    x: np.ndarray, parameters: dict[str, Any], starts: set[int], state: list[Any] | None = None
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Gers et al. (2000) without peepholes; gates in the order i, f, z, o. The state is (h, c) of every head."""
    recurrent, bias = parameters["recurrent"], parameters["bias"]
    heads, size = recurrent.shape[:2]
    cells, y = state, []
    for t, token in enumerate(x):
        if t in starts:
            cells = [(np.zeros(size), np.zeros(size))] * heads
        after = []
        for n, (h, c) in enumerate(cells):
            i, f, z, o = (
                split_heads(token, parameters["kernel"], n, gate) + h @ recurrent[n, :, gate] + bias[n, gate]
                for gate in range(4)
            )
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(z)
            after.append((sigmoid(o) * np.tanh(c), c))
        cells = after
        y.append(np.concatenate([h for h, _ in cells]))
    return np.stack(y), cells


def gru(
    x: np.ndarray, parameters: dict[str, Any], starts: set[int], state: list[np.ndarray] | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """1406.1078 with the reset gate behind the product; gates in the order r, z, n. The state is h of every head."""
    recurrent, bias, new_bias = (parameters[name] for name in ("recurrent", "bias", "new_bias"))
    heads, size = recurrent.shape[:2]
    hidden, y = state, []
    for t, token in enumerate(x):
        if t in starts:
            hidden = [np.zeros(size)] * heads
        after = []
        for n, h in enumerate(hidden):
            drive = [split_heads(token, parameters["kernel"], n, gate) + bias[n, gate] for gate in range(3)]
            r = sigmoid(drive[0] + h @ recurrent[n, :, 0])
            z = sigmoid(drive[1] + h @ recurrent[n, :, 1])
            candidate = np.tanh(drive[2] + r * (h @ recurrent[n, :, 2] + new_bias[n]))
            after.append((1 - z) * candidate + z * h)
        hidden = after
        y.append(np.concatenate(hidden))
    return np.stack(y), hidden
