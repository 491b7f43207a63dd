"""S4D: a diagonal state space for every channel, computed as a convolution or as a recurrence (arXiv 2206.11893)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float

from seqmodels.layers.complex_linear import as_complex, zeros_complex
from seqmodels.layers.gated_output import GatedOutput, Output, check_output
from seqmodels.layers.hippo import Discretization, Start, constant, diagonal_start, discretize, log_uniform
from seqmodels.layers.linear import along_last
from seqmodels.layers.rates import check_ranges
from seqmodels.operators.convolution import CONVOLUTION
from seqmodels.operators.family import check_method
from seqmodels.operators.state_space import channel_state_space
from seqmodels.params import Group, param
from seqmodels.typing import Context, Memory, MixerConfig


@dataclasses.dataclass(frozen=True)
class S4DConfig(MixerConfig):
    """Per channel, with A = -exp(decay_log) + i frequency and B = 1 (equations 2 and 4 of the paper)

        h_t = A' h_{t-1} + B' x_t,  y_t = 2 Re(C h_t) + skip x_t        [state_size / 2] complex numbers
        zoh:       A' = exp(dt A),                     B' = (A' - 1) / A
        bilinear:  A' = (1 + dt/2 A) / (1 - dt/2 A),   B' = dt / (1 - dt/2 A)
        out = the `output` of y, by default a GLU of GELU(y)

    `state_size` counts both halves of the conjugate pairs. A starts from `start`: the normal part of HiPPO-LegS, or
    S4D-Lin or S4D-Inv; log dt is uniform between the logs of `step_range`, C complex normal of variance 1, skip normal.
    `method`: `convolution` (FFT), those of the diagonal family, or `auto` for one of the two. A and dt have no
    weight decay, as published. Not as published: skip has none either, GELU is its tanh approximation, and there is
    no dropout inside the layer.
    """

    state_size: int = 64
    start: Start = Start.LEGS
    discretization: Discretization = Discretization.ZOH
    step_range: tuple[float, float] = (1e-3, 1e-1)
    output: Output = Output.FULL_GLU
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_state_space(self)
        if self.start not in list(Start):
            raise ValueError(f"unknown start {self.start!r}; choose one of {', '.join(Start)}")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> S4D:
        return S4D(self, width, rngs=rngs)


def check_state_space(config: Any) -> None:
    """Raises ValueError on what no config of S4, S4D or S5 may hold."""
    check_method(config.method, config.chunk, also=(CONVOLUTION,))
    check_output(config.output)
    check_ranges(config, "step_range")
    if config.state_size < 2 or config.state_size % 2:
        raise ValueError(f"state_size counts conjugate pairs: it is even, not {config.state_size}")
    discretization = getattr(config, "discretization", Discretization.BILINEAR)  # S4 has no other
    if discretization not in list(Discretization):
        raise ValueError(f"unknown discretization {discretization!r}; choose one of {', '.join(Discretization)}")


class S4DState(NamedTuple):
    hidden: Complex[Array, "B D N"]


class S4D(nnx.Module):
    """See `S4DConfig`. The state space runs in at least float32 and complex64, whatever the type of x."""

    recurrent_memory = Memory(("hidden",))

    def __init__(self, config: S4DConfig, width: int, *, rngs: nnx.Rngs):
        self.config, self.width = config, width
        start = diagonal_start(config.start, config.state_size)

        def own(init: Any, shape: tuple[int, ...], group: Group = Group.DYNAMICS) -> nnx.Param:
            return param(rngs, shape, init, group=group, axes=("embed", "state")[: len(shape)])

        normal, each = jax.nn.initializers.normal, (width, config.state_size // 2)
        self.decay_log = own(constant(np.log(-start.real)), each)
        self.frequency = own(constant(start.imag), each)
        self.step_log = own(log_uniform(*config.step_range), (width,))
        self.outward_real = own(normal(0.5**0.5), each, Group.MATRIX)
        self.outward_imaginary = own(normal(0.5**0.5), each, Group.MATRIX)
        self.skip = own(normal(1.0), (width,))
        self.out = GatedOutput(width, config.output, rngs=rngs)

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> S4DState:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        return S4DState(zeros_complex((batch, self.width, self.config.state_size // 2), dtype))

    def __call__(
        self, x: Float[Array, "B T D"], state: S4DState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], S4DState]:
        config, segments = self.config, context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.hidden.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.hidden.shape[0]} rows cannot continue x of shape {x.shape}")
        x = jnp.where(segments.valid[..., None], x, 0)
        eigenvalues = as_complex(-jnp.exp(self.decay_log[...]), self.frequency[...])
        rate, inward = discretize(eigenvalues, jnp.exp(self.step_log[...])[:, None], config.discretization)
        y, hidden = channel_state_space(
            x,
            rate,
            inward,
            2 * as_complex(self.outward_real[...], self.outward_imaginary[...]),
            state.hidden,
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        y = self.out(y + along_last(self.skip[...], y) * x, x.dtype)
        return jnp.where(segments.valid[..., None], y, 0), S4DState(hidden)
