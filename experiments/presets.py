"""Experiments by name. Each function says its command, its size and what to expect of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from seqmodels.layers.mlp import MLPConfig
from seqmodels.layers.stack import LayerGroups
from seqmodels.mixers import AttentionConfig, Mamba2Config, RGLRUConfig
from seqmodels.models.lm import ModelConfig
from seqmodels.train.config import TrainConfig

BYTES = 257  # seqmodels.data.VOCAB_SIZE, whose module takes half a second to import


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text. `source`: "cpython", a file or folder, or the name of a data set below SEQMODELS_DATA."""

    source: str = "cpython"
    heldout_bytes: int | None = None  # evaluate on whole held-out documents up to this many bytes in all; None: on all


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A model, how it is trained, and on what."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig


def _model(layers: LayerGroups, width: int = 128) -> ModelConfig:
    return ModelConfig(BYTES, width, layers, channel=MLPConfig(), remat=False)


def demo() -> Experiment:
    """A Griffin-like hybrid on the text inside CPython, in minutes on two cores.

    Command: python -m experiments.train demo
    """
    recurrent, local = RGLRUConfig(), AttentionConfig(heads=4, kv_heads=1, window=64)
    return Experiment(
        _model((((recurrent, recurrent, local), 1),)),
        TrainConfig(steps=600, batch_size=16, length=256, learning_rate=4e-3, warmup=30, log_every=20),
        DataConfig(heldout_bytes=100_000),
    )


PRESETS: dict[str, Callable[[], Experiment]] = {function.__name__: function for function in (demo,)}
