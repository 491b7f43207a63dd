"""Published models by name: the layers and sizes of Griffin, Hawk and xLSTM as configs to train from scratch.

Weights that others published are read by `seqmodels.hf`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from seqmodels.layers.mlp import Activation, MLPConfig
from seqmodels.layers.norms import NormConfig, NormKind
from seqmodels.layers.stack import Block, Element, LayerGroups
from seqmodels.mixers.attention import AttentionConfig
from seqmodels.mixers.mlstm import MLSTMConfig
from seqmodels.mixers.rg_lru import RGLRUConfig
from seqmodels.mixers.slstm import SLSTMConfig
from seqmodels.models.lm import ModelConfig


class GriffinSize(NamedTuple):
    width: int
    recurrent: int
    layers: int


# Table 2 of the paper; heads of local attention have 128 channels.
GRIFFIN = {
    "100M": GriffinSize(768, 1024, 12),
    "200M": GriffinSize(1024, 1536, 12),
    "400M": GriffinSize(1536, 2048, 12),
    "1.3B": GriffinSize(2048, 2560, 24),
    "3B": GriffinSize(3072, 4096, 24),
    "7B": GriffinSize(4096, 5632, 32),
    "14B": GriffinSize(5120, 8192, 40),
}


def griffin(size: str, vocab_size: int, **changes: Any) -> ModelConfig:
    """Griffin (arXiv 2402.19427): two recurrent blocks, one of local attention, each followed by a gated MLP."""
    width, recurrent = _griffin_size(size)[:2]
    local = AttentionConfig(heads=width // 128, kv_heads=1, head_size=128, window=1024, rope_fraction=0.5)
    unit = RGLRUConfig(recurrent_size=recurrent, blocks=16, bias=True)
    return _griffin_like((unit, unit, local), size, vocab_size, changes)


def hawk(size: str, vocab_size: int, **changes: Any) -> ModelConfig:
    """Hawk (arXiv 2402.19427): recurrent blocks alone, at Griffin's sizes."""
    unit = RGLRUConfig(recurrent_size=_griffin_size(size).recurrent, blocks=16, bias=True)
    return _griffin_like((unit,), size, vocab_size, changes)


def _griffin_size(size: str) -> GriffinSize:
    if size not in GRIFFIN:
        raise ValueError(f"no published size {size!r}; choose one of {', '.join(GRIFFIN)}")
    return GRIFFIN[size]


def _griffin_like(pattern: tuple[Element, ...], size: str, vocab_size: int, changes: dict[str, Any]) -> ModelConfig:
    width, _, layers = GRIFFIN[size]
    whole, rest = divmod(layers, len(pattern))
    groups: LayerGroups = ((pattern, whole), *(((pattern[:rest], 1),) if rest else ()))
    return ModelConfig(vocab_size, width, groups, **({"channel": MLPConfig(expansion=3, bias=True)} | changes))


def xlstm(
    blocks: int,
    width: int,
    vocab_size: int,
    *,
    slstm_at: Sequence[int] = (),
    heads: int = 4,
    **changes: Any,
) -> ModelConfig:
    """xLSTM as first published (arXiv 2405.04517): mLSTM blocks, and sLSTM blocks at the places `slstm_at`, from 0.

    xLSTM[1:0] has none. The paper's xLSTM[7:1] has them at 3, 5, 7, 40, 42, 44 of 48 blocks, and at 3, 20 of 24. An
    sLSTM is followed by a gated MLP of factor 1.3 (the code's; the text has 4/3), rounded up to a multiple of 64; an
    mLSTM has its own projections.
    """
    places = set(slstm_at)
    if not places <= set(range(blocks)):
        raise ValueError(f"slstm_at={sorted(places)} names a place beyond the {blocks} blocks, which count from 0")
    mlp = MLPConfig(hidden_size=64 * math.ceil(1.3 * width / 64))
    scalar, matrix = Block(SLSTMConfig(heads=heads), mlp), MLSTMConfig.original(heads=heads)
    norm = NormConfig(NormKind.LAYER, eps=1e-5, bias=False)
    layers = runs([scalar if place in places else matrix for place in range(blocks)])
    published: dict[str, Any] = {"norm": norm, "tied": False}
    return ModelConfig(vocab_size, width, layers, **(published | changes))


def xlstm_7b(
    blocks: int = 32, width: int = 4096, vocab_size: int = 50_304, *, heads: int = 8, **changes: Any
) -> ModelConfig:
    """xLSTM-7B (arXiv 2503.13427): mLSTM without convolution, each followed by a SwiGLU; smaller with other sizes."""
    mlp = MLPConfig(activation=Activation.SILU, hidden_size=64 * math.ceil(2.667 * width / 64))
    layers = (((Block(MLSTMConfig(heads=heads), mlp),), blocks),)
    return ModelConfig(vocab_size, width, layers, **({"tied": False, "logits_cap": 30.0} | changes))


def runs(elements: Sequence[Element]) -> LayerGroups:
    """Layer groups from one pattern element a layer: equal neighbours become one group."""
    return tuple(((element,), len(list(same))) for element, same in itertools.groupby(elements))
