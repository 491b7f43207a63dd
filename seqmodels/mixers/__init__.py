"""Mixers along time, one file each, and a small instance of every one of them."""

from collections.abc import Iterator

from seqmodels.layers.gated_output import Output
from seqmodels.layers.hippo import Discretization, Start
from seqmodels.mixers.attention import AttentionConfig
from seqmodels.mixers.deltanet import DeltaNetConfig
from seqmodels.mixers.deltaproduct import DeltaProductConfig
from seqmodels.mixers.gated_deltanet import Eigenvalues, GatedDeltaNetConfig
from seqmodels.mixers.gated_rfa import GatedRFAConfig
from seqmodels.mixers.gated_rnn import GatedRNNConfig
from seqmodels.mixers.gla import GLAConfig
from seqmodels.mixers.gru import GRUConfig
from seqmodels.mixers.hgrn2 import HGRN2Config
from seqmodels.mixers.kda import KDAConfig
from seqmodels.mixers.linear_attention import FeatureMap, LinearAttentionConfig
from seqmodels.mixers.log_linear import LogLinearMamba2Config
from seqmodels.mixers.lru import LRUConfig
from seqmodels.mixers.lstm import LSTMConfig
from seqmodels.mixers.mamba1 import Mamba1Config
from seqmodels.mixers.mamba2 import Mamba2Config
from seqmodels.mixers.mamba3 import Mamba3Config
from seqmodels.mixers.mingru import MinGRUConfig
from seqmodels.mixers.minlstm import MinLSTMConfig
from seqmodels.mixers.mlstm import MLSTMConfig
from seqmodels.mixers.psm import PrefixScan
from seqmodels.mixers.retnet import RetNetConfig
from seqmodels.mixers.rg_lru import RGLRUConfig
from seqmodels.mixers.rwkv4 import RWKV4Config
from seqmodels.mixers.rwkv6 import RWKV6Config
from seqmodels.mixers.rwkv7 import RWKV7Config
from seqmodels.mixers.s4 import S4Config
from seqmodels.mixers.s4d import S4DConfig
from seqmodels.mixers.s5 import ELAPSED, S5Config
from seqmodels.mixers.slstm import SLSTMConfig
from seqmodels.typing import MixerConfig

__all__ = [
    "ELAPSED",
    "AttentionConfig",
    "DeltaNetConfig",
    "DeltaProductConfig",
    "Discretization",
    "Eigenvalues",
    "FeatureMap",
    "GLAConfig",
    "GRUConfig",
    "GatedDeltaNetConfig",
    "GatedRFAConfig",
    "GatedRNNConfig",
    "HGRN2Config",
    "KDAConfig",
    "LRUConfig",
    "LSTMConfig",
    "LinearAttentionConfig",
    "LogLinearMamba2Config",
    "MLSTMConfig",
    "Mamba1Config",
    "Mamba2Config",
    "Mamba3Config",
    "MinGRUConfig",
    "MinLSTMConfig",
    "Output",
    "PrefixScan",
    "RGLRUConfig",
    "RWKV4Config",
    "RWKV6Config",
    "RWKV7Config",
    "RetNetConfig",
    "S4Config",
    "S4DConfig",
    "S5Config",
    "SLSTMConfig",
    "Start",
    "examples",
]


def examples() -> Iterator[tuple[str, MixerConfig]]:
    """`(name, config)` for a small instance of every mixer, to be made at width 64."""
    yield "attention", AttentionConfig(heads=4, kv_heads=2)
    yield "sliding_attention", AttentionConfig(heads=4, kv_heads=1, window=8, rope_fraction=0.5)
    yield "rg_lru", RGLRUConfig(recurrent_size=64, blocks=4)
    yield "mamba1", Mamba1Config(state_size=8)
    yield "mamba2", Mamba2Config(head_size=32, state_size=16)
    yield "mamba3", Mamba3Config(head_size=32, state_size=8, rank=2)
    yield "gla", GLAConfig()
    yield "linear_attention", LinearAttentionConfig(heads=4)
    yield "retnet", RetNetConfig(heads=4, norm_eps=1e-3)  # reads of a document's first keys are small here
    yield "gated_rfa", GatedRFAConfig(heads=4, features=16)
    yield "hgrn2", HGRN2Config(head_size=16)
    yield "rwkv4", RWKV4Config()
    yield "rwkv6", RWKV6Config(head_size=32, mix_rank=8, decay_rank=8)
    yield "rwkv7", RWKV7Config(head_size=32)
    yield "deltanet", DeltaNetConfig(heads=2)
    yield "gated_deltanet", GatedDeltaNetConfig(heads=2, eigenvalues=Eigenvalues.SIGNED)
    yield "deltaproduct", DeltaProductConfig(heads=2, decay=True)
    yield "kda", KDAConfig(heads=2)
    yield "log_linear", LogLinearMamba2Config(head_size=32, state_size=16, levels=11)
    yield "mlstm", MLSTMConfig()
    yield "slstm", SLSTMConfig()
    yield "gated_rnn", GatedRNNConfig()
    yield "s4", S4Config(state_size=8)
    yield "s4d", S4DConfig(state_size=8, method="convolution")
    yield "s5", S5Config(state_size=32, blocks=2, output=Output.FULL_GLU)
    yield "lru", LRUConfig(state_size=32)
    yield "mingru", MinGRUConfig()
    yield "minlstm", MinLSTMConfig()
    yield "lstm", LSTMConfig(heads=4)
    yield "gru", GRUConfig(heads=4)
    pair = (((AttentionConfig(heads=2),), 1),)
    yield "psm", PrefixScan(aggregator=pair, inference=pair, chunk=4)
