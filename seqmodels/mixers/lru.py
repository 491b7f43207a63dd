"""The linear recurrent unit: a complex diagonal recurrence, stable by its parameters (arXiv 2303.06349)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Complex, Float

from seqmodels.layers.complex_linear import IntoComplex, OutOfComplex, as_complex, zeros_complex
from seqmodels.layers.gated_output import GatedOutput, Output, check_output
from seqmodels.layers.linear import along_last
from seqmodels.operators.convolution import CONVOLUTION
from seqmodels.operators.family import check_method
from seqmodels.operators.state_space import state_space
from seqmodels.params import Group, param
from seqmodels.typing import Context, Memory, MixerConfig

SMALLEST = 1e-6  # keeps logarithms of uniform draws finite


@dataclasses.dataclass(frozen=True)
class LRUConfig(MixerConfig):
    """log lambda = -exp(nu_log) + i exp(theta_log), and (equation 7 of the paper)

        h_t = lambda h_{t-1} + exp(gamma_log) (B x_t),  y_t = Re(C h_t) + skip x_t      [state_size] complex numbers
        out = the `output` of y, by default a GLU of GELU(y)

    At initialisation lambda is uniform on the ring `min_radius` <= |lambda| <= `max_radius` with phases in
    [0, max_phase], gamma is sqrt(1 - |lambda|^2) and learned from there; the parts of B have variance 1 / (2 width),
    those of C 1 / state_size (appendix A), and skip is normal. nu, theta, gamma, B and skip have no weight decay.
    There is no conjugate symmetry. `operators.online.online_step`, given `unit` and `read`, computes the gradients of
    this layer forward in time.
    """

    state_size: int = 64
    min_radius: float = 0.0
    max_radius: float = 1.0
    max_phase: float = 2 * math.pi
    output: Output = Output.FULL_GLU
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        check_method(self.method, self.chunk, also=(CONVOLUTION,))
        check_output(self.output)
        if self.state_size < 1:
            raise ValueError(f"state_size must be at least 1, not {self.state_size}")
        if not 0 <= self.min_radius < self.max_radius <= 1:
            raise ValueError(f"radii need 0 <= min_radius < max_radius <= 1, not {self.min_radius}, {self.max_radius}")
        if not 0 < self.max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase is an angle in (0, 2 pi], not {self.max_phase}")

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> LRU:
        return LRU(self, width, rngs=rngs)


class LRUState(NamedTuple):
    hidden: Complex[Array, "B N"]


class LRU(nnx.Module):
    """See `LRUConfig`. Rates, drives and states are at least complex64, whatever the type of x."""

    recurrent_memory = Memory(("hidden",))

    def __init__(self, config: LRUConfig, width: int, *, rngs: nnx.Rngs):
        self.config = config
        size, normal = config.state_size, jax.nn.initializers.normal
        low, high = config.min_radius**2, config.max_radius**2
        uniform = jax.random.uniform(rngs.params(), (2, size), minval=SMALLEST)
        decay = -0.5 * jnp.log(low + uniform[0] * (high - low))  # -log |lambda|
        decay = jnp.maximum(decay, SMALLEST)
        own = functools.partial(param, rngs, (size,), group=Group.DYNAMICS, axes=("state",))
        self.nu_log = own(lambda *_: jnp.log(decay))
        self.theta_log = own(lambda *_: jnp.log(config.max_phase * uniform[1]))
        self.gamma_log = own(lambda *_: 0.5 * jnp.log(-jnp.expm1(-2 * decay)))
        inward, outward = normal((2 * width) ** -0.5), normal(size**-0.5)
        self.inward = IntoComplex(width, size, rngs=rngs, real=inward, imaginary=inward, group=Group.DYNAMICS)
        self.outward = OutOfComplex(size, width, rngs=rngs, real=outward, imaginary=outward, group=Group.MATRIX)
        self.skip = param(rngs, (width,), normal(1.0), group=Group.DYNAMICS, axes=("embed",))
        self.out = GatedOutput(width, config.output, rngs=rngs)

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> LRUState:
        """Zeros; `capacity` does not matter, the state is as large after any number of tokens."""
        return LRUState(zeros_complex((batch, self.config.state_size), dtype))

    def unit(self) -> tuple[Complex[Array, "N"], Complex[Array, "D N"]]:
        """The recurrence alone: log lambda, and B with the factor gamma."""
        inward = as_complex(self.inward.real[...], self.inward.imaginary[...])
        return self._rate(), inward * jnp.exp(self.gamma_log[...])[None]

    def _rate(self) -> Complex[Array, "N"]:
        return as_complex(-jnp.exp(self.nu_log[...]), jnp.exp(self.theta_log[...]))

    def read(self, hidden: Complex[Array, "... N"], x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """What follows the recurrence, token by token."""
        y = self.outward(hidden)
        return self.out(y + along_last(self.skip[...], y) * x, x.dtype)

    def __call__(
        self, x: Float[Array, "B T D"], state: LRUState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], LRUState]:
        segments = context.segments
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        if state.hidden.shape[0] != x.shape[0]:
            raise ValueError(f"a state of {state.hidden.shape[0]} rows cannot continue x of shape {x.shape}")
        x = jnp.where(segments.valid[..., None], x, 0)
        drive = self.inward(x)
        h, hidden = state_space(
            drive * along_last(jnp.exp(self.gamma_log[...]), drive.real),
            self._rate(),
            state.hidden,
            segments=segments,
            method=self.config.method,
            chunk=self.config.chunk,
            sequence_axis=context.sequence_axis,
        )
        y = self.read(h, x)
        return jnp.where(segments.valid[..., None], y, 0), LRUState(hidden)
