"""RWKV, which is version 4 in transformers (`model_type` rwkv)."""

from __future__ import annotations

from typing import Any

from seqmodels.hf.architecture import Architecture, LayerConfig, alike, blocks
from seqmodels.hf.fields import Fields
from seqmodels.hf.tables import Rule, linear, norm, rule, shaped
from seqmodels.layers.norms import NormConfig, NormKind
from seqmodels.layers.rwkv_channel import RWKVChannelConfig
from seqmodels.layers.stack import Block
from seqmodels.mixers.rwkv4 import RWKV4Config
from seqmodels.models.lm import ModelConfig

EPS = 1e-5
"""transformers' last norm has this one in any case; published models have it everywhere."""


def read(fields: Fields) -> ModelConfig:
    fields.only("layer_norm_epsilon", (EPS,), EPS)
    width = fields.integer("hidden_size", 4096)
    mixer = RWKV4Config(recurrent_size=fields.integer("attention_hidden_size", None) or width)
    channel = RWKVChannelConfig(version=4, hidden_size=fields.integer("intermediate_size", None) or 4 * width)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 50277),
        width=width,
        layers=(((Block(mixer, channel),), fields.integer("num_hidden_layers", 32)),),
        tied=fields.flag("tie_word_embeddings", False),
        norm=NormConfig(kind=NormKind.LAYER, eps=EPS),
        embedding_norm=True,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    mixer, channel = alike(config, RWKV4Config, RWKVChannelConfig)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(blocks(config, 2)),
        "attention_hidden_size": mixer.recurrent_size or config.width,
        "intermediate_size": channel.hidden_size or 4 * config.width,
        "layer_norm_epsilon": EPS,
        "tie_word_embeddings": config.tied,
    }


def outer(config: ModelConfig) -> tuple[Rule, ...]:
    return (
        rule("rwkv.embeddings.weight", "embedding"),
        *norm("rwkv.blocks.0.pre_ln", "embedding_norm", bias=True),
        *norm("rwkv.ln_out", "norm", bias=True),
    )


def block(configs: tuple[LayerConfig, ...], config: ModelConfig) -> tuple[Rule, ...]:
    row = shaped((config.width,), (1, 1, config.width))
    mixes = [("attention", 0, name) for name in ("key", "value", "receptance")]
    mixes += [("feed_forward", 1, name) for name in ("key", "receptance")]
    return (
        *norm("ln1", "0.norm", bias=True),
        rule("attention.time_decay", "0.layer.time_decay"),
        rule("attention.time_first", "0.layer.time_first"),
        *(rule(f"{part}.time_mix_{name}", f"{step}.layer.time_mix_{name}", row) for part, step, name in mixes),
        *(one for name in ("key", "value", "receptance") for one in linear(f"attention.{name}", f"0.layer.{name}")),
        *linear("attention.output", "0.layer.out"),
        *norm("ln2", "1.norm", bias=True),
        *(one for name in ("key", "value", "receptance") for one in linear(f"feed_forward.{name}", f"1.layer.{name}")),
    )


RWKV = Architecture(
    model_type="rwkv",
    class_name="RwkvForCausalLM",
    read=read,
    write=write,
    outer=outer,
    block=block,
    prefix="rwkv.blocks.{}.",
    depth=2,
    head="head.weight",
)
