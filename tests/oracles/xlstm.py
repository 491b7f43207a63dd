"""mLSTM and sLSTM in float64 numpy, one token and one head at a time (arXiv 2405.04517, 2503.13427).

Memories are kept as the papers stabilise them, under a running maximum m that starts at -inf. Independent of the
library. `parameters` is the nested dict of arrays of one mixer.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def blocks(x: np.ndarray, parameters: dict[str, np.ndarray]) -> np.ndarray:
    """A block-diagonal map."""
    kernel = parameters["kernel"]
    parts = x.reshape(kernel.shape[:2])
    return np.concatenate([part @ block for part, block in zip(parts, kernel, strict=True)])


def head_norm(h: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """A LayerNorm of every head of h [H, V] apart."""
    return np.concatenate([(head - head.mean()) / np.sqrt(head.var() + eps) for head in h]) * scale


def convolve(history: list[np.ndarray], parameters: dict[str, np.ndarray]) -> np.ndarray:
    taps = parameters["kernel"]
    recent = range(min(len(taps), len(history)))
    return parameters["bias"] + sum(taps[len(taps) - 1 - back] * history[-1 - back] for back in recent)


def last_inputs(history: list[np.ndarray], width: int, channels: int) -> np.ndarray:
    return np.stack(([np.zeros(channels)] * (width - 1) + history)[-(width - 1) :])


def mlstm_block(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: dict[str, Any] | None = None,
    *,
    heads: int,
    cap: float | None,
    eps: float,
) -> tuple[np.ndarray, dict[str, Any]]:
    """`(y [T, D], state)` of one row of documents that begin at the positions `starts`, or at 0 go on from `state`."""
    apply = lambda name, u: u @ parameters[name]["kernel"]
    convolved = "conv" in parameters
    history = list(state["conv"]) if state is not None and convolved else []
    cells = list(state["cells"]) if state is not None else []
    y = []
    for t in range(x.shape[0]):
        if convolved:
            if t in starts:
                history = []
            source = apply("up", x[t])
            history.append(source)
            mixed = silu(convolve(history, parameters["conv"]))
            query, key = (blocks(mixed, parameters[name]) for name in ("query", "key"))
            value = blocks(source, parameters["value"])
            gates = apply("gates", np.concatenate([query, key, value]))
        else:
            query, key, value = (apply(name, x[t]) for name in ("query", "key", "value"))
            gates = apply("gates", x[t])
        query, key, value = (a.reshape(heads, -1) for a in (query, key, value))
        if t in starts:
            cells = [(-np.inf, np.zeros(key.shape[1]), np.zeros((value.shape[1], key.shape[1])))] * heads
        h = []
        for n in range(heads):
            log_input = gates[n] + parameters["input_bias"][n]
            forget = gates[heads + n] + parameters["forget_bias"][n]
            if cap is not None:
                log_input, forget = cap * np.tanh(log_input / cap), cap * np.tanh(forget / cap)
            log_max, normaliser, memory = cells[n]
            kept = np.log(sigmoid(forget)) + log_max
            log_max = max(kept, log_input)
            f, i = np.exp(kept - log_max), np.exp(log_input - log_max)
            normaliser = f * normaliser + i * key[n]
            memory = f * memory + i * np.outer(value[n], key[n])
            cells = [*cells[:n], (log_max, normaliser, memory), *cells[n + 1 :]]
            q = query[n] / np.sqrt(len(query[n]))
            h.append(memory @ q / (max(abs(normaliser @ q), np.exp(-log_max)) + 1e-6))
        normed = head_norm(np.stack(h), parameters["norm"]["scale"], eps)
        gate = apply("gate", x[t])
        out = (normed + parameters["skip"] * mixed) * silu(gate) if convolved else normed * sigmoid(gate)
        y.append(apply("out", out))
    after: dict[str, Any] = {"cells": cells}
    if convolved:
        after["conv"] = last_inputs(history, len(parameters["conv"]["kernel"]), len(source))
    return np.stack(y), after


def slstm_block(
    x: np.ndarray, parameters: dict[str, Any], starts: set[int], state: dict[str, Any] | None = None, *, eps: float
) -> tuple[np.ndarray, dict[str, Any]]:
    """As `mlstm_block`. The state's cells are (y, c, n, m) of every head."""
    kernel, recurrent, bias = (parameters[name] for name in ("kernel", "recurrent", "bias"))
    heads, size = kernel.shape[:2]
    history = list(state["conv"]) if state is not None else []
    cells = list(state["cells"]) if state is not None else []
    outputs = []
    for t in range(x.shape[0]):
        if t in starts:
            history = []
            cells = [(np.zeros(size), np.zeros(size), np.zeros(size), np.full(size, -np.inf))] * heads
        history.append(x[t])
        mixed = silu(convolve(history, parameters["conv"])).reshape(heads, size)
        plain = x[t].reshape(heads, size)
        after = []
        for n, (y, c, normaliser, m) in enumerate(cells):
            log_input, forget, z, o = (
                source[n] @ kernel[n, :, gate] + y @ recurrent[n, :, gate] + bias[n, gate]
                for gate, source in enumerate((mixed, mixed, plain, plain))
            )
            log_forget = np.log(sigmoid(forget))
            new_m = np.maximum(log_forget + m, log_input)
            i, f = np.exp(log_input - new_m), np.exp(log_forget + m - new_m)
            c, normaliser = f * c + i * np.tanh(z), f * normaliser + i
            after.append((sigmoid(o) * c / normaliser, c, normaliser, new_m))
        cells = after
        outputs.append(head_norm(np.stack([cell[0] for cell in cells]), parameters["norm"]["scale"], eps))
    conv = last_inputs(history, len(parameters["conv"]["kernel"]), x.shape[1])
    return np.stack(outputs), {"cells": cells, "conv": conv}
