"""The Kimi Delta Attention layer in float64 numpy, one token at a time, from the paper's equations (arXiv 2510.26692).

S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T and o_t = S_t^T q_t. Independent of the library.
`parameters` is the nested dict of arrays of one mixer.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def kda_layer(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: dict[str, np.ndarray] | None = None,
    *,
    heads: int,
    largest_beta: float = 1.0,
    eps: float = 1e-5,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`(y [T, D], state)` of one row of documents that begin at the positions `starts`, or at 0 go on from `state`."""
    taps = parameters["conv"]["kernel"]
    width = taps.shape[0]
    keys, values = len(parameters["dt_bias"]) // heads, parameters["out"]["kernel"].shape[0] // heads
    y, history, s = np.zeros_like(x), [], None
    if state is not None:
        history, s = list(state["conv"]), np.array(state["memory"])
    for t in range(len(x)):
        if t in starts:
            history, s = [], np.zeros((heads, keys, values))
        history.append(x[t] @ parameters["input"]["kernel"])
        mixed = sum(taps[width - 1 - back] * history[-1 - back] for back in range(min(width, len(history))))
        mixed = mixed * sigmoid(mixed)
        q, k = (mixed[n * heads * keys : (n + 1) * heads * keys].reshape(heads, keys) for n in (0, 1))
        v = mixed[2 * heads * keys :].reshape(heads, values)
        beta = largest_beta * sigmoid(x[t] @ parameters["beta"]["kernel"])
        low = x[t] @ parameters["decay_in"]["kernel"] @ parameters["decay_out"]["kernel"]
        step = np.log1p(np.exp(low + parameters["dt_bias"])).reshape(heads, keys)
        alpha = np.exp(-np.exp(parameters["a_log"])[:, None] * step)
        read = []
        for h in range(heads):
            unit_q, unit_k = (a / np.sqrt(a @ a + 1e-6) for a in (q[h], k[h]))
            transition = (np.eye(keys) - beta[h] * np.outer(unit_k, unit_k)) @ np.diag(alpha[h])
            s[h] = transition @ s[h] + beta[h] * np.outer(unit_k, v[h])
            o = s[h].T @ unit_q / np.sqrt(keys)
            read.append(o / np.sqrt(np.mean(o**2) + eps) * parameters["norm"]["scale"])
        gate = (
            x[t] @ parameters["gate_in"]["kernel"] @ parameters["gate_out"]["kernel"] + parameters["gate_out"]["bias"]
        )
        y[t] = (np.concatenate(read) * sigmoid(gate)) @ parameters["out"]["kernel"]
    recent = ([np.zeros(taps.shape[1])] * (width - 1) + history)[-(width - 1) :]
    return y, {"memory": s, "conv": np.stack(recent)}
