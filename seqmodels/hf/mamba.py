"""Mamba and FalconMamba (`model_type` mamba, falcon_mamba), which divides B, C and dt by their root mean squares."""

from __future__ import annotations

import functools
import math
from typing import Any

from seqmodels.hf.architecture import Architecture, LayerConfig, alike, steps
from seqmodels.hf.fields import Fields
from seqmodels.hf.tables import Rule, convolution, linear, norm, rule
from seqmodels.layers.norms import NormConfig
from seqmodels.mixers.mamba1 import Mamba1Config
from seqmodels.models.lm import ModelConfig


def read(fields: Fields, *, normed: bool) -> ModelConfig:
    fields.only("hidden_act", ("silu", "swish"), "silu")
    width = fields.integer("hidden_size", 768)
    rank = None if fields.get("time_step_rank", "auto") == "auto" else fields.integer("time_step_rank")
    mixer = Mamba1Config(
        # FalconMamba-7B gives both, expand as 16 and this as 8192 = 2 * 4096: it is what counts.
        inner_size=fields.integer("intermediate_size", int(fields.number("expand", 2) * width)),
        state_size=fields.integer("state_size", 16),
        conv_width=fields.integer("conv_kernel", 4),
        dt_rank=rank or math.ceil(width / 16),
        conv_bias=fields.flag("use_conv_bias", True),
        bias=fields.flag("use_bias", False),
        norm_bcdt_eps=fields.number("mixer_rms_eps", 1e-6) if normed else None,
    )
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 50280),
        width=width,
        layers=(((mixer,), fields.integer("num_hidden_layers", 32)),),
        tied=fields.flag("tie_word_embeddings", True),
        norm=NormConfig(eps=fields.number("layer_norm_epsilon", 1e-5)),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    (mixer,) = alike(config, Mamba1Config)
    inner = mixer.inner_size or round(mixer.expansion * config.width)
    norms = {} if mixer.norm_bcdt_eps is None else {"mixer_rms_eps": mixer.norm_bcdt_eps}
    return norms | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(list(steps(config))),
        "tie_word_embeddings": config.tied,
        "layer_norm_epsilon": config.norm.eps,
        "expand": max(1, inner // config.width),
        "intermediate_size": inner,
        "state_size": mixer.state_size,
        "conv_kernel": mixer.conv_width,
        "time_step_rank": mixer.dt_rank or math.ceil(config.width / 16),
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
        "hidden_act": "silu",
    }


def outer(config: ModelConfig) -> tuple[Rule, ...]:
    return (rule("backbone.embeddings.weight", "embedding"), *norm("backbone.norm_f", "norm"))


def block(configs: tuple[LayerConfig, ...], config: ModelConfig) -> tuple[Rule, ...]:
    (mixer,) = configs
    assert isinstance(mixer, Mamba1Config)
    return (
        *norm("norm", "0.norm"),
        *linear("mixer.in_proj", "0.layer.input", bias=mixer.bias),
        *convolution("mixer.conv1d", "0.layer.conv", bias=mixer.conv_bias),
        *linear("mixer.x_proj", "0.layer.select"),
        *linear("mixer.dt_proj", "0.layer.step"),
        rule("mixer.dt_proj.bias", "0.layer.dt_bias"),
        rule("mixer.A_log", "0.layer.a_log"),
        rule("mixer.D", "0.layer.skip"),
        *linear("mixer.out_proj", "0.layer.out", bias=mixer.bias),
    )


_architecture = functools.partial(
    Architecture,
    write=write,
    outer=outer,
    block=block,
    prefix="backbone.layers.{}.",
    aliases={"backbone.embedding.weight": "backbone.embeddings.weight"},
)
MAMBA = _architecture(model_type="mamba", class_name="MambaForCausalLM", read=functools.partial(read, normed=False))
FALCON_MAMBA = _architecture(
    model_type="falcon_mamba", class_name="FalconMambaForCausalLM", read=functools.partial(read, normed=True)
)
