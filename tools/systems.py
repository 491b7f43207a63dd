"""The systems of README.md's two tables: mixers alone, and models and channel layers made of them."""

from __future__ import annotations

from typing import NamedTuple

from seqmodels.layers import MoEConfig, NormConfig, RWKVChannelConfig
from seqmodels.layers.stack import Block, Element, LayerGroups
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
from seqmodels.typing import MixerConfig

WIDTH = 256


class System(NamedTuple):
    """A row. `preset` is the name in `examples()` too; `published`: architectures of `seqmodels.hf` that have it."""

    preset: str
    name: str
    note: str
    papers: str
    config: MixerConfig
    published: str = ""
    runs: str = ""  # how time runs, where the config leaves no choice


class Model(NamedTuple):
    """A row of the second table. `file` defines it; `layers`: what its state's bytes and its errors are those of."""

    presets: str
    name: str
    note: str
    papers: str
    file: str
    layers: LayerGroups
    published: str = ""


_HEADS = AttentionConfig(heads=4)
_PAIR = (((_HEADS,), 1),)

SYSTEMS = (
    System("lstm", "LSTM", "", "1997: Hochreiter, Schmidhuber", LSTMConfig()),
    System("gru", "GRU", "", "1406.1078", GRUConfig()),
    System("slstm", "sLSTM", "memory mixing", "2405.04517", SLSTMConfig()),
    System("mingru", "minGRU", "", "2410.01201", MinGRUConfig()),
    System("minlstm", "minLSTM", "", "2410.01201", MinLSTMConfig()),
    System("gated_rnn", "gated RNN", "element by element, as QRNN", "1611.01576", GatedRNNConfig()),
    System("s4", "S4", "diagonal plus low rank", "2111.00396", S4Config()),
    System("s4d", "S4D", "starts Lin, Inv, LegS", "2206.11893", S4DConfig()),
    System("s5", "S5", "gaps between samples", "2208.04933", S5Config()),
    System("lru", "LRU", "online gradients", "2303.06349", LRUConfig()),
    System("rg_lru", "RG-LRU", "Griffin's recurrent block", "2402.19427", RGLRUConfig(), "recurrent_gemma"),
    System("mamba1", "Mamba-1", "", "2312.00752", Mamba1Config(), "mamba falcon_mamba"),
    System("mamba2", "Mamba-2", "with groups", "2405.21060", Mamba2Config(), "mamba2"),
    System("mamba3", "Mamba-3", "SISO and MIMO", "2603.15569", Mamba3Config()),
    System("log_linear", "log-linear Mamba-2", "", "2506.04761", LogLinearMamba2Config()),
    System("linear_attention", "linear attention", "", "2006.16236", LinearAttentionConfig()),
    System("retnet", "RetNet", "", "2307.08621", RetNetConfig()),
    System("gated_rfa", "gated RFA", "", "2103.02143", GatedRFAConfig()),
    System("gla", "GLA", "", "2312.06635", GLAConfig()),
    System("hgrn2", "HGRN2", "bounds over depth", "2404.07904", HGRN2Config()),
    System("rwkv4", "RWKV-4", "", "2305.13048", RWKV4Config(), "rwkv"),
    System("rwkv6", "RWKV-6", "", "2404.05892", RWKV6Config()),
    System("rwkv7", "RWKV-7", "", "2503.14456", RWKV7Config()),
    System("deltanet", "DeltaNet", "eigenvalues down to -1", "2406.06484 2411.12537", DeltaNetConfig()),
    System(
        "gated_deltanet",
        "gated DeltaNet",
        "eigenvalues down to -1",
        "2412.06464 2411.12537",
        GatedDeltaNetConfig(),
        "qwen3_next",
    ),
    System("deltaproduct", "DeltaProduct", "", "2502.10297", DeltaProductConfig()),
    System("kda", "Kimi Delta Attention", "", "2510.26692", KDAConfig()),
    System("mlstm", "mLSTM", "xLSTM-7B's block or the first one", "2405.04517 2503.13427", MLSTMConfig(), "xlstm"),
    System(
        "psm",
        "Transformer-PSM",
        "any aggregator",
        "2506.10918",
        PrefixScan(aggregator=_PAIR, inference=_PAIR, chunk=16),
        runs="static tree; counter token by token",
    ),
    System(
        "attention",
        "attention",
        "GQA, gates, RoPE, NoPE, ALiBi",
        "1706.03762",
        _HEADS,
        "qwen3_next",
        "blocks of queries; a ring over devices",
    ),
    System(
        "sliding_attention",
        "sliding attention",
        "a ring buffer",
        "2004.05150",
        AttentionConfig(heads=4, window=256),
        "recurrent_gemma",
        "blocks of queries and keys; a ring as far as the window",
    ),
)


_R = RGLRUConfig(recurrent_size=WIDTH, bias=True)
_LOCAL = AttentionConfig(heads=2, kv_heads=1, window=256, rope_fraction=0.5)
_GATED = AttentionConfig(
    heads=4, kv_heads=1, rope_fraction=0.25, query_key_norm=NormConfig(zero_centred=True), output_gate=True
)
_FALCON = Mamba1Config(norm_bcdt_eps=1e-6)
_D = GatedDeltaNetConfig(heads=2, value_heads=4, key_size=64, value_size=64)
_EXPERTS = MoEConfig(shared_hidden_size=WIDTH)
_PUBLISHED, _GEMMA, _QWEN = "models/published.py", "hf/recurrent_gemma.py", "hf/qwen3_next.py"


def _one(*pattern: Element) -> LayerGroups:
    return ((pattern, 1),)


MODELS = (
    Model("griffin", "Griffin", "RG-LRU twice, sliding attention", "2402.19427", _PUBLISHED, _one(_R, _R, _LOCAL)),
    Model("hawk", "Hawk", "RG-LRU", "2402.19427", _PUBLISHED, _one(_R)),
    Model(
        "recurrent_gemma",
        "RecurrentGemma",
        "Griffin's layers, scaled embeddings, capped logits",
        "2404.07839",
        _GEMMA,
        _one(_R, _R, _LOCAL),
        "recurrent_gemma",
    ),
    Model(
        "falcon_mamba",
        "FalconMamba",
        "Mamba-1 with norms of dt, B, C",
        "2410.05355",
        "hf/mamba.py",
        _one(_FALCON),
        "falcon_mamba",
    ),
    Model(
        "xlstm_7_1",
        "xLSTM[a:b]",
        "here one mLSTM of the first publication, one sLSTM",
        "2405.04517",
        _PUBLISHED,
        _one(MLSTMConfig.original(), SLSTMConfig()),
    ),
    Model("xlstm_7b", "xLSTM-7B", "mLSTM", "2503.13427", _PUBLISHED, _one(MLSTMConfig()), "xlstm"),
    Model(
        "gated_attention",
        "gated attention",
        "as in Qwen3-Next",
        "2505.06708",
        "mixers/attention.py",
        _one(_GATED),
        "qwen3_next",
    ),
    Model(
        "qwen3_next",
        "Qwen3-Next",
        "gated DeltaNet three times, gated attention, experts after each",
        "2412.06464 2505.06708",
        _QWEN,
        _one(*(Block(mixer, _EXPERTS) for mixer in (_D, _D, _D, _GATED))),
        "qwen3_next",
    ),
    Model(
        "moe",
        "mixture of experts",
        "dropless, with a shared expert",
        "2101.03961 2401.04088",
        "layers/moe.py",
        _one(_EXPERTS),
        "qwen3_next",
    ),
    Model(
        "rwkv4 rwkv6 rwkv7",
        "RWKV channel mix",
        "versions 4, 6, 7",
        "2305.13048 2404.05892 2503.14456",
        "layers/rwkv_channel.py",
        _one(RWKVChannelConfig()),
        "rwkv",
    ),
)
