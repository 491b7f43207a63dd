"""Experiments by name. Each function says its command, its size and what to expect of it.

What to expect was measured on two cores with the text of CPython 3.11.7; that of other versions is a little different.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from seqmodels.layers.mlp import MLPConfig
from seqmodels.layers.moe import MoEConfig
from seqmodels.layers.norms import NormConfig, NormKind
from seqmodels.layers.rwkv_channel import RWKVChannelConfig
from seqmodels.layers.stack import Block
from seqmodels.mixers import (
    AttentionConfig,
    DeltaNetConfig,
    DeltaProductConfig,
    GatedDeltaNetConfig,
    GatedRFAConfig,
    GatedRNNConfig,
    GLAConfig,
    GRUConfig,
    HGRN2Config,
    KDAConfig,
    LinearAttentionConfig,
    LogLinearMamba2Config,
    LRUConfig,
    LSTMConfig,
    Mamba1Config,
    Mamba2Config,
    Mamba3Config,
    MinGRUConfig,
    MinLSTMConfig,
    MLSTMConfig,
    PrefixScan,
    RetNetConfig,
    RGLRUConfig,
    RWKV4Config,
    RWKV6Config,
    RWKV7Config,
    S4Config,
    S4DConfig,
    S5Config,
    SLSTMConfig,
)
from seqmodels.models import published
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


def _small(pattern: tuple[MixerConfig, ...], width: int, repeats: int = 1, **options: Any) -> ModelConfig:
    # no remat: such models fit into memory as they are, and recomputing costs a quarter of the speed
    options = {"channel": MLPConfig(expansion=2), "remat": False} | options
    return ModelConfig(BYTES, width, ((pattern, repeats),), **options)


def _recurrent(width: int) -> RGLRUConfig:
    # one block: on CPUs few large products are faster than many small ones
    return RGLRUConfig(recurrent_size=width, blocks=1)


_LOCAL = AttentionConfig(heads=2, kv_heads=1, window=32)
_GATED = AttentionConfig(
    heads=2, kv_heads=1, rope_fraction=0.25, query_key_norm=NormConfig(zero_centred=True), output_gate=True
)
_MINUTES = TrainConfig(
    steps=1600, batch_size=8, length=256, learning_rate=6e-3, warmup=30, weight_decay=0.05, log_every=50
)


def demo() -> Experiment:
    """A Griffin-like 2:1 hybrid on the text inside CPython, in minutes on two cores.

    Command: python -m experiments.train demo
    Size: 0.31 M parameters, 3.3 M tokens.
    Expect: 1.93 bits per byte held out (unigram 4.70, bigram 3.57, xz 2.69) after three to four minutes.
    """
    return Experiment(_small((_recurrent(96), _recurrent(96), _LOCAL), 96), _MINUTES, DataConfig())


def griffin() -> Experiment:
    """Two periods of Griffin's layers (RG-LRU, RG-LRU, sliding attention; gated MLPs, biases), wider than the demo.

    Command: python -m experiments.train griffin
    Size: 1.24 M parameters, 3.3 M tokens.
    Expect: not measured yet.
    """
    slower = dataclasses.replace(_MINUTES, learning_rate=4e-3, warmup=100)
    local = dataclasses.replace(_LOCAL, rope_fraction=0.5)
    return Experiment(_small((_UNIT, _UNIT, local), 128, 2, channel=MLPConfig(bias=True)), slower, DataConfig())


class Alone(NamedTuple):
    """One mixer alone, three layers deep and 96 wide, trained like the demo."""

    about: str
    mixer: MixerConfig
    parameters: str  # in millions; tests count them
    bits: str | None = None  # per byte held out, as measured; None: not measured yet
    options: Mapping[str, Any] = {}  # of the model


def _rwkv(version: int) -> dict[str, Any]:
    norm = NormConfig(NormKind.LAYER, eps=1e-5)
    return {"channel": RWKVChannelConfig(version=version, hidden_size=288), "norm": norm, "embedding_norm": True}


ALONE = {
    "attention": Alone(
        "Full causal attention with rotary positions", AttentionConfig(heads=2, kv_heads=1), "0.27", "2.12"
    ),
    "sliding_attention": Alone("Sliding-window attention over 32 keys with rotary positions", _LOCAL, "0.27", "2.07"),
    "gated_attention": Alone(
        "Attention with normed queries and keys and an output gate, as in Qwen3-Next", _GATED, "0.30"
    ),
    "rg_lru": Alone("Griffin's recurrent block (RG-LRU)", _recurrent(96), "0.33", "1.92"),
    "mamba2": Alone("Mamba-2", Mamba2Config(head_size=32, state_size=32), "0.38"),
    "gla": Alone("Gated linear attention", GLAConfig(heads=2), "0.31", "1.92"),
    "gated_deltanet": Alone("Gated DeltaNet, with eigenvalues in [0, 1]", GatedDeltaNetConfig(heads=3), "0.36", "1.84"),
    "mlstm": Alone("mLSTM, the block of xLSTM-7B", MLSTMConfig(heads=2), "0.30", "1.94"),
    "slstm": Alone("sLSTM: one token after the other, with memory mixing", SLSTMConfig(heads=4), "0.25", "1.84"),
    "mamba1": Alone("Mamba-1", Mamba1Config(), "0.40"),
    "mamba3": Alone("Mamba-3, one value a step (SISO)", Mamba3Config(head_size=32, state_size=32), "0.38"),
    "linear_attention": Alone("Linear attention with the features elu + 1", LinearAttentionConfig(heads=2), "0.30"),
    "retnet": Alone("RetNet's multi-scale retention", RetNetConfig(heads=2, expand_value=1.0), "0.33"),
    "gated_rfa": Alone("Gated random feature attention", GatedRFAConfig(heads=2, features=48), "0.30"),
    "hgrn2": Alone("HGRN2, its decays bounded from below, more so in later layers", HGRN2Config(head_size=48), "0.30"),
    "rwkv4": Alone("RWKV-4 with its channel mix", RWKV4Config(), "0.33", options=_rwkv(4)),
    "rwkv6": Alone(
        "RWKV-6 with its channel mix",
        RWKV6Config(head_size=32, mix_rank=16, decay_rank=16),
        "0.42",
        options=_rwkv(6),
    ),
    "rwkv7": Alone(
        "RWKV-7 with its channel mix",
        RWKV7Config(head_size=32, decay_rank=16, rate_rank=16, value_rank=16, gate_rank=16),
        "0.34",
        options=_rwkv(7),
    ),
    "deltanet": Alone("DeltaNet, with eigenvalues in [0, 1]", DeltaNetConfig(heads=3), "0.31"),
    "deltaproduct": Alone(
        "DeltaProduct of two steps a token, with eigenvalues in [-1, 1]",
        DeltaProductConfig(heads=3, expand_value=0.75),
        "0.34",
    ),
    "kda": Alone("Kimi Delta Attention", KDAConfig(heads=3), "0.34"),
    "log_linear": Alone(
        "Log-linear Mamba-2, whose state grows with the logarithm of the length",
        LogLinearMamba2Config(head_size=32, state_size=32, levels=10),
        "0.40",
    ),
    "lstm": Alone("LSTM: one token after the other", LSTMConfig(), "0.41"),
    "gru": Alone("GRU: one token after the other", GRUConfig(), "0.36"),
    "mingru": Alone("minGRU", MinGRUConfig(), "0.27"),
    "minlstm": Alone("minLSTM", MinLSTMConfig(), "0.30"),
    "gated_rnn": Alone("The element-wise gated RNN", GatedRNNConfig(), "0.30"),
    "s4": Alone("S4, diagonal plus low rank", S4Config(state_size=32), "0.26"),
    "s4d": Alone("S4D from HiPPO-LegS", S4DConfig(state_size=32), "0.27"),
    "s5": Alone("S5", S5Config(state_size=96), "0.28"),
    "lru": Alone("The linear recurrent unit", LRUConfig(state_size=96), "0.36"),
}


class Whole(NamedTuple):
    """A small version of a published model, or of a channel layer within one, trained like the demo."""

    about: str
    model: ModelConfig
    parameters: str
    bits: str | None = None


def _griffin_blocks(repeats: int, *pattern: MixerConfig, **options: Any) -> ModelConfig:
    return _small(pattern, 96, repeats, **({"channel": MLPConfig(bias=True)} | options))


_UNIT, _DELTA = (
    RGLRUConfig(recurrent_size=128, bias=True),
    GatedDeltaNetConfig(heads=2, value_heads=4, key_size=24, value_size=24),
)
WHOLE = {
    "hawk": Whole("Hawk: RG-LRU blocks and gated MLPs with biases", _griffin_blocks(3, _UNIT), "0.40"),
    "recurrent_gemma": Whole(
        "RecurrentGemma: Griffin's layers with scaled embeddings, zero-centred norms and capped logits",
        _griffin_blocks(
            1,
            dataclasses.replace(_UNIT, recurrent_size=96),
            dataclasses.replace(_UNIT, recurrent_size=96),
            dataclasses.replace(_LOCAL, rope_fraction=0.5, output_bias=True),
            embed_scale=True,
            logits_cap=30.0,
            norm=NormConfig(zero_centred=True),
        ),
        "0.37",
    ),
    "falcon_mamba": Whole(
        "FalconMamba: Mamba-1 with norms of step sizes, B and C, no MLPs, a head of its own",
        _small((Mamba1Config(norm_bcdt_eps=1e-6),), 96, 5, channel=None, tied=False, norm=NormConfig(eps=1e-5)),
        "0.39",
    ),
    "xlstm_7_1": Whole(
        "xLSTM[7:1] of the first publication: eight blocks, an sLSTM in the fourth place",
        published.xlstm(8, 64, BYTES, slstm_at=(3,), remat=False),
        "0.28",
    ),
    "xlstm_7b": Whole(
        "xLSTM-7B's block three times: mLSTM and SwiGLU, capped logits",
        published.xlstm_7b(3, 96, BYTES, heads=2, remat=False),
        "0.44",
    ),
    "qwen3_next": Whole(
        "Qwen3-Next: gated DeltaNet three times, gated attention once, each with a mixture of eight experts",
        _small(
            (_DELTA, _DELTA, _DELTA, _GATED),
            96,
            channel=MoEConfig(hidden_size=48, shared_hidden_size=48, balance=0.001),
            tied=False,
            norm=NormConfig(zero_centred=True),
        ),
        "0.70",
    ),
    "moe": Whole(
        "Mamba-2 with mixtures of eight experts, of which a token goes through two and through one that all share",
        _small((ALONE["mamba2"].mixer,) * 3, 96, channel=MoEConfig(hidden_size=96, shared_hidden_size=96)),
        "0.96",
    ),
}


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


def _preset(name: str, whole: Whole) -> Callable[[], Experiment]:
    """A preset with its command, size and expectation as its docstring."""

    def preset() -> Experiment:
        return Experiment(whole.model, _MINUTES, DataConfig())

    expected = "not measured yet" if whole.bits is None else f"{whole.bits} bits per byte held out"
    preset.__name__ = preset.__qualname__ = name
    preset.__doc__ = f"""{whole.about}.

    Command: python -m experiments.train {name}
    Size: {whole.parameters} M parameters, 3.3 M tokens.
    Expect: {expected}.
    """
    return preset


def _whole(alone: Alone) -> Whole:
    model = _small((alone.mixer,) * 3, 96, **alone.options)
    return Whole(f"{alone.about}, alone", model, alone.parameters, alone.bits)


_TABLE = {name: _whole(alone) for name, alone in ALONE.items()} | WHOLE
_PRESETS = (demo, griffin, *(_preset(name, whole) for name, whole in _TABLE.items()), psm)
PRESETS: dict[str, Callable[[], Experiment]] = {preset.__name__: preset for preset in _PRESETS}
