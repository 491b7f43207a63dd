"""Linear attention (arXiv 2006.16236), RetNet (2307.08621), gated RFA (2103.02143) and HGRN2 (2404.07904, with the
lower bounds of 2311.04823), layers in float64 numpy, one token at a time, from the papers' equations.

Independent of the library. `parameters` is the nested dict of arrays of one mixer; `starts` are where documents begin,
and at 0 a row without a start goes on from `state`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

State = Any
FEATURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "elu": lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1) + 1,
    "relu": lambda x: x * (x > 0),
    "identity": lambda x: x,
}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def rows(x: np.ndarray, parameters: dict[str, Any], name: str, heads: int) -> np.ndarray:
    """A projection of every token, [T, heads, size]."""
    return (x @ parameters[name]["kernel"]).reshape(len(x), heads, -1)


def linear_attention_layer(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: State = None,
    *,
    heads: int,
    features: str,
    normaliser: bool,
    eps: float,
) -> tuple[np.ndarray, State]:
    q, k, v = (rows(x, parameters, name, heads) for name in ("query", "key", "value"))
    phi, y = FEATURES[features], np.zeros_like(x)
    for t in range(len(x)):
        if t in starts:
            state = (np.zeros((heads, k.shape[2], v.shape[2])), np.zeros((heads, k.shape[2])))
        memory, total = (np.array(part) for part in state)
        read = []
        for h in range(heads):
            memory[h] += np.outer(phi(k[t, h]), v[t, h])
            total[h] += phi(k[t, h])
            o = phi(q[t, h]) @ memory[h]
            if normaliser:
                read.append(o / (phi(q[t, h]) @ total[h] + eps))
            else:
                read.append(o / np.sqrt(np.mean(o**2) + eps) * parameters["norm"]["scale"])
        state = (memory, total)
        y[t] = np.concatenate(read) @ parameters["out"]["kernel"]
    return y, state


def rotate(x: np.ndarray, position: int, base: float) -> np.ndarray:
    """Channels i and i + n/2 are the real and imaginary part of what turns by position * base^(-2 i / n)."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * base ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def retnet_layer(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: State = None,
    *,
    heads: int,
    base: float,
    eps: float,
) -> tuple[np.ndarray, State]:
    """The state is `(memory [heads, key, value], the next token's position in its document)`."""
    q, k, v, g = (rows(x, parameters, name, heads) for name in ("query", "key", "value", "gate"))
    y = np.zeros_like(x)
    for t in range(len(x)):
        if t in starts:
            state = (np.zeros((heads, k.shape[2], v.shape[2])), 0)
        memory, position = np.array(state[0]), state[1]
        read = []
        for h in range(heads):
            gamma = 1.0 - 2.0 ** (-5.0 - h)
            memory[h] = gamma * memory[h] + np.outer(rotate(k[t, h], position, base), v[t, h])
            o = rotate(q[t, h], position, base) @ memory[h] / np.sqrt(k.shape[2])
            read.append((o - o.mean()) / np.sqrt(o.var() + eps))
        normed = np.concatenate(read) * parameters["norm"]["scale"] + parameters["norm"]["bias"]
        state = (memory, position + 1)
        y[t] = (silu(g[t].reshape(-1)) * normed) @ parameters["out"]["kernel"]
    return y, state


def gated_rfa_layer(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: State = None,
    *,
    directions: np.ndarray,
    eps: float,
) -> tuple[np.ndarray, State]:
    """`directions`: the random vectors of unit variance, [heads, features, head size]."""
    heads, count, _ = directions.shape
    q, k, v = (rows(x, parameters, name, heads) for name in ("query", "key", "value"))
    gates = sigmoid(x @ parameters["gate"]["kernel"] + parameters["gate"]["bias"])

    def phi(head: int, z: np.ndarray) -> np.ndarray:
        unit = z / np.sqrt(np.sum(z**2) + 1e-6)
        angles = [np.dot(parameters["sigma"][head] * w, unit) for w in directions[head]]
        return np.concatenate([np.sin(angles), np.cos(angles)]) / np.sqrt(count)

    y = np.zeros_like(x)
    for t in range(len(x)):
        if t in starts:
            state = (np.zeros((heads, 2 * count, v.shape[2])), np.zeros((heads, 2 * count)))
        memory, total = (np.array(part) for part in state)
        read = []
        for h in range(heads):
            g, key, query = gates[t, h], phi(h, k[t, h]), phi(h, q[t, h])
            memory[h] = g * memory[h] + (1 - g) * np.outer(key, v[t, h])
            total[h] = g * total[h] + (1 - g) * key
            read.append(query @ memory[h] / max(query @ total[h], eps))
        state = (memory, total)
        y[t] = np.concatenate(read) @ parameters["out"]["kernel"]
    return y, state


def lower_bounds(gamma: np.ndarray) -> np.ndarray:
    """[layers, channels]: the softmax over layers, summed up to each layer, less the first layer's."""
    p = np.exp(gamma) / np.sum(np.exp(gamma), axis=0)
    return np.stack([np.sum(p[: layer + 1], axis=0) - p[0] for layer in range(len(gamma))])


def hgrn2_layer(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: State = None,
    *,
    head_size: int,
    eps: float,
    bound: np.ndarray | float = 0.0,
) -> tuple[np.ndarray, State]:
    heads = x.shape[1] // head_size
    forget = bound + (1 - bound) * sigmoid(x @ parameters["forget"]["kernel"])
    forget = forget.reshape(len(x), heads, head_size)
    q, v = silu(rows(x, parameters, "query", heads)), rows(x, parameters, "value", heads)
    y = np.zeros_like(x)
    for t in range(len(x)):
        if t in starts:
            state = np.zeros((heads, head_size, head_size))
        state = np.array(state)
        for h in range(heads):
            state[h] = np.diag(forget[t, h]) @ state[h] + np.outer(1 - forget[t, h], v[t, h])
        o = np.concatenate([q[t, h] @ state[h] for h in range(heads)])
        normed = o / np.sqrt(np.mean(o**2) + eps) * parameters["norm"]["scale"]
        y[t] = normed @ parameters["out"]["kernel"]
    return y, state
