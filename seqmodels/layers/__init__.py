"""The parts that mixers and models are made of: projections, norms, MLPs, short convolutions, positions, the stack."""

from seqmodels.layers.across import ACROSS, AcrossLayers
from seqmodels.layers.attend import Keys, Queries, Scoring, attend, attend_in_window
from seqmodels.layers.linear import BlockDiagonalLinear, Linear
from seqmodels.layers.mlp import Activation, MLPConfig
from seqmodels.layers.moe import MoEConfig
from seqmodels.layers.norms import LayerNorm, NormConfig, NormKind, RMSNorm
from seqmodels.layers.positions import Positions, alibi_slopes, rope
from seqmodels.layers.rwkv_channel import RWKVChannelConfig
from seqmodels.layers.short_conv import ShortConv
from seqmodels.layers.stack import Block, LayerGroups, Stack

__all__ = [
    "ACROSS",
    "AcrossLayers",
    "Activation",
    "Block",
    "BlockDiagonalLinear",
    "Keys",
    "LayerGroups",
    "LayerNorm",
    "Linear",
    "MLPConfig",
    "MoEConfig",
    "NormConfig",
    "NormKind",
    "Positions",
    "Queries",
    "RMSNorm",
    "RWKVChannelConfig",
    "Scoring",
    "ShortConv",
    "Stack",
    "alibi_slopes",
    "attend",
    "attend_in_window",
    "rope",
]
