"""One tiny model, its text and its batches, shared by the tests of training and generation."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from seqmodels.data import VOCAB_SIZE, Document, make_loader
from seqmodels.layers import MLPConfig
from seqmodels.mixers import AttentionConfig, RGLRUConfig
from seqmodels.models.lm import LanguageModel, ModelConfig
from seqmodels.train import TrainConfig

LENGTH = 16
BATCH = 4
LOCAL = AttentionConfig(heads=2, kv_heads=1, window=4)
FULL = AttentionConfig(heads=2, kv_heads=1)
RECURRENT = RGLRUConfig(recurrent_size=16, blocks=2)


@functools.cache
def tiny_model(*mixers: Any, seed: int = 0, **settings: Any) -> LanguageModel:
    """A model of width 16, sliding attention by default."""
    layers = ((mixers or (LOCAL,), 1),)
    settings = {"channel": MLPConfig(expansion=1), "remat": False, **settings}
    return ModelConfig(VOCAB_SIZE, 16, layers, **settings).make(rngs=nnx.Rngs(seed))


def texts(count: int = 12, seed: int = 0) -> list[Document]:
    """Short texts of few letters, one of them empty, one longer than a row."""
    random = np.random.default_rng(seed)
    sizes = [0, 3 * LENGTH, *random.integers(1, LENGTH, count - 2)]
    text = lambda size: bytes(random.choice(list(b"ab "), size).tolist())
    return [Document(f"{index:02d}", text(size)) for index, size in enumerate(sizes)]


def tiny_config(**changes: Any) -> TrainConfig:
    settings = {"steps": 12, "batch_size": BATCH, "length": LENGTH, "warmup": 2, "log_every": 1, "checkpoint_every": 4}
    return TrainConfig(**{**settings, **changes})


def loader(seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    return make_loader(texts(), batch_size=BATCH, length=LENGTH, seed=seed)
