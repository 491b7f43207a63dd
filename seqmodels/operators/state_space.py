"""Time-invariant diagonal state spaces: one per channel (S4D), and one for all channels (S5, LRU)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float

from seqmodels.compat import on_cpu
from seqmodels.operators.convolution import CONVOLUTION, convolve_documents
from seqmodels.operators.diagonal import Diagonal, diagonal_recurrence, diagonal_scan
from seqmodels.operators.family import check_method, run_family
from seqmodels.scan import Recurrence
from seqmodels.typing import Segments

SHORT, FEW = 4, 4
"""Up to so many steps a loop is faster than a kernel of that length; and on a CPU for so many rows, whatever the length
(on 2 cores that others used too, 1,024 steps of 256 channels with 64 states: about equal at 8 rows)."""


def convolution_or_loop(batch: int, length: int) -> str:
    """What `auto` takes for a state space per channel: a kernel's cost hardly grows with the batch, a loop's does."""
    loop = length <= SHORT or (on_cpu() and batch <= FEW)
    return "sequential" if loop else CONVOLUTION


def powers(rate: Complex[Array, "*D N"], length: int) -> Complex[Array, "*D T N"]:
    """exp(j rate) for j = 0 .. length - 1, from tables of 32 and of length / 32: a product costs less than an exp."""
    front, (size,) = rate.shape[:-1], rate.shape[-1:]

    def table(stop: int, step: int) -> Array:
        time = jnp.arange(0, stop, step, dtype=rate.real.dtype)
        return jnp.exp(time.reshape((1,) * len(front) + (-1, 1)) * rate[..., None, :])

    both = table(length, 32)[..., :, None, :] * table(min(length, 32), 1)[..., None, :, :]
    return both.reshape(*front, -1, size)[..., :length, :]


def channel_recurrence(
    rate: Complex[Array, "D N"], inward: Complex[Array, "D N"], outward: Complex[Array, "D N"]
) -> Recurrence:
    """h_t = exp(rate elapsed_t) h_{t-1} + inward u_t, read as Re(sum over n of outward h_t), channel by channel.

    One step's inputs are `Diagonal(elapsed [], u [D])`: states and drives of [D N] numbers exist step by step, or chunk
    by chunk, only.
    """
    base = diagonal_recurrence(rate.reshape(-1))
    fold, emit = base.fold, base.emit
    assert fold is not None  # for mypy: the family has both
    assert emit is not None

    def widen(inputs: Diagonal) -> Diagonal:
        drive = inputs.drive[..., None] * _like(inward, inputs.drive)
        return Diagonal(inputs.log_decay, drive.reshape(*inputs.drive.shape[:-1], -1))

    def read(state: Array) -> Array:
        state = state.reshape(*state.shape[:-1], *outward.shape)
        return jnp.sum((state * _like(outward, state[..., 0])).real, axis=-1)

    def step_fold(inputs: Diagonal, reset: Bool[Array, "C"]) -> Diagonal:
        return fold(widen(inputs), reset)

    def step_emit(inputs: Diagonal, state: Array, reset: Bool[Array, "C"]) -> Array:
        return read(emit(widen(inputs), state, reset))

    return base._replace(
        elements=widen,
        read=lambda state, _: read(state),
        initial=lambda _: jnp.zeros(rate.size, rate.dtype),
        fold=step_fold,
        emit=step_emit,
    )


def channel_state_space(
    u: Float[Array, "B T D"],
    rate: Complex[Array, "D N"],
    inward: Complex[Array, "D N"],
    outward: Complex[Array, "D N"],
    state: Complex[Array, "B D N"],
    *,
    segments: Segments | None = None,
    method: str = "auto",
    chunk: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T D"], Complex[Array, "B D N"]]:
    """A diagonal state space of N complex numbers per channel: `(y [B, T, D], state)`, as `channel_recurrence` says.

    `convolution` computes y = K * u with K_j = Re(sum outward exp(j rate) inward), so that no state but the last one
    exists; the powers of the decay, [D, T, N] complex, exist once for the batch and are computed again in the backward
    pass. The other methods are those of the diagonal family; `auto` is `convolution_or_loop`. Re(rate) <= 0.
    """
    check_method(method, chunk, also=(CONVOLUTION,))
    method = convolution_or_loop(*u.shape[:2]) if method == "auto" else method
    u = _visible(u, rate, segments)
    if method == CONVOLUTION:
        run = lambda u, rate, inward, outward, state: _convolve(
            u, rate, inward, outward, state, segments=segments, sequence_axis=sequence_axis
        )
        return jax.checkpoint(run)(u, rate, inward, outward, state)
    y, after = run_family(
        "diagonal",
        channel_recurrence(rate, inward, outward),
        Diagonal(jnp.ones(u.shape[:2], u.dtype), u),
        state.reshape(state.shape[0], -1),
        segments=segments,
        method=method,
        chunk=chunk,
        sequence_axis=sequence_axis,
    )
    return y, after.reshape(state.shape)


def _convolve(
    u: Array,
    rate: Array,
    inward: Array,
    outward: Array,
    state: Array,
    *,
    segments: Segments | None,
    sequence_axis: str | None,
) -> tuple[Array, Array]:
    power = powers(rate, u.shape[1])
    after_one = jnp.exp(rate) * outward
    flat = state.reshape(state.shape[0], -1)

    def fold(recent: Array) -> Array:
        part = lambda power: jnp.einsum("dtn,btd->bdn", power, recent, precision="highest")
        return (jax.lax.complex(part(power.real), part(power.imag)) * inward[None]).reshape(flat.shape)

    def extend(flat: Array) -> Array:
        carried = flat.reshape(state.shape) * after_one[None]
        part = lambda power, state: jnp.einsum("dtn,bdn->btd", power, state, precision="highest")
        return part(power.real, carried.real) - part(power.imag, carried.imag)

    y, after = convolve_documents(
        u,
        jnp.sum((power * (inward * outward)[:, None]).real, axis=-1).T,
        flat,
        fold=fold,
        extend=extend,
        element=Diagonal,
        recurrence=diagonal_recurrence(rate.reshape(-1)),
        segments=segments,
        sequence_axis=sequence_axis,
    )
    return y, after.reshape(state.shape)


def state_space(
    drive: Complex[Array, "B T N"],
    rate: Complex[Array, "N"],
    state: Complex[Array, "B N"],
    *,
    elapsed: Float[Array, "B T"] | None = None,
    segments: Segments | None = None,
    method: str = "auto",
    chunk: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Complex[Array, "B T N"], Complex[Array, "B N"]]:
    """h_t = exp(rate elapsed_t) h_{t-1} + drive_t: `diagonal_scan`, or with method `convolution` the same by FFT.

    A convolution needs equal steps: ValueError where `elapsed` is given. Re(rate) <= 0.
    """
    check_method(method, chunk, also=(CONVOLUTION,))
    if method != CONVOLUTION:
        return diagonal_scan(
            rate,
            drive,
            state,
            elapsed=elapsed,
            segments=segments,
            method=method,
            chunk=chunk,
            sequence_axis=sequence_axis,
        )
    if elapsed is not None:
        raise ValueError(
            "method='convolution' needs the same step everywhere, and elapsed times are given: use 'auto', 'sequential'"
        )
    power = powers(rate, drive.shape[1])
    return convolve_documents(
        _visible(drive, rate, segments),
        power,
        state,
        fold=lambda recent: jnp.einsum("tn,btn->bn", power, recent, precision="highest"),
        extend=lambda state: power[None] * (jnp.exp(rate)[None] * state)[:, None],
        element=Diagonal,
        recurrence=diagonal_recurrence(rate),
        segments=segments,
        sequence_axis=sequence_axis,
    )


def _visible(x: Array, rate: Array, segments: Segments | None) -> Array:
    """Inputs without padding, in at least the precision of the rate."""
    x = x.astype(jnp.promote_types(x.dtype, rate.dtype if jnp.iscomplexobj(x) else rate.real.dtype))
    return x if segments is None else jnp.where(segments.valid[..., None], x, 0)


def _like(matrix: Array, vectors: Array) -> Array:
    """A matrix [D, N] with leading axes to meet vectors [..., D], each with an axis of its own behind."""
    return matrix.reshape((1,) * (vectors.ndim - 1) + matrix.shape)
