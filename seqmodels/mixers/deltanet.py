"""DeltaNet: a matrix state that is corrected by the delta rule and does not decay (arXiv 2406.06484)."""

from __future__ import annotations

import dataclasses

from flax import nnx

from seqmodels.mixers.gated_deltanet import Eigenvalues, GatedDeltaNet, GatedDeltaNetConfig
from seqmodels.typing import MixerConfig


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(MixerConfig):
    """q, k, v = SiLU(conv(W x)), q and k of unit length per head;  beta_t = sigmoid(W_b x_t), times 2 if SIGNED

        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T              [key size, value size]
        o_t = S_t^T q_t / sqrt(key size)
        out = W_o RMSNorm(o)

    The layer is `GatedDeltaNet` without its decay and without its output gate. SIGNED eigenvalues (2411.12537) make
    I - beta k k^T a reflection where beta is 2: parity and other counting modulo a number, which POSITIVE cannot do.
    Keys have `expand_key` times the model's width over all `heads`, values `expand_value` times.
    """

    heads: int = 4
    expand_key: float = 1.0
    expand_value: float = 1.0
    conv_width: int = 4
    eigenvalues: Eigenvalues = Eigenvalues.POSITIVE
    norm_eps: float = 1e-5
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        _ = self.layer

    @property
    def layer(self) -> GatedDeltaNetConfig:
        """The config of the layer that is made."""
        return GatedDeltaNetConfig(**vars(self), decay=False, output_gate=False)

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> GatedDeltaNet:
        return GatedDeltaNet(self.layer, width, depth=depth, rngs=rngs)
