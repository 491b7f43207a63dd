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
        y[t] = (sigmoid(mixed["receptance"]) * wkv) @ parameters["out"]["kernel"]
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


def group_norm(y: np.ndarray, parameters: dict[str, np.ndarray], eps: float) -> np.ndarray:
    """Of `[heads, size]`, each head on its own; scale and bias by channel."""
    centred = y - y.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + eps)
    return normed.reshape(-1) * parameters["scale"] + parameters["bias"]


def rwkv6_time_mix(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: dict[str, np.ndarray] | None = None,
    *,
    size: int,
    eps: float = 64e-5,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Equations 11 to 16 and 18 to 20; `memory` is [heads, key, value]."""
    heads = x.shape[1] // size
    matrix = lambda name: parameters[name]["kernel"]
    down = np.split(parameters["mix_down"], 5, axis=1)
    last, s = (None, None) if state is None else (state["last"], state["memory"].copy())
    y = np.zeros_like(x)
    for t in range(len(x)):
        if t in starts:
            last, s = np.zeros(x.shape[1]), np.zeros((heads, size, size))
        back = last - x[t]
        base = x[t] + back * parameters["mix_base"]
        w, k, v, r, g = (
            x[t] + back * (parameters["mix"][i] + np.tanh(base @ down[i]) @ parameters["mix_up"][i]) for i in range(5)
        )
        low = parameters["decay"]
        decay = np.exp(-np.exp(low["base"] + np.tanh(w @ low["down"]) @ low["up"])).reshape(heads, size)
        split = lambda a: a.reshape(heads, size)
        k, v, r = split(k @ matrix("key")), split(v @ matrix("value")), split(r @ matrix("receptance"))
        read = np.zeros((heads, size))
        for h in range(heads):
            written = np.outer(k[h], v[h])
            read[h] = r[h] @ (s[h] + parameters["bonus"][h][:, None] * written)
            s[h] = decay[h][:, None] * s[h] + written
        g = g @ matrix("gate")
        y[t] = (group_norm(read, parameters["norm"], eps) * g * sigmoid(g)) @ matrix("out")
        last = x[t]
    return y, {"last": last, "memory": s}


def rwkv7_time_mix(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: dict[str, np.ndarray] | None = None,
    *,
    size: int,
    first: np.ndarray | None = None,
    eps: float = 64e-5,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Equations 3 to 22 of section 4.1; `first` [T, D] are the first layer's values, None in the first layer.

    The state holds S as the paper has it, [heads, value, key], and this call's own `values` before they are mixed.
    """
    heads = x.shape[1] // size
    matrix = lambda name: parameters[name]["kernel"]
    low = lambda name, a, f=lambda z: z: f(a @ parameters[name]["down"]) @ parameters[name]["up"]
    last, s = (None, None) if state is None else (state["last"], state["memory"].copy())
    y, values = np.zeros_like(x), np.zeros_like(x)
    for t in range(len(x)):
        if t in starts:
            last, s = np.zeros(x.shape[1]), np.zeros((heads, size, size))
        shifted = {name: x[t] + (last - x[t]) * mu for name, mu in parameters["mix"].items()}
        d = parameters["decay"]["base"] + low("decay", shifted["decay"], np.tanh)
        w = np.exp(-np.exp(-0.5) * sigmoid(d))
        a = sigmoid(parameters["rate"]["base"] + low("rate", shifted["rate"]))
        g = low("gate", shifted["gate"], sigmoid)
        r, k = shifted["receptance"] @ matrix("receptance"), shifted["key"] @ matrix("key")
        v = values[t] = shifted["value"] @ matrix("value")
        if first is not None:
            v = v + (first[t] - v) * sigmoid(parameters["first"]["base"] + low("first", shifted["value"]))
        removal = k * parameters["removal"].reshape(-1)
        k = k * (1 + (a - 1) * parameters["replacement"].reshape(-1))
        read, now = np.zeros((heads, size)), np.zeros((heads, size))
        for h in range(heads):
            of = slice(h * size, (h + 1) * size)
            kappa = removal[of] / np.linalg.norm(removal[of])
            s[h] = s[h] @ (np.diag(w[of]) - np.outer(kappa, a[of] * kappa)) + np.outer(v[of], k[of])
            read[h] = s[h] @ r[of]
            now[h] = np.sum(r[of] * parameters["bonus"][h] * k[of]) * v[of]
        y[t] = ((group_norm(read, parameters["norm"], eps) + now.reshape(-1)) * g) @ matrix("out")
        last = x[t]
    return y, {"last": last, "memory": s, "values": values}
