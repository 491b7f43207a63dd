"""S4D, S4, S5 and LRU in float64 numpy, one token at a time, with discretisations from their definitions.

Written from arXiv 2111.00396 (S4), 2206.11893 (S4D), 2208.04933 (S5) and 2303.06349 (LRU), independent of the library.
`parameters` is the nested dict of arrays of one mixer. Every function returns `(y [T, D], state)` of one row of
documents that begin at the positions `starts`, or at 0 go on from `state`. Where the library keeps one of each pair of
conjugate eigenvalues, these keep both, and states of full size.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def matrix_exponential(a: np.ndarray) -> np.ndarray:
    """exp(a) by scaling and squaring of its Taylor series."""
    doublings = max(0, math.ceil(math.log2(max(np.abs(a).sum(axis=1).max(), 1e-300)))) + 4
    term = total = np.eye(len(a), dtype=a.dtype)
    for k in range(1, 20):
        term = term @ a / (k * 2.0**doublings)
        total = total + term
    for _ in range(doublings):
        total = total @ total
    return total


def zoh(a: np.ndarray, b: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """exp(dt A) and the integral of exp(s A) B over the step, as one exponential of an augmented matrix."""
    n = len(a)
    block = np.zeros((n + b.shape[1], n + b.shape[1]), complex)
    block[:n, :n], block[:n, n:] = a * step, b * step
    exponential = matrix_exponential(block)
    return exponential[:n, :n], exponential[:n, n:]


def bilinear(a: np.ndarray, b: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    eye = np.eye(len(a))
    return np.linalg.solve(eye - step / 2 * a, eye + step / 2 * a), np.linalg.solve(eye - step / 2 * a, step * b)


DISCRETIZE = {"zoh": zoh, "bilinear": bilinear}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def output(y: np.ndarray, parameters: dict[str, Any], kind: str) -> np.ndarray:
    """GELU, and the gate that follows it."""
    g = gelu(y)
    if kind == "gelu":
        return g
    mapped = g @ parameters["out"]["map"]["kernel"] + parameters["out"]["map"]["bias"]
    if kind == "full_glu":
        size = y.shape[-1]
        return mapped[..., :size] * sigmoid(mapped[..., size:])
    return {"half_glu1": g, "half_glu2": y}[kind] * sigmoid(mapped)


def both(half: np.ndarray) -> np.ndarray:
    """Conjugate pairs from one of each, along the last axis."""
    return np.concatenate([half, np.conj(half)], axis=-1)


def run(
    x: np.ndarray,
    starts: set[int],
    state: np.ndarray | None,
    transitions: list[tuple[np.ndarray, np.ndarray]],
    outward: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """h = A h + B x, y = C h for inputs [T, I]; `transitions` holds (A, B) of every step."""
    h = np.zeros(len(transitions[0][0]), complex) if state is None else state
    y = []
    for t, (a, b) in enumerate(transitions):
        if t in starts:
            h = np.zeros_like(h)
        h = a @ h + b @ x[t]
        y.append(outward @ h)
    return np.stack(y), h


def channels(
    x: np.ndarray,
    starts: set[int],
    state: np.ndarray | None,
    systems: list[tuple[np.ndarray, np.ndarray]],
    outward: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """A system `(A, B)` and a row of C for every channel: y [T, D] and states [D, N]."""
    rows = []
    for d, system in enumerate(systems):
        given = None if state is None else state[d]
        rows.append(run(x[:, d : d + 1], starts, given, [system] * len(x), outward[None, d]))
    return np.concatenate([y for y, _ in rows], axis=1), np.stack([h for _, h in rows])


def s4d_layer(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: np.ndarray | None = None,
    *,
    method: str = "zoh",
    kind: str = "full_glu",
) -> tuple[np.ndarray, np.ndarray]:
    eigenvalues = both(-np.exp(parameters["decay_log"]) + 1j * parameters["frequency"])
    outward = both(parameters["outward_real"] + 1j * parameters["outward_imaginary"])
    ones = np.ones((eigenvalues.shape[1], 1))
    steps = np.exp(parameters["step_log"])
    systems = [DISCRETIZE[method](np.diag(a), ones, step) for a, step in zip(eigenvalues, steps, strict=True)]
    y, state = channels(x, starts, state, systems, outward)
    assert np.abs(y.imag).max() < 1e-12 * max(1, np.abs(y).max())
    return output(y.real + parameters["skip"] * x, parameters, kind), state


def s4_layer(
    x: np.ndarray, parameters: dict[str, Any], starts: set[int], state: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The dense transition of every channel, from its definition: nothing of Woodbury or of generating functions."""
    pairs = lambda name: both(parameters[f"{name}_real"] + 1j * parameters[f"{name}_imaginary"])
    eigenvalues = both(-np.exp(parameters["decay_log"]) + 1j * parameters["frequency"])
    low_rank, inward, outward = pairs("low_rank"), pairs("inward"), pairs("outward")
    systems = []
    for d, step in enumerate(np.exp(parameters["step_log"])):
        copy = d * len(eigenvalues) // x.shape[1]
        a = np.diag(eigenvalues[copy]) - np.outer(low_rank[copy], low_rank[copy].conj())
        systems.append(bilinear(a, inward[copy][:, None], step))
    y, state = channels(x, starts, state, systems, outward)
    assert np.abs(y.imag).max() < 1e-12 * max(1, np.abs(y).max())
    return output(y.real + parameters["skip"] * x, parameters, "full_glu"), state


def s5_layer(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: np.ndarray | None = None,
    *,
    method: str = "zoh",
    kind: str = "half_glu1",
    gaps: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    eigenvalues = both(np.minimum(parameters["decay"], -1e-4) + 1j * parameters["frequency"])
    inward = both(parameters["inward"]["real"] + 1j * parameters["inward"]["imaginary"]).T
    outward = both((parameters["outward"]["real"] + 1j * parameters["outward"]["imaginary"]).T)
    # Every state has a time scale of its own: x' = A x + B u with A and B scaled by it, and steps of the gaps.
    scale = np.tile(np.exp(parameters["step_log"]), 2)
    system = np.diag(eigenvalues * scale), inward * scale[:, None]
    gaps = np.ones(len(x)) if gaps is None else gaps
    y, state = run(x, starts, state, [DISCRETIZE[method](*system, gap) for gap in gaps], outward)
    assert np.abs(y.imag).max() < 1e-12 * max(1, np.abs(y).max())
    return output(y.real + parameters["skip"] * x, parameters, kind), state


def lru_layer(
    x: np.ndarray,
    parameters: dict[str, Any],
    starts: set[int],
    state: np.ndarray | None = None,
    *,
    kind: str = "full_glu",
) -> tuple[np.ndarray, np.ndarray]:
    radius, phase = np.exp(-np.exp(parameters["nu_log"])), np.exp(parameters["theta_log"])
    transition = np.diag(radius * (np.cos(phase) + 1j * np.sin(phase)))
    inward = (parameters["inward"]["real"] + 1j * parameters["inward"]["imaginary"]).T
    inward = np.exp(parameters["gamma_log"])[:, None] * inward
    outward = (parameters["outward"]["real"] + 1j * parameters["outward"]["imaginary"]).T
    y, state = run(x, starts, state, [(transition, inward)] * len(x), outward)
    return output(y.real + parameters["skip"] * x, parameters, kind), state


def hippo_legs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """From the definition of HiPPO-LegS as the projection of the past on Legendre polynomials (arXiv 2008.07669).

    c_n(t) = sqrt(2n+1) / t times the integral over s in [0, t] of f(s) P_n(2 s/t - 1) has c' = (A c + B f) / t, where
    A_nk follows from d/dt P_n(2 s/t - 1) = -(2 s/t^2) P_n'(2 s/t - 1), expanded in P_k by exact quadrature.
    """
    nodes, weights = np.polynomial.legendre.leggauss(size + 1)
    a = np.zeros((size, size))
    polynomial = [np.polynomial.Legendre.basis(n) for n in range(size)]
    for n in range(size):
        # d/dt of (1/t) P_n(z) with z = 2 s/t - 1 is -(1/t^2) (P_n(z) + (z + 1) P_n'(z))
        change = -(polynomial[n](nodes) + (nodes + 1) * polynomial[n].deriv()(nodes))
        for k in range(size):
            coefficient = (2 * k + 1) / 2 * np.sum(weights * change * polynomial[k](nodes))
            a[n, k] = np.sqrt((2 * n + 1) / (2 * k + 1)) * coefficient
    return a, np.array([np.sqrt(2 * n + 1) * polynomial[n](1.0) for n in range(size)])
