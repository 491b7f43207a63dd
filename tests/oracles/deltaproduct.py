"""The DeltaProduct layer in float64 numpy, one token at a time, from the paper's equations (arXiv 2502.10297).

H_t = A_t H_{t-1} + B_t with A_t = prod_{j=n..1} (I - beta_j k_j k_j^T) and
B_t = sum_j (prod_{l=n..j+1} (I - beta_l k_l k_l^T)) beta_j k_j v_j^T; gated, A_t is multiplied by g_t. Independent of
the library. `parameters` is the nested dict of arrays of one mixer, whose input holds q, then k_1..k_n, then v_1..v_n.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def product(matrices: list[np.ndarray], size: int) -> np.ndarray:
    """The last matrix on the left."""
    return functools.reduce(lambda so_far, matrix: matrix @ so_far, matrices, np.eye(size))


def deltaproduct_layer(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: dict[str, np.ndarray] | None = None,
    *,
    heads: int,
    keys: int,
    steps: int,
    largest_beta: float = 2.0,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`(y [T, D], state)` of one row of documents that begin at the positions `starts`, or at 0 go on from `state`."""
    taps = parameters["conv"]["kernel"]
    width = taps.shape[0]
    values = parameters["out"]["kernel"].shape[0] // heads
    y, history, memory = np.zeros_like(x), [], None
    if state is not None:
        history, memory = list(state["conv"]), np.array(state["memory"])
    for t in range(len(x)):
        if t in starts:
            history, memory = [], np.zeros((heads, keys, values))
        history.append(x[t] @ parameters["input"]["kernel"])
        mixed = sum(taps[width - 1 - back] * history[-1 - back] for back in range(min(width, len(history))))
        mixed = mixed * sigmoid(mixed)
        query, rest = mixed[: heads * keys].reshape(heads, keys), mixed[heads * keys :]
        key = rest[: steps * heads * keys].reshape(steps, heads, keys)
        value = rest[steps * heads * keys :].reshape(steps, heads, values)
        beta = largest_beta * sigmoid(x[t] @ parameters["beta"]["kernel"]).reshape(steps, heads)
        gate = np.ones(heads)
        if "a_log" in parameters:
            softplus = np.log1p(np.exp(x[t] @ parameters["step"]["kernel"] + parameters["dt_bias"]))
            gate = np.exp(-np.exp(parameters["a_log"]) * softplus)
        read = []
        for h in range(heads):
            unit = [k / np.sqrt(k @ k + 1e-6) for k in key[:, h]]
            householders = [np.eye(keys) - b * np.outer(k, k) for b, k in zip(beta[:, h], unit, strict=True)]
            drive = sum(
                product(householders[j + 1 :], keys) @ np.outer(unit[j], beta[j, h] * value[j, h]) for j in range(steps)
            )
            memory[h] = gate[h] * product(householders, keys) @ memory[h] + drive
            q = query[h] / np.sqrt(query[h] @ query[h] + 1e-6)
            o = q @ memory[h] / np.sqrt(keys)
            read.append(o / np.sqrt(np.mean(o**2) + 1e-5) * parameters["norm"]["scale"])
        out = np.concatenate(read)
        if "gate" in parameters:
            z = x[t] @ parameters["gate"]["kernel"]
            out = out * z * sigmoid(z)
        y[t] = out @ parameters["out"]["kernel"]
    recent = ([np.zeros(taps.shape[1])] * (width - 1) + history)[-(width - 1) :]
    return y, {"memory": memory, "conv": np.stack(recent)}
