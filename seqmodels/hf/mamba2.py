"""Mamba-2 (`model_type` mamba2)."""

from __future__ import annotations

import math
from typing import Any

from seqmodels.hf.architecture import Architecture, LayerConfig, alike
from seqmodels.hf.fields import Fields
from seqmodels.hf.tables import Rule, convolution, linear, norm, rule
from seqmodels.layers.norms import NormConfig
from seqmodels.mixers.mamba2 import Mamba2Config
from seqmodels.models.lm import ModelConfig


def read(fields: Fields) -> ModelConfig:
    fields.only("hidden_act", ("silu", "swish"), "silu")
    width, expand = fields.integer("hidden_size", 4096), fields.number("expand", 2)
    heads, head_size = fields.integer("num_heads", 128), fields.integer("head_dim", 64)
    if round(width * expand) != heads * head_size:
        raise fields.error("num_heads", heads, f"hidden_size * expand / head_dim = {width * expand / head_size:g}")
    eps = fields.number("layer_norm_epsilon", 1e-5)
    limit = fields.pair("time_step_limit", (0.0, math.inf))
    mixer = Mamba2Config(
        expansion=expand,
        head_size=head_size,
        state_size=fields.integer("state_size", 128),
        groups=fields.integer("n_groups", 8),
        conv_width=fields.integer("conv_kernel", 4),
        bias=fields.flag("use_bias", False),
        conv_bias=fields.flag("use_conv_bias", True),
        norm_eps=eps,
        step_limit=None if limit == (0.0, math.inf) else limit,
    )
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 32768),
        width=width,
        layers=(((mixer,), fields.integer("num_hidden_layers", 64)),),
        tied=fields.flag("tie_word_embeddings", False),
        norm=NormConfig(eps=eps),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    (mixer,) = alike(config, Mamba2Config)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": sum(len(pattern) * repeats for pattern, repeats in config.layers),
        "tie_word_embeddings": config.tied,
        "layer_norm_epsilon": config.norm.eps,
        "expand": int(mixer.expansion) if mixer.expansion == int(mixer.expansion) else mixer.expansion,
        "num_heads": round(config.width * mixer.expansion) // mixer.head_size,
        "head_dim": mixer.head_size,
        "state_size": mixer.state_size,
        "n_groups": mixer.groups,
        "conv_kernel": mixer.conv_width,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
        "hidden_act": "silu",
        "time_step_limit": list(mixer.step_limit or (0.0, math.inf)),
    }


def outer(config: ModelConfig) -> tuple[Rule, ...]:
    return (rule("backbone.embeddings.weight", "embedding"), *norm("backbone.norm_f", "norm"))


def block(steps: tuple[LayerConfig, ...], config: ModelConfig) -> tuple[Rule, ...]:
    (mixer,) = steps
    assert isinstance(mixer, Mamba2Config)
    return (
        *norm("norm", "0.norm"),
        *linear("mixer.in_proj", "0.layer.input", bias=mixer.bias),
        *convolution("mixer.conv1d", "0.layer.conv", bias=mixer.conv_bias),
        rule("mixer.A_log", "0.layer.a_log"),
        rule("mixer.dt_bias", "0.layer.dt_bias"),
        rule("mixer.D", "0.layer.skip"),
        *norm("mixer.norm", "0.layer.norm"),
        *linear("mixer.out_proj", "0.layer.out", bias=mixer.bias),
    )


MAMBA2 = Architecture(
    model_type="mamba2",
    class_name="Mamba2ForCausalLM",
    read=read,
    write=write,
    outer=outer,
    block=block,
    prefix="backbone.layers.{}.",
    aliases={"backbone.embedding.weight": "backbone.embeddings.weight"},
)
