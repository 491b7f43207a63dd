"""Experiments by name. Each function says its command, its size and what to expect of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from seqmodels.layers.mlp import MLPConfig
from seqmodels.mixers import AttentionConfig, Mamba2Config, RGLRUConfig
from seqmodels.models.lm import ModelConfig
from seqmodels.train.config import TrainConfig
from seqmodels.typing import MixerConfig

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


def _small(*pattern: MixerConfig, repeats: int = 1) -> ModelConfig:
    # no remat: such models fit into memory as they are, and recomputing costs a quarter of the speed
    return ModelConfig(BYTES, 128, ((pattern, repeats),), channel=MLPConfig(), remat=False)


_SINGLE = TrainConfig(steps=500, learning_rate=6e-3, warmup=30, weight_decay=0.05, log_every=20)
_LONGER = dataclasses.replace(_SINGLE, steps=2000, learning_rate=4e-3, warmup=100)
_PART = DataConfig(heldout_bytes=100_000)
# One block and two heads: on CPUs few large products are faster than many small ones.
_RECURRENT = RGLRUConfig(recurrent_size=128, blocks=1)
_LOCAL = AttentionConfig(heads=2, kv_heads=1, window=64)


def demo() -> Experiment:
    """A Griffin-like 2:1 hybrid on the text inside CPython, in minutes on two cores.

    Command: python -m experiments.train demo
    Size: 0.69 M parameters, 2.0 M tokens.
    Expect: TODO
    """
    return Experiment(
        _small(_RECURRENT, _RECURRENT, _LOCAL),
        _SINGLE,
        _PART,
    )


def griffin() -> Experiment:
    """Two periods of Griffin's 2:1 hybrid (RG-LRU, RG-LRU, sliding attention), trained longer.

    Command: python -m experiments.train griffin
    Size: 1.35 M parameters, 8.2 M tokens.
    Expect: TODO
    """
    return Experiment(_small(_RECURRENT, _RECURRENT, _LOCAL, repeats=2), _LONGER, DataConfig())


def attention() -> Experiment:
    """Full causal attention with rotary positions.

    Command: python -m experiments.train attention
    Size: 0.62 M parameters, 2.0 M tokens.
    Expect: TODO
    """
    return Experiment(_small(AttentionConfig(heads=2, kv_heads=1), repeats=3), _SINGLE, _PART)


def sliding_attention() -> Experiment:
    """Sliding-window attention, 64 keys, with rotary positions.

    Command: python -m experiments.train sliding_attention
    Size: 0.62 M parameters, 2.0 M tokens.
    Expect: TODO
    """
    return Experiment(_small(_LOCAL, repeats=3), _SINGLE, _PART)


def rg_lru() -> Experiment:
    """Griffin's recurrent block alone.

    Command: python -m experiments.train rg_lru
    Size: 0.72 M parameters, 2.0 M tokens.
    Expect: TODO
    """
    return Experiment(_small(_RECURRENT, repeats=3), _SINGLE, _PART)


def mamba2() -> Experiment:
    """Mamba-2 layers alone, with MLPs between them.

    Command: python -m experiments.train mamba2
    Size: 0.80 M parameters, 2.0 M tokens.
    Expect: TODO
    """
    return Experiment(_small(Mamba2Config(head_size=32, state_size=32), repeats=3), _SINGLE, _PART)


_PRESETS = (demo, griffin, attention, sliding_attention, rg_lru, mamba2)
PRESETS: dict[str, Callable[[], Experiment]] = {preset.__name__: preset for preset in _PRESETS}
