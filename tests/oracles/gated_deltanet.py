"""The gated DeltaNet layer in float64 numpy, one token at a time, from the paper's equations (arXiv 2412.06464).

S_t = S_{t-1} (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T with S of [value size, key size], as the paper writes
it; the library keeps the transpose. Without `a_log` alpha is 1, without a gate the norm alone remains: DeltaNet
(arXiv 2406.06484). With fewer `key_heads` than heads, neighbouring heads share queries and keys (Qwen3-Next).
Independent of the library. `parameters` is the nested dict of arrays of one mixer.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def gated_deltanet_layer(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: dict[str, np.ndarray] | None = None,
    *,
    heads: int,
    keys: int,
    key_heads: int | None = None,
    largest_beta: float = 1.0,
    eps: float = 1e-5,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`(y [T, D], state)` of one row of documents that begin at the positions `starts`, or at 0 go on from `state`.

    `keys` is the key size of a head; `largest_beta` 2 lets eigenvalues reach -1.
    """
    taps = parameters["conv"]["kernel"]
    width = taps.shape[0]
    groups = key_heads or heads
    values = parameters["out"]["kernel"].shape[0] // heads
    y, history, s = np.zeros_like(x), [], None
    if state is not None:
        history, s = list(state["conv"]), np.array(state["memory"])
    for t in range(len(x)):
        if t in starts:
            history, s = [], np.zeros((heads, values, keys))
        history.append(x[t] @ parameters["input"]["kernel"])
        mixed = sum(taps[width - 1 - back] * history[-1 - back] for back in range(min(width, len(history))))
        mixed = mixed * sigmoid(mixed)
        q, k = (mixed[n * groups * keys : (n + 1) * groups * keys].reshape(groups, keys) for n in (0, 1))
        v = mixed[2 * groups * keys :].reshape(heads, values)
        beta = largest_beta * sigmoid(x[t] @ parameters["beta"]["kernel"])
        alpha = np.ones(heads)
        if "a_log" in parameters:
            step = np.log1p(np.exp(x[t] @ parameters["step"]["kernel"] + parameters["dt_bias"]))
            alpha = np.exp(-np.exp(parameters["a_log"]) * step)
        read = []
        for h in range(heads):
            own = h * groups // heads
            unit_q, unit_k = (a / np.sqrt(a @ a + 1e-6) for a in (q[own], k[own]))
            transition = alpha[h] * (np.eye(keys) - beta[h] * np.outer(unit_k, unit_k))
            s[h] = s[h] @ transition + beta[h] * np.outer(v[h], unit_k)
            o = s[h] @ unit_q / np.sqrt(keys)
            read.append(o / np.sqrt(np.mean(o**2) + eps) * parameters["norm"]["scale"])
        out = np.concatenate(read)
        if "gate" in parameters:
            gate = x[t] @ parameters["gate"]["kernel"]
            out = out * gate * sigmoid(gate)
        y[t] = out @ parameters["out"]["kernel"]
    recent = ([np.zeros(taps.shape[1])] * (width - 1) + history)[-(width - 1) :]
    return y, {"memory": s, "conv": np.stack(recent)}
