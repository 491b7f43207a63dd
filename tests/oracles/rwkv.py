"""RWKV's time and channel mixes in float64 numpy, one token at a time, from the papers' equations.

RWKV-4: arXiv 2305.13048, equations 11 to 18. RWKV-6: 2404.05892, section 4. RWKV-7: 2503.14456, section 4.
Independent of the library. `parameters` is the nested dict of arrays of one layer; states are dicts of arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def rwkv4_time_mix(
    x: np.ndarray, parameters: dict[str, Any], starts: set[int], state: dict[str, np.ndarray] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The sums as they stand in equation 16, without any stabilisation: `num` and `den` are the true ones."""
    decay, bonus = np.exp(parameters["time_decay"]), parameters["time_first"]
    last, num, den = (None, None, None) if state is None else (state["last"], state["num"], state["den"])
    y = np.zeros_like(x)
    for t in range(len(x)):
        if t in starts:
            last, num, den = np.zeros(x.shape[1]), np.zeros(len(decay)), np.zeros(len(decay))
        mixed = {}
        for name in ("key", "value", "receptance"):
            mu = parameters[f"time_mix_{name}"]
            mixed[name] = (mu * x[t] + (1 - mu) * last) @ parameters[name]["kernel"]
        k, v = mixed["key"], mixed["value"]
        wkv = (num + np.exp(bonus + k) * v) / (den + np.exp(bonus + k))
        num, den = np.exp(-decay) * num + np.exp(k) * v, np.exp(-decay) * den + np.exp(k)
        last = x[t]
        y[t] = (sigmoid(mixed["receptance"]) * wkv) @ parameters["output"]["kernel"]
    return y, {"last": last, "num": num, "den": den}


def channel_mix(
    x: np.ndarray, parameters: dict[str, Any], starts: set[int], state: dict[str, np.ndarray] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Equations 17 and 18 of RWKV-4; RWKV-7's has no receptance."""
    last = None if state is None else state["last"]
    y = np.zeros_like(x)
    for t in range(len(x)):
        if t in starts:
            last = np.zeros(x.shape[1])
        mixed = lambda name, t=t, last=last: (
            parameters[f"time_mix_{name}"] * x[t] + (1 - parameters[f"time_mix_{name}"]) * last
        )
        k = mixed("key") @ parameters["key"]["kernel"]
        y[t] = np.maximum(k, 0.0) ** 2 @ parameters["value"]["kernel"]
        if "receptance" in parameters:
            y[t] *= sigmoid(mixed("receptance") @ parameters["receptance"]["kernel"])
        last = x[t]
    return y, {"last": last}
