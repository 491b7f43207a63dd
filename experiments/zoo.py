"""The models that tables compare, by the names that papers give them: one place for their sizes and options."""

from __future__ import annotations

import dataclasses
from typing import Any

from seqmodels.layers.mlp import MLPConfig
from seqmodels.layers.positions import Positions
from seqmodels.layers.stack import Block, LayerGroups
from seqmodels.mixers import (
    AttentionConfig,
    DeltaNetConfig,
    DeltaProductConfig,
    Eigenvalues,
    GatedDeltaNetConfig,
    GLAConfig,
    LSTMConfig,
    Mamba2Config,
    MLSTMConfig,
    PrefixScan,
    RGLRUConfig,
    SLSTMConfig,
)
from seqmodels.models.lm import ModelConfig
from seqmodels.typing import MixerConfig


def mixers(width: int, *, heads: int = 4, window: int = 16) -> dict[str, tuple[MixerConfig, ...]]:
    """A pattern of mixers for every name. `window` is that of local attention, alone and in Griffin."""
    head = max(width // heads, 8)
    local = AttentionConfig(heads=heads, kv_heads=1, window=window)
    return {
        "Transformer": (AttentionConfig(heads=heads),),
        "Transformer, NoPE": (AttentionConfig(heads=heads, positions=Positions.NOPE),),
        "sliding attention": (local,),
        "LSTM": (LSTMConfig(),),
        "sLSTM": (SLSTMConfig(heads=heads, recurrent_range=1.0),),
        "mLSTM": (MLSTMConfig.original(heads=heads),),
        "Mamba-2": (Mamba2Config(head_size=2 * head, state_size=head),),
        "GLA": (GLAConfig(heads=heads),),
        "GLA, convolution": (GLAConfig(heads=heads, conv_width=4),),
        "DeltaNet [0, 1]": (DeltaNetConfig(heads=heads),),
        "DeltaNet [-1, 1]": (DeltaNetConfig(heads=heads, eigenvalues=Eigenvalues.SIGNED),),
        "Gated DeltaNet [0, 1]": (gated_delta(heads, Eigenvalues.POSITIVE),),
        "Gated DeltaNet [-1, 1]": (gated_delta(heads, Eigenvalues.SIGNED),),
        "DeltaProduct [-1, 1]": (DeltaProductConfig(heads=heads, expand_key=1.0, expand_value=1.0),),
        "Griffin": (RGLRUConfig(recurrent_size=width, blocks=heads), local),
    }


def gated_delta(heads: int, eigenvalues: Eigenvalues) -> GatedDeltaNetConfig:
    """With keys and values as large as DeltaNet's, so that the gate is all that differs."""
    return GatedDeltaNetConfig(heads=heads, expand_key=1.0, expand_value=1.0, eigenvalues=eigenvalues)


def model(name: str, width: int, layers: int, *, heads: int = 4, window: int = 16, **options: Any) -> ModelConfig:
    """`layers` layers of that name, each followed by a gated MLP; the vocabulary is set by whoever trains it.

    A pattern of several mixers (Griffin) is gone through again and again. Models that fit into memory as they are
    recompute nothing in the backward pass.
    """
    pattern = mixers(width, heads=heads, window=window)[name]
    whole, rest = divmod(layers, len(pattern))
    groups: LayerGroups = (*(((pattern, whole),) if whole else ()), *(((pattern[:rest], 1),) if rest else ()))
    settings: dict[str, Any] = {"channel": MLPConfig(expansion=2), "remat": False}
    return ModelConfig(1, width, groups, **(settings | options))


def psm(
    width: int,
    *,
    chunk: int,
    aggregator: int = 1,
    inference: int = 1,
    heads: int = 4,
    causal_aggregator: bool = False,
    bare: bool = False,
) -> ModelConfig:
    """Transformer-PSM (arXiv 2506.10918): so many layers in the aggregator and in the inference, without positions
    beyond those inside (prefix, chunk). `bare`: without these too, and without MLPs."""
    attention = AttentionConfig(heads=heads, positions=Positions.NOPE if bare else Positions.ROPE)
    layer = attention if bare else Block(attention, MLPConfig(expansion=2))
    scan = PrefixScan(
        aggregator=(((layer,), aggregator),),
        inference=(((layer,), inference),),
        chunk=chunk,
        causal_aggregator=causal_aggregator,
    )
    return ModelConfig(1, width, (((scan,), 1),), remat=False)


def after_pairs(model: ModelConfig) -> ModelConfig:
    """The model behind a layer of attention over two tokens, which does what a short convolution would."""
    return dataclasses.replace(model, layers=(((AttentionConfig(heads=2, window=2),), 1), *model.layers))
