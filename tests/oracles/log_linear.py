"""Log-linear Mamba-2 in float64 numpy, one token at a time, from the paper's equations (arXiv 2506.04761).

o_t = sum over the buckets l of the Fenwick tree of lambda_t^(l) q_t^T S_t^(l), the prefix [0, t) of a document being
cut greedily from its end into the largest aligned blocks (section 3.1). States are sums over all tokens of a bucket
anew for every token, from a history that is kept whole. Independent of the library. `parameters` is the nested dict of
arrays of one mixer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Token = tuple[np.ndarray, np.ndarray, np.ndarray]  # keys [G, K], values [H, V], log decays [H]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def buckets(t: int) -> list[tuple[int, range]]:
    """The levels from 1 on that position t has, and what they hold."""
    found = []
    while t > 0:
        lowest = t & -t
        found.append((lowest.bit_length(), range(t - lowest, t)))
        t -= lowest
    return found


def bucket_state(history: list[Token], bucket: range, head: int, share: int) -> np.ndarray:
    """S [V, K] of one head: its bucket's tokens, decayed by all that came after them."""
    total = np.zeros((history[0][1].shape[1], history[0][0].shape[1]))
    for s in bucket:
        decay = np.exp(sum(later[2][head] for later in history[s + 1 :]))
        total += decay * np.outer(history[s][1][head], history[s][0][head // share])
    return total


def log_linear_mamba2_block(
    u: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: dict[str, Any] | None = None,
    *,
    head_size: int,
    state_size: int,
    groups: int = 1,
) -> tuple[np.ndarray, dict[str, Any]]:
    """`(y [T, D], state)` of one row of documents that begin at the positions `starts`, or at 0 go on from `state`."""
    inner = parameters["out"]["kernel"].shape[0]
    heads, shared = inner // head_size, groups * state_size
    levels = parameters["level"].shape[1]
    taps = parameters["conv"]["kernel"]
    width = taps.shape[0]
    cuts = np.cumsum([inner, inner + 2 * shared, heads])
    y, recent, history = np.zeros_like(u), [], []
    if state is not None:
        recent, history = list(state["conv"]), list(state["history"])
    for t in range(len(u)):
        if t in starts:
            recent, history = [], []
        z, mixed, dt, dl = np.split(u[t] @ parameters["input"]["kernel"], cuts)
        recent.append(mixed)
        mixed = parameters["conv"]["bias"] + sum(
            taps[width - 1 - back] * recent[-1 - back] for back in range(min(width, len(recent)))
        )
        mixed = mixed * sigmoid(mixed)
        x, b, c = np.split(mixed, [inner, inner + shared])
        x, b, c = x.reshape(heads, head_size), b.reshape(groups, state_size), c.reshape(groups, state_size)
        dt = softplus(dt + parameters["dt_bias"])
        scale = softplus(parameters["level"] * dl.reshape(heads, levels))
        history.append((b, dt[:, None] * x, -np.exp(parameters["a_log"]) * dt))
        position = len(history) - 1
        out = np.zeros((heads, head_size))
        for h in range(heads):
            for level, bucket in [(0, range(position, position + 1)), *buckets(position)]:
                s = bucket_state(history, bucket, h, heads // groups)
                out[h] += scale[h, level] * s @ c[h * groups // heads]
        out = (out + parameters["skip"][:, None] * x).reshape(-1) * z * sigmoid(z)
        parts = out.reshape(groups, -1)
        out = (parts / np.sqrt(np.mean(parts**2, axis=1, keepdims=True) + 1e-5)).reshape(-1)
        y[t] = (out * parameters["norm"]["scale"]) @ parameters["out"]["kernel"]
    memory = np.zeros((heads, levels - 1, head_size, state_size))
    for level, bucket in buckets(len(history)):
        for h in range(heads):
            memory[h, level - 1] = bucket_state(history, bucket, h, heads // groups)
    recent = ([np.zeros(taps.shape[1])] * (width - 1) + recent)[-(width - 1) :]
    return y, {"memory": memory, "conv": np.stack(recent), "history": history}
