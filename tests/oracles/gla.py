"""The GLA layer in float64 numpy, one token at a time, from the paper's equations (arXiv 2312.06635, section 4).

With taps in `conv`, q, k and v are the SiLU of a causal convolution over their last values (as later models have it).
Independent of the library. `parameters` is the nested dict of arrays of one mixer.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def gla_layer(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: dict[str, Any] | None = None,
    *,
    heads: int,
    temperature: float = 16.0,
    eps: float = 1e-5,
) -> tuple[np.ndarray, dict[str, Any]]:
    """`(y [T, D], state)` of a row of documents that begin at `starts`, or at 0 go on from `state`.

    The state: `memory`, S [heads, key, value], and `conv`, all inputs of the convolution.
    """
    matrix = lambda name: parameters[name]["kernel"]
    keys, values = matrix("query").shape[1] // heads, matrix("value").shape[1] // heads
    s, history = (None, []) if state is None else (np.array(state["memory"]), list(state["conv"]))
    taps = parameters["conv"]["kernel"] if "conv" in parameters else None
    y = np.zeros_like(x)
    for t in range(len(x)):
        if t in starts:
            s, history = np.zeros((heads, keys, values)), []
        forget = sigmoid(x[t] @ matrix("decay_in") @ matrix("decay_out") + parameters["decay_out"]["bias"])
        alpha = (forget ** (1.0 / temperature)).reshape(heads, keys)
        gate = x[t] @ matrix("gate")
        q, k = (x[t] @ matrix(name) for name in ("query", "key"))
        v = x[t] @ matrix("value")
        history.append(np.concatenate([q, k, v]))
        if taps is not None:
            mixed = sum(taps[len(taps) - 1 - back] * history[-1 - back] for back in range(min(len(taps), len(history))))
            q, k, v = np.split(mixed * sigmoid(mixed), (len(q), 2 * len(q)))
        read = []
        for h in range(heads):
            of_keys, of_values = slice(h * keys, (h + 1) * keys), slice(h * values, (h + 1) * values)
            for i in range(keys):
                s[h, i] = alpha[h, i] * s[h, i] + k[of_keys][i] * v[of_values]
            o = (q[of_keys] / np.sqrt(keys)) @ s[h]
            read.append(o / np.sqrt(np.mean(o**2) + eps) * parameters["norm"]["scale"])
        y[t] = (np.concatenate(read) * gate * sigmoid(gate)) @ matrix("out")
    return y, {"memory": s, "conv": history}
