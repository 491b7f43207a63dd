"""State spaces of S4: one per channel, diagonal minus low rank, under the bilinear rule (arXiv 2111.00396).

States keep one number of each conjugate pair, so that every map here is real-linear: over all pairs a product of a row
r and a state h is 2 Re(sum r h).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from seqmodels.operators.convolution import CONVOLUTION, convolve_documents
from seqmodels.operators.family import check_method, run_family
from seqmodels.operators.state_space import convolution_or_loop
from seqmodels.scan import Recurrence
from seqmodels.typing import Segments

SHRINK = 2.0
"""Transfer functions are taken on a circle of radius r with r^T = exp(-SHRINK): on the unit circle a slow state is a
pole next to it. What is lost is a factor exp(SHRINK) in the rounding of the last outputs."""


class DPLR(NamedTuple):
    """x' = (diag(eigenvalues) - p p^*) x + b u, y = Re(c x) summed over pairs, in steps of 2 `half_step`.

    `eigenvalues`, `low_rank` (p), `inward` (b) and `outward` (c) are `[D, N]`, `half_step` `[D, 1]`.
    """

    eigenvalues: Complex[Array, "D N"]
    low_rank: Complex[Array, "D N"]
    inward: Complex[Array, "D N"]
    outward: Complex[Array, "D N"]
    half_step: Float[Array, "D 1"]


class Discrete(NamedTuple):
    """One step: h' = diagonal h + column (row h) + drive u, all `[D, N]`; row h is 2 Re(sum row h) of each channel.

    With s half a step, (I + s A) / (I - s A) = 2 / (I - s A) - I, so that Woodbury's identity leaves diagonal plus rank
    one.
    """

    diagonal: Complex[Array, "D N"]
    column: Complex[Array, "D N"]
    row: Complex[Array, "D N"]
    drive: Complex[Array, "D N"]

    @classmethod
    def of(cls, system: DPLR) -> Discrete:
        half, p = system.half_step, system.low_rank
        inverse = 1 / (1 - half * system.eigenvalues)
        row = p.conj() * inverse
        column = -half / (1 + half * paired(row, p)) * p * inverse  # (I - s A)^-1 = inverse + column row
        drive = 2 * half * (system.inward * inverse + column * paired(row, system.inward))
        return cls(2 * inverse - 1, 2 * column, row, drive)

    def advance(self, h: Complex[Array, "*B D N"]) -> Complex[Array, "*B D N"]:
        diagonal, column, row = (a.reshape((1,) * (h.ndim - 2) + a.shape) for a in self[:3])
        return diagonal * h + column * paired(row, h)

    def squares(self, length: int) -> list[Float[Array, "D M M"]]:
        """The transition's powers 1, 2, 4, ... up to at least `length`, real matrices of parts [Re h, Im h]."""
        pairs = self.diagonal.shape[-1]
        basis = jnp.concatenate([jnp.eye(pairs), 1j * jnp.eye(pairs)]).astype(self.diagonal.dtype)
        columns = self.advance(jnp.broadcast_to(basis[:, None], (2 * pairs, *self.diagonal.shape)))
        matrices = [jnp.transpose(parts(columns), (1, 2, 0))]
        for _ in range(length.bit_length() - 1):
            matrices.append(jnp.matmul(matrices[-1], matrices[-1], precision="highest"))
        return matrices


def paired(row: Complex[Array, "*B D N"], h: Complex[Array, "*B D N"]) -> Float[Array, "*B D 1"]:
    """The product of a row and a vector over both halves of their conjugate pairs."""
    return 2 * jnp.sum((row * h).real, axis=-1, keepdims=True)


def parts(h: Complex[Array, "... N"]) -> Float[Array, "... M"]:
    return jnp.concatenate([h.real, h.imag], axis=-1)


def joined(h: Float[Array, "... M"]) -> Complex[Array, "... N"]:
    return jax.lax.complex(*jnp.split(h, 2, axis=-1))


class Span(NamedTuple):
    """How many steps a span has, and the state that it leaves behind when it starts from none."""

    steps: Int[Array, ""]
    drive: Float[Array, "..."]


def dplr_recurrence(system: DPLR, length: int) -> Recurrence:
    """h_t = A h_{t-1} + B u_t, y_t = C h_t with `Span(1, u [D])` as one step's inputs; spans of up to `length` steps.

    A step costs O(N) a channel. Elements are a state and a count: A^n h for any n takes the binary digits of n, each a
    product with a dense matrix that is made once, so combining two spans costs O(N^2 log n).
    """
    step = Discrete.of(system)
    matrices = step.squares(length)

    def power(steps: Array, h: Array) -> Array:
        wide = parts(h)
        for digit, matrix in enumerate(matrices):
            moved = jnp.einsum("dij,dj->di", matrix, wide, precision="highest")
            wide = jnp.where((steps >> digit) & 1 == 1, moved, wide)
        return joined(wide)

    return Recurrence(
        elements=lambda x: Span(x.steps, x.drive[:, None] * step.drive),
        combine=lambda a, b: Span(a.steps + b.steps, power(b.steps, a.drive) + b.drive),
        identity=lambda e: jax.tree.map(jnp.zeros_like, e),
        act=lambda e, h: power(e.steps, h) + e.drive,
        update=lambda x, h: jnp.where(x.steps > 0, step.advance(h), h) + x.drive[:, None] * step.drive,
        read=lambda h, _: paired(system.outward, h)[..., 0],
        initial=lambda _: jnp.zeros_like(step.diagonal),
        neutral=lambda x: jax.tree.map(jnp.zeros_like, x),
    )


def dplr_scan(
    u: Float[Array, "B T D"],
    system: DPLR,
    state: Complex[Array, "B D N"],
    *,
    segments: Segments | None = None,
    method: str = "auto",
    chunk: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T D"], Complex[Array, "B D N"]]:
    """A DPLR state space per channel: `(y [B, T, D], state)`.

    `convolution` has the kernel from the transfer function, a Cauchy sum corrected by Woodbury's identity, in O(N T) a
    channel; `sequential` is O(N) a step; `auto` is one of the two. `associative` and `chunked` combine spans, at
    O(N^2 log T) a step. Matrices of [D, 2N, 2N] for each binary digit of T serve all but `sequential`.
    """
    check_method(method, chunk, also=(CONVOLUTION,))
    method = convolution_or_loop(*u.shape[:2]) if method == "auto" else method
    u = u.astype(jnp.promote_types(u.dtype, system.half_step.dtype))
    u = u if segments is None else jnp.where(segments.valid[..., None], u, 0)
    if method == CONVOLUTION:
        run = lambda u, system, state: _convolve(u, system, state, segments, sequence_axis)
        return jax.checkpoint(run)(u, system, state)
    return run_family(
        "dplr",
        dplr_recurrence(system, u.shape[1]),
        Span(jnp.ones(u.shape[:2], jnp.int32), u),
        state,
        segments=segments,
        method=method,
        chunk=chunk,
        sequence_axis=sequence_axis,
    )


class Resolvents(NamedTuple):
    """`rows` C~ X(z) and `columns` X(z) B of `[K, D, 2N]` at the points z_k, both halves of the pairs.

    (I - z A')^-1 B' = X(z) 2 s B with X(z) = ((1 - z) I - s (1 + z) A)^-1, and over z the sum of z^j C A'^j B' for
    j < T is C~ (I - z A')^-1 B' with C~ = C (I - r^T A'^T), the same for all the points.
    """

    rows: Complex[Array, "K D M"]
    columns: Complex[Array, "K D M"]


def _convolve(
    u: Array, system: DPLR, state: Array, segments: Segments | None, sequence_axis: str | None
) -> tuple[Array, Array]:
    length, half = u.shape[1], system.half_step
    real = u.dtype
    step = Discrete.of(system)
    matrices = step.squares(length)
    shrunk = math.exp(-SHRINK)
    functional = parts(2 * system.outward.conj())  # of [Re h, Im h]
    closing = functional - shrunk * _apply(functional, matrices, length, "di,dij->dj")
    resolvents = _resolvents(system, 0.5 * joined(closing).conj(), length)
    growth = jnp.asarray(np.exp(SHRINK * np.arange(length) / length), real)  # r^-j

    def kernel_of(vectors: Array) -> Array:
        """y_j = C A'^j (I - s A)^-1 v of vectors [B, D, N] as [B, T, D]."""
        transfer = jnp.einsum("kdm,bdm->bkd", resolvents.rows, _both(vectors), precision="highest")
        return jnp.fft.irfft(transfer, n=length, axis=1) * growth[None, :, None]

    def extend(h: Array) -> Array:
        a = jax.tree.map(lambda leaf: leaf[None], system)
        # (I - s A) A' h = (I + s A) h
        return kernel_of(h + a.half_step * (a.eigenvalues * h - a.low_rank * paired(a.low_rank.conj(), h)))

    def fold(recent: Array) -> Array:
        spectrum = jnp.fft.rfft(recent * growth[None, :, None], axis=1).conj()
        alone = np.arange(length // 2 + 1) * 2 % length == 0  # points that are their own conjugates
        spectrum = spectrum * jnp.asarray(np.where(alone, 0.5, 1) / length, real)[None, :, None]
        a, b = jnp.split(jnp.einsum("kdm,bkd->bdm", resolvents.columns, spectrum, precision="highest"), 2, axis=-1)
        total = parts(a + b.conj())
        return joined(total - shrunk * _apply(total, matrices, length, "bdj,dij->bdi"))

    return convolve_documents(
        u,
        kernel_of((2 * half * system.inward)[None])[0],
        state,
        fold=fold,
        extend=extend,
        element=lambda steps, drive: Span(steps.astype(jnp.int32), drive),
        recurrence=dplr_recurrence(system, length),
        segments=segments,
        sequence_axis=sequence_axis,
    )


def _apply(vector: Array, matrices: list[Array], power: int, subscripts: str) -> Array:
    for digit, matrix in enumerate(matrices):
        if power >> digit & 1:
            vector = jnp.einsum(subscripts, vector, matrix, precision="highest")
    return vector


def _both(half: Array) -> Array:
    return jnp.concatenate([half, half.conj()], axis=-1)


def _resolvents(system: DPLR, outward: Array, length: int) -> Resolvents:
    point = -SHRINK / length - 2j * np.pi * np.arange(length // 2 + 1) / length  # log z
    constant = lambda value: jnp.asarray(value, system.eigenvalues.dtype)[:, None, None]
    below, above = constant(-np.expm1(point)), constant(1 + np.exp(point))
    half = system.half_step[None] * above
    eigenvalues, p, b, c = (_both(a)[None] for a in (*system[:3], outward))
    difference = below - half * eigenvalues
    # |difference| lies between about SHRINK / T and 2 + |half eigenvalue|: no need of a division's care for extremes
    inverse = difference.conj() * (1 / (jnp.square(difference.real) + jnp.square(difference.imag)))
    total = lambda a: jnp.sum(a, axis=-1, keepdims=True)
    correction = half * inverse * (1 / (1 + half * total(p.conj() * p * inverse)))
    rows = c * inverse - total(c * p * inverse) * correction * p.conj()
    columns = 2 * system.half_step[None] * (b * inverse - total(p.conj() * b * inverse) * correction * p)
    return Resolvents(rows, columns)
