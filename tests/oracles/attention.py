"""Attention in float64 numpy, one query and one head at a time, with rotations as complex numbers.

arXiv 1706.03762 (attention), 2104.09864 (RoPE), 2108.12409 (ALiBi), 2305.13245 (GQA), 2010.04245 (norms of queries and
keys), 2505.06708 (output gate). Independent of the library.
`parameters` is the nested dict of arrays of one mixer.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def rotate(x: np.ndarray, position: int, *, base: float, fraction: float) -> np.ndarray:
    """One head's vector with the first `fraction` of its channels turned; channel i pairs with i + n/2."""
    size = int(len(x) * fraction)
    half = size // 2
    pairs = x[:half] + 1j * x[half:size]
    pairs = pairs * np.exp(1j * position * base ** (-2.0 * np.arange(half) / size))
    return np.concatenate([pairs.real, pairs.imag, x[size:]])


def normed(x: np.ndarray, scale: Any, eps: float) -> np.ndarray:
    """An RMSNorm with a zero-centred scale."""
    return x / np.sqrt(np.mean(x**2) + eps) * (1.0 + scale)


def attention(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    *,
    heads: int,
    kv_heads: int,
    window: int | None = None,
    rope: tuple[float, float] | None = None,
    slopes: list[float] | None = None,
    cap: float | None = None,
    causal: bool = True,
    eps: float = 1e-6,
) -> np.ndarray:
    """y [T, D] of one row of documents that begin at the positions `starts`; `rope` is (base, fraction).

    Norms (zero-centred, with `eps`) and a gate apply where `parameters` has them.
    """
    length = x.shape[0]
    split = lambda name, count: (x @ parameters[name]["kernel"]).reshape(length, count, -1)
    q, k, v = split("query", heads), split("key", kv_heads), split("value", kv_heads)
    y = []
    for t in range(length):
        first = max(start for start in starts if start <= t)
        end = t + 1 if causal else min([length, *(start for start in starts if start > t)])
        oldest = first if window is None else max(first, t - window + 1)
        mixed = []
        for head in range(heads):
            group = head * kv_heads // heads
            scores = []
            for s in range(oldest, end):
                query, key = q[t, head], k[s, group]
                if "query_norm" in parameters:
                    query = normed(query, parameters["query_norm"]["scale"], eps)
                    key = normed(key, parameters["key_norm"]["scale"], eps)
                if rope is not None:
                    query, key = (
                        rotate(a, p - first, base=rope[0], fraction=rope[1]) for a, p in ((query, t), (key, s))
                    )
                score = query @ key / np.sqrt(len(query))
                score = score if cap is None else cap * np.tanh(score / cap)
                scores.append(score - (0.0 if slopes is None else slopes[head] * abs(t - s)))
            weights = np.exp(np.array(scores) - max(scores))
            mixed.append(weights @ v[oldest:end, group] / weights.sum())
        out = np.concatenate(mixed)
        if "gate" in parameters:
            out = out / (1.0 + np.exp(-(x[t] @ parameters["gate"]["kernel"])))
        y.append(out @ parameters["out"]["kernel"])
    return np.stack(y)
