"""S5: one diagonal state space for all channels, with a gap of time before every token (arXiv 2208.04933)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float

from seqmodels.layers.complex_linear import IntoComplex, OutOfComplex, as_complex, zeros_complex
from seqmodels.layers.gated_output import GatedOutput, Output
from seqmodels.layers.hippo import Discretization, constant, discretize, log_uniform, normal_part
from seqmodels.layers.linear import along_last
from seqmodels.mixers.s4d import check_state_space
from seqmodels.operators.convolution import CONVOLUTION
from seqmodels.operators.state_space import state_space
from seqmodels.params import Group, param
from seqmodels.typing import Context, Memory, MixerConfig

ELAPSED = "elapsed"
"""`context.shared[ELAPSED]`, Float[B, T]: the time from the token before to this one, in units of the usual gap."""
FASTEST = -1e-4


@dataclasses.dataclass(frozen=True)
class S5Config(MixerConfig):
    """With A = min(decay, -1e-4) + i frequency, and dt_t = exp(step_log) gap_t of every state

        h_t = A'_t h_{t-1} + B'_t (B x_t),  y_t = 2 Re(C h_t) + skip x_t       [state_size / 2] complex numbers
        zoh:       A' = exp(dt A),                     B' = (A' - 1) / A
        bilinear:  A' = (1 + dt/2 A) / (1 - dt/2 A),   B' = dt / (1 - dt/2 A)
        out = the `output` of y, by default GELU(y) sigmoid(W GELU(y))

    gap_t is `context.shared["elapsed"][:, t]` where that is given (irregular samples; >= 0; `forward(shared=)` of a
    model), else 1; no method
    `convolution` then, which needs equal steps. A starts as `blocks` copies of the normal part of HiPPO-LegS of size
    state_size / blocks, V diag(A) V^*; B and C as V^* B and C V with normal B, C of variance 1 / state_size, as in the
    authors' code; log dt is uniform between the logs of `step_range`, skip normal. A, dt, B and skip have no weight
    decay (the published "standard" setting, where skip has). The bound of A is the published `clip_eigs`, always on.
    The paper's bidirectional layers look ahead and are not offered.
    """

    state_size: int = 64
    blocks: int = 1
    discretization: Discretization = Discretization.ZOH
    step_range: tuple[float, float] = (1e-3, 1e-1)
    output: Output = Output.HALF_GLU1
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_state_space(self)
        if self.blocks < 1 or self.state_size % (2 * self.blocks):
            raise ValueError(f"state_size={self.state_size} does not divide into blocks={self.blocks} of an even size")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> S5:
        return S5(self, width, rngs=rngs)


class S5State(NamedTuple):
    hidden: Complex[Array, "B N"]


class S5(nnx.Module):
    """See `S5Config`. Rates, drives and states are at least complex64, whatever the type of x."""

    recurrent_memory = Memory(("hidden",))

    def __init__(self, config: S5Config, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.size = size = config.state_size // 2
        start = normal_part(config.state_size // config.blocks)
        eigenvalues = np.tile(start.eigenvalues, config.blocks)
        vectors = np.kron(np.eye(config.blocks), start.vectors).astype(np.complex64)  # [state_size, size]

        own = functools.partial(param, rngs, (size,), group=Group.DYNAMICS, axes=("state",))
        self.decay = own(constant(eigenvalues.real))
        self.frequency = own(constant(eigenvalues.imag))
        self.step_log = own(log_uniform(*config.step_range))
        draw = lambda *shape: jax.random.truncated_normal(rngs.params(), -2, 2, shape) / 0.88 * config.state_size**-0.5
        inward = draw(width, config.state_size) @ vectors.conj()
        outward = vectors.T @ jax.lax.complex(draw(config.state_size, width), draw(config.state_size, width))
        parts = lambda z: {"real": _given(z.real), "imaginary": _given(z.imag)}
        self.inward = IntoComplex(width, size, rngs=rngs, group=Group.DYNAMICS, **parts(inward))
        self.outward = OutOfComplex(size, width, rngs=rngs, group=Group.MATRIX, **parts(outward))
        normal = jax.nn.initializers.normal(1.0)
        self.skip = param(rngs, (width,), normal, group=Group.DYNAMICS, axes=("embed",))
        self.out = GatedOutput(width, config.output, rngs=rngs)

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> S5State:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        return S5State(zeros_complex((batch, self.size), dtype))

    def __call__(
        self, x: Float[Array, "B T D"], state: S5State | None, context: Context
    ) -> tuple[Float[Array, "B T D"], S5State]:
        config, segments = self.config, context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.hidden.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.hidden.shape[0]} rows cannot continue x of shape {x.shape}")
        x = jnp.where(segments.valid[..., None], x, 0)
        log_decay, inward, elapsed = self._dynamics(context, x.shape[:2])
        drive = self.inward(x)
        drive = drive * inward.reshape((1,) * (drive.ndim - inward.ndim) + inward.shape)
        h, hidden = state_space(
            drive,
            log_decay,
            state.hidden,
            elapsed=elapsed,
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        y = 2 * self.outward(h)
        y = self.out(y + along_last(self.skip[...], y) * x, x.dtype)
        return jnp.where(segments.valid[..., None], y, 0), S5State(hidden)

    def _dynamics(self, context: Context, shape: tuple[int, ...]) -> tuple[Array, Array, Array | None]:
        """`(log A', factor of B x, gaps)`: both [N], or with gaps B' (and log A' under bilinear) [B, T, N]."""
        config, gaps = self.config, context.shared.get(ELAPSED)
        eigenvalues = as_complex(jnp.minimum(self.decay[...], FASTEST), self.frequency[...])
        step = jnp.exp(self.step_log[...])
        if gaps is None:
            return *discretize(eigenvalues, step, config.discretization), None
        if gaps.shape != shape:
            raise ValueError(f"context.shared['{ELAPSED}'] holds a gap a token, {shape}, not {gaps.shape}")
        if config.method == CONVOLUTION:
            raise ValueError(f"method='convolution' needs equal steps, and context.shared['{ELAPSED}'] gives gaps")
        gaps = jnp.where(context.segments.valid, gaps, 1).astype(step.dtype)
        steps = gaps[..., None] * step[None, None]
        log_decay, inward = discretize(eigenvalues[None, None], steps, config.discretization)
        if config.discretization == Discretization.ZOH:
            return eigenvalues * step, inward, gaps  # exp(A dt gap): a fixed rate, elapsed times
        return log_decay, inward, None


def _given(value: Array) -> Any:
    return lambda key, shape, dtype=jnp.float32: value.astype(dtype)
