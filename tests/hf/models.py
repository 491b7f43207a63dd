"""A tiny model of ours for each architecture that can be written, in which no two sizes are equal by chance."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from seqmodels import ModelConfig, params
from seqmodels.hf.recurrent_gemma import embed_scale
from seqmodels.layers import Activation, Block, MLPConfig, MoEConfig, NormConfig
from seqmodels.layers.norms import NormKind
from seqmodels.layers.rwkv_channel import RWKVChannelConfig
from seqmodels.mixers import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, MLSTMConfig, RGLRUConfig
from seqmodels.mixers.mamba1 import Mamba1Config
from seqmodels.mixers.rwkv4 import RWKV4Config

MIXER = Mamba2Config(head_size=16, state_size=8, groups=2, bias=True)
MAMBA2 = ModelConfig(vocab_size=11, width=32, layers=(((MIXER,), 3),), norm=NormConfig(eps=1e-5))

_recurrent, _local = (
    RGLRUConfig(recurrent_size=56, blocks=4, bias=True),
    AttentionConfig(heads=4, kv_heads=2, window=5, rope_fraction=0.5, output_bias=True),
)
_zero_centred = NormConfig(eps=1e-6, zero_centred=True)
_delta, _gated = (
    GatedDeltaNetConfig(heads=2, value_heads=4, key_size=8, value_size=10, norm_eps=1e-6),
    AttentionConfig(
        heads=4, kv_heads=2, head_size=12, query_key_norm=_zero_centred, output_gate=True, rope_fraction=0.5
    ),
)
_experts = MoEConfig(experts=4, top_k=2, hidden_size=12, shared_hidden_size=20)
_mlp = MLPConfig(hidden_size=20, activation=Activation.GELU, bias=True)
MODELS: dict[str, ModelConfig] = {
    "mamba": ModelConfig(11, 32, (((Mamba1Config(inner_size=40, state_size=6, bias=True),), 2),)),
    "falcon_mamba": ModelConfig(11, 32, (((Mamba1Config(state_size=6, norm_bcdt_eps=1e-6),), 2),), tied=False),
    "mamba2": MAMBA2,
    "recurrent_gemma": ModelConfig(
        11,
        48,
        (((Block(_recurrent, _mlp), Block(_local, _mlp)), 2), ((Block(_recurrent, _mlp),), 1)),
        embed_scale=embed_scale(48),
        logits_cap=30.0,
        norm=NormConfig(zero_centred=True),
    ),
    "xlstm": ModelConfig(
        11,
        40,
        (((Block(MLSTMConfig(heads=2, key_size=12), MLPConfig(hidden_size=56, activation=Activation.SILU)),), 2),),
        tied=False,
        logits_cap=20.0,
    ),
    "rwkv": ModelConfig(
        11,
        32,
        (((Block(RWKV4Config(recurrent_size=24), RWKVChannelConfig(version=4, hidden_size=40)),), 2),),
        norm=NormConfig(kind=NormKind.LAYER, eps=1e-5),
        embedding_norm=True,
    ),
    "qwen3_next": ModelConfig(
        11,
        32,
        (((Block(_delta, _experts), Block(_gated, MLPConfig(hidden_size=26, activation=Activation.SILU))), 2),),
        tied=False,
        norm=_zero_centred,
    ),
}


def moved(config: ModelConfig) -> Any:
    """A model whose parameters, norms and biases too, are away from their initial values."""
    definition, arrays = params.split(nnx.eval_shape(lambda: config.make(rngs=nnx.Rngs(0))))
    leaves, structure = jax.tree.flatten(arrays)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return params.merge(definition, jax.tree.unflatten(structure, drawn))
