"""A mixture of experts in float64 numpy, one token and one expert at a time, and its losses from their formulas.

arXiv 2101.03961 (balance, equation 4), 2202.08906 (router z), 2401.04088 (top k). Independent of the library.
`p` is the nested dict of arrays of the layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


ACTIVATIONS = {
    "silu": lambda x: x * sigmoid(x),
    "relu_squared": lambda x: np.maximum(x, 0.0) ** 2,
    "gelu": lambda x: 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))),
}


def mixture_of_experts(
    x: np.ndarray, p: dict[str, Any], valid: np.ndarray, config: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    """`(y, losses)`, one token and one expert at a time; `config` has the fields of the library's."""
    act = ACTIVATIONS[config.activation]

    def mlp(token: np.ndarray, up: Any, gate: Any, down: Any) -> np.ndarray:
        hidden = act(token @ up) if gate is None else act(token @ gate) * (token @ up)
        return hidden @ down

    y = np.zeros_like(x)
    counts, mass, squares = np.zeros(config.experts), np.zeros(config.experts), 0.0
    for row, t in np.argwhere(valid):
        token = x[row, t]
        scores = token @ p["router"]["kernel"]
        probability = np.exp(scores) / np.exp(scores).sum()
        best = np.argsort(-probability)[: config.top_k]
        total = probability[best].sum() if config.renormalise else 1.0
        for e in best:
            gate = p["gate"][e] if "gate" in p else None
            y[row, t] += probability[e] / total * mlp(token, p["up"][e], gate, p["down"][e])
        if "shared" in p:
            gate = p["shared"]["gate"]["kernel"] if "gate" in p["shared"] else None
            out = mlp(token, p["shared"]["up"]["kernel"], gate, p["shared"]["down"]["kernel"])
            y[row, t] += out * (sigmoid(token @ p["shared_gate"]["kernel"]) if "shared_gate" in p else 1.0)
        counts[best] += 1
        mass += probability
        squares += np.log(np.exp(scores).sum()) ** 2
    n = valid.sum()
    balance = config.balance * config.experts * np.sum(counts / n * mass / n)
    return y, {"balance": balance, "router_z": config.router_z * squares / n}
