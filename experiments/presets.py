"""Experiments by name. Each function says its command, its size and what to expect of it.

What to expect was measured on two cores with the text of CPython 3.11.7; that of other versions is a little different.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from seqmodels.layers.mlp import MLPConfig
from seqmodels.layers.stack import Block
from seqmodels.mixers import (
    AttentionConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    Mamba2Config,
    MLSTMConfig,
    PrefixScan,
    RGLRUConfig,
    SLSTMConfig,
)
from seqmodels.models.lm import ModelConfig
from seqmodels.train.config import TrainConfig
from seqmodels.typing import ChannelConfig, MixerConfig

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


def _hybrid(width: int, repeats: int) -> ModelConfig:
    return _small((_recurrent(width), _recurrent(width), _LOCAL), width, repeats)


_MLP = MLPConfig(expansion=2)


def _small(
    pattern: tuple[MixerConfig, ...], width: int, repeats: int = 1, *, channel: ChannelConfig = _MLP
) -> ModelConfig:
    # no remat: such models fit into memory as they are, and recomputing costs a quarter of the speed
    return ModelConfig(BYTES, width, ((pattern, repeats),), channel=channel, remat=False)


def _recurrent(width: int) -> RGLRUConfig:
    # one block: on CPUs few large products are faster than many small ones
    return RGLRUConfig(recurrent_size=width, blocks=1)


_LOCAL = AttentionConfig(heads=2, kv_heads=1, window=32)
_MINUTES = TrainConfig(
    steps=1600, batch_size=8, length=256, learning_rate=6e-3, warmup=30, weight_decay=0.05, log_every=50
)


def demo() -> Experiment:
    """A Griffin-like 2:1 hybrid on the text inside CPython, in minutes on two cores.

    Command: python -m experiments.train demo
    Size: 0.31 M parameters, 3.3 M tokens.
    Expect: 1.93 bits per byte held out (unigram 4.70, bigram 3.57, xz 2.69) after three to four minutes.
    """
    return Experiment(_hybrid(96, repeats=1), _MINUTES, DataConfig())


def griffin() -> Experiment:
    """Two periods of Griffin's 2:1 hybrid (RG-LRU, RG-LRU, sliding attention), and wider.

    Command: python -m experiments.train griffin
    Size: 1.05 M parameters, 3.3 M tokens.
    Expect: 1.80 bits per byte held out.
    """
    slower = dataclasses.replace(_MINUTES, learning_rate=4e-3, warmup=100)
    return Experiment(_hybrid(128, repeats=2), slower, DataConfig())


class Alone(NamedTuple):
    """One mixer alone, three layers deep and 96 wide, trained like the demo."""

    about: str
    mixer: MixerConfig
    parameters: str  # in millions; tests count them
    bits: str | None  # per byte held out, as measured; None: not measured yet
    channel: ChannelConfig = _MLP


ALONE = {
    "attention": Alone(
        "Full causal attention with rotary positions", AttentionConfig(heads=2, kv_heads=1), "0.27", "2.12"
    ),
    "sliding_attention": Alone("Sliding-window attention over 32 keys with rotary positions", _LOCAL, "0.27", "2.07"),
    "rg_lru": Alone("Griffin's recurrent block (RG-LRU)", _recurrent(96), "0.33", "1.92"),
    "mamba2": Alone("Mamba-2", Mamba2Config(head_size=32, state_size=32), "0.38", "1.80"),
    "gla": Alone("Gated linear attention", GLAConfig(heads=2), "0.31", "1.92"),
    "gated_deltanet": Alone("Gated DeltaNet, with eigenvalues in [0, 1]", GatedDeltaNetConfig(heads=3), "0.36", "1.84"),
    "mlstm": Alone("mLSTM, the block of xLSTM-7B", MLSTMConfig(heads=2), "0.30", "1.94"),
    "slstm": Alone("sLSTM: one token after the other, with memory mixing", SLSTMConfig(heads=4), "0.25", "1.84"),
}


def _preset(name: str, alone: Alone) -> Callable[[], Experiment]:
    """The preset of one mixer, with its command, size and expectation as its docstring."""

    def preset() -> Experiment:
        return Experiment(_small((alone.mixer,) * 3, 96, channel=alone.channel), _MINUTES, DataConfig())

    expected = "not measured yet" if alone.bits is None else f"{alone.bits} bits per byte held out"
    preset.__name__ = preset.__qualname__ = name
    preset.__doc__ = f"""{alone.about}, alone.

    Command: python -m experiments.train {name}
    Size: {alone.parameters} M parameters, 3.3 M tokens.
    Expect: {expected}.
    """
    return preset


def psm() -> Experiment:
    """Transformer-PSM: prefixes of chunks of 16 bytes from a tree, read by attention within (prefix, chunk).

    Command: python -m experiments.train psm
    Size: 0.27 M parameters, 3.3 M tokens.
    Expect: 2.06 bits per byte held out, in pieces of 256 bytes (documents have to start at multiples of the chunk).
    """
    mix = Block(AttentionConfig(heads=2, kv_heads=1), MLPConfig(expansion=2))
    scan = PrefixScan(aggregator=(((mix,), 1),), inference=(((mix,), 2),), chunk=16)
    model = ModelConfig(BYTES, 96, (((scan,), 1),), remat=False)
    return Experiment(model, _MINUTES, DataConfig())


_PRESETS = (demo, griffin, *(_preset(name, alone) for name, alone in ALONE.items()), psm)
PRESETS: dict[str, Callable[[], Experiment]] = {preset.__name__: preset for preset in _PRESETS}
