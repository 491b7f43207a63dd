"""DeltaProduct: several delta rules a token, whose transition is a product of Householders (arXiv 2502.10297)."""

from __future__ import annotations

import dataclasses

from flax import nnx

from seqmodels.mixers.gated_deltanet import Eigenvalues, GatedDeltaNet, GatedDeltaNetConfig
from seqmodels.typing import MixerConfig


@dataclasses.dataclass(frozen=True)
class DeltaProductConfig(MixerConfig):
    """n = `householders` keys, values and betas a token: k_i, v_i = SiLU(conv(W_i x)), beta_i = 2 sigmoid(B_i x)

        S = a_t S_{t-1};   S = S + beta_ti k_ti (v_ti - S^T k_ti)^T for i = 1..n;   S_t = S
        o_t = S_t^T q_t / sqrt(key size)
        out = W_o (RMSNorm(o) * SiLU(W_g x))

    A token's transition is the product of I - beta_ti k_ti k_ti^T: of rank n apart from I, a rotation for n = 2 where
    betas are 2, and any orthogonal matrix for n = key size. q and k have unit length per head.

    The layer is that of `GatedDeltaNetConfig`, which explains the other fields, with n steps. `decay=True` is Gated
    DeltaProduct: a_t is applied once a token. `eigenvalues` POSITIVE drops the 2 before the sigmoids.
    `chunk`: delta rules, n a token, per chunk of the scan.
    """

    householders: int = 2
    heads: int = 6
    expand_key: float = 0.75
    expand_value: float = 1.5
    conv_width: int = 4
    eigenvalues: Eigenvalues = Eigenvalues.SIGNED
    decay: bool = False
    output_gate: bool = True
    decay_range: tuple[float, float] = (1.0, 16.0)
    step_range: tuple[float, float] = (1e-3, 1e-1)
    norm_eps: float = 1e-5
    method: str = "auto"
    chunk: int | None = None

    def __post_init__(self):
        if self.householders < 1:
            raise ValueError(f"householders must be at least 1, not {self.householders}")
        _ = self.layer

    @property
    def layer(self) -> GatedDeltaNetConfig:
        """The config of the layer that is made, one of whose steps is a Householder matrix."""
        fields = dict(vars(self))
        del fields["householders"]
        return GatedDeltaNetConfig(**fields)

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> GatedDeltaNet:
        return GatedDeltaNet(self.layer, width, depth=depth, rngs=rngs, steps=self.householders)
