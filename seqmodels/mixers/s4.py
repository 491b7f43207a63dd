"""S4: a state space per channel whose transition is diagonal minus low rank, from HiPPO (arXiv 2111.00396)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float

from seqmodels.layers.complex_linear import as_complex, zeros_complex
from seqmodels.layers.gated_output import GatedOutput, Output
from seqmodels.layers.hippo import constant, log_uniform, normal_part
from seqmodels.layers.linear import along_last
from seqmodels.mixers.s4d import check_state_space
from seqmodels.operators.dplr import DPLR, dplr_scan
from seqmodels.params import Group, param
from seqmodels.typing import Context, Memory, MixerConfig


@dataclasses.dataclass(frozen=True)
class S4Config(MixerConfig):
    """Per channel, with A = diag(-exp(decay_log) + i frequency) - P P^* over conjugate pairs, under the bilinear rule

        h_t = (I - dt/2 A)^-1 ((I + dt/2 A) h_{t-1} + dt B x_t),  y_t = 2 Re(C h_t) + skip x_t
        out = the `output` of y, by default a GLU of GELU(y)

    `state_size` counts both halves of the conjugate pairs. A and B are shared by width / `copies` channels, dt and C
    belong to each. A, P and B start as HiPPO-LegS in the basis of its normal part, log dt uniform between the logs of
    `step_range`, C complex normal of variance 1, skip normal. As published A, P, B and dt have no weight decay; skip
    has none here either. `method`: `convolution`, `sequential`, `associative`, `chunked` or `auto`; see
    `operators.dplr` for their costs. Not as published: C is kept as it is, and not as
    C (I - A^T) of one length T, so that any length can follow any other; GELU is its tanh approximation.
    """

    state_size: int = 64
    copies: int = 1
    step_range: tuple[float, float] = (1e-3, 1e-1)
    output: Output = Output.FULL_GLU
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_state_space(self)
        if self.copies < 1:
            raise ValueError(f"copies must be at least 1, not {self.copies}")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> S4:
        return S4(self, width, rngs=rngs)


class S4State(NamedTuple):
    hidden: Complex[Array, "B D N"]


class S4(nnx.Module):
    """See `S4Config`. The state space runs in at least float32 and complex64, whatever the type of x."""

    recurrent_memory = Memory(("hidden",))

    def __init__(self, config: S4Config, width: int, *, rngs: nnx.Rngs):
        if width % config.copies:
            raise ValueError(f"a width of {width} does not divide into copies={config.copies} of A")
        self.config, self.width = config, width
        start, pairs = normal_part(config.state_size), config.state_size // 2

        def shared(value: np.ndarray) -> nnx.Param:
            shape, axes = (config.copies, pairs), (None, "state")
            return param(rngs, shape, constant(value), group=Group.DYNAMICS, axes=axes)

        self.decay_log, self.frequency = shared(np.log(-start.eigenvalues.real)), shared(start.eigenvalues.imag)
        self.low_rank_real, self.low_rank_imaginary = shared(start.low_rank.real), shared(start.low_rank.imag)
        self.inward_real, self.inward_imaginary = shared(start.inward.real), shared(start.inward.imag)

        def own(init: Any, *shape: int, group: Group = Group.DYNAMICS) -> nnx.Param:
            return param(rngs, (width, *shape), init, group=group, axes=("embed", "state")[: 1 + len(shape)])

        normal = jax.nn.initializers.normal
        self.step_log = own(log_uniform(*config.step_range))
        self.outward_real = own(normal(0.5**0.5), pairs, group=Group.MATRIX)
        self.outward_imaginary = own(normal(0.5**0.5), pairs, group=Group.MATRIX)
        self.skip = own(normal(1.0))
        self.out = GatedOutput(width, config.output, rngs=rngs)

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> S4State:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        return S4State(zeros_complex((batch, self.width, self.config.state_size // 2), dtype))

    def system(self) -> DPLR:
        """The continuous system of every channel."""
        each = lambda value: jnp.repeat(value, self.width // self.config.copies, axis=0)
        return DPLR(
            each(as_complex(-jnp.exp(self.decay_log[...]), self.frequency[...])),
            each(as_complex(self.low_rank_real[...], self.low_rank_imaginary[...])),
            each(as_complex(self.inward_real[...], self.inward_imaginary[...])),
            as_complex(self.outward_real[...], self.outward_imaginary[...]),
            0.5 * jnp.exp(self.step_log[...])[:, None],
        )

    def __call__(
        self, x: Float[Array, "B T D"], state: S4State | None, context: Context
    ) -> tuple[Float[Array, "B T D"], S4State]:
        config, segments = self.config, context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.hidden.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.hidden.shape[0]} rows cannot continue x of shape {x.shape}")
        x = jnp.where(segments.valid[..., None], x, 0)
        y, hidden = dplr_scan(
            x,
            self.system(),
            state.hidden,
            segments=segments,
            method=config.method,
            chunk=config.chunk,
            sequence_axis=context.sequence_axis,
        )
        y = self.out(y + along_last(self.skip[...], y) * x, x.dtype)
        return jnp.where(segments.valid[..., None], y, 0), S4State(hidden)
