"""The DeltaNet layer in float64 numpy, from the paper's equations (arXiv 2406.06484, section 2 and figure 1).

    q, k, v = SiLU(conv(W x)), q and k of length 1,  beta = sigmoid(w x)
    S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T,  o_t = S_t^T q_t / sqrt(key size)

and then a norm for each head and the output's matrix. Independent of the library. `parameters` is the nested dict of
arrays of one mixer.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def deltanet_layer(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: dict[str, np.ndarray] | None = None,
    *,
    heads: int,
    keys: int,
    largest_beta: float = 1.0,
    eps: float = 1e-5,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`(y [T, D], state)` of one row of documents that begin at the positions `starts`, or at 0 go on from `state`.

    `keys` is the key size of a head, memories are [key size, value size]; `largest_beta` 2 lets eigenvalues reach -1.
    """
    taps = parameters["conv"]["kernel"]  # [width, channels], the newest last
    width, channels = taps.shape
    before = np.zeros((width - 1, channels)) if state is None else state["conv"]
    memory = None if state is None else np.array(state["memory"])
    projected = x @ parameters["input"]["kernel"]
    logits = x @ parameters["beta"]["kernel"]
    rows = []
    for t, new in enumerate(projected):
        if t in starts:
            before = np.zeros((width - 1, channels))
            memory = np.zeros((heads, keys, channels // heads - 2 * keys))
        window = np.concatenate([before, new[None]])
        before = window[1:]
        u = np.einsum("wc,wc->c", window, taps)
        q, k, v = np.split(u / (1 + np.exp(-u)), [heads * keys, 2 * heads * keys])
        outputs = []
        for h, logit in enumerate(logits[t]):
            of_head = lambda a, h=h: a.reshape(heads, -1)[h]
            query, key = (a / np.sqrt(np.sum(a**2) + 1e-6) for a in (of_head(q), of_head(k)))
            missed = of_head(v) - key @ memory[h]
            memory[h] += np.outer(key, largest_beta / (1 + np.exp(-logit)) * missed)
            o = query @ memory[h] * keys**-0.5
            outputs.append(o * (np.mean(o**2) + eps) ** -0.5 * parameters["norm"]["scale"])
        rows.append(np.concatenate(outputs) @ parameters["out"]["kernel"])
    return np.stack(rows), {"memory": memory, "conv": before}
