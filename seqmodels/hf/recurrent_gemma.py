"""RecurrentGemma (`model_type` recurrent_gemma): RG-LRU blocks and local attention, each with a gated MLP."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from seqmodels.hf.architecture import Architecture, LayerConfig, blocks, grouped, period
from seqmodels.hf.fields import Fields
from seqmodels.hf.tables import Rule, convolution, linear, norm, rule, shaped
from seqmodels.layers.mlp import Activation, MLPConfig, hidden_width
from seqmodels.layers.norms import NormConfig
from seqmodels.layers.stack import Block
from seqmodels.mixers.attention import AttentionConfig
from seqmodels.mixers.rg_lru import RGLRUConfig
from seqmodels.models.lm import ModelConfig

RECURRENT, ATTENTION = "recurrent", "attention"


def read(fields: Fields) -> ModelConfig:
    fields.only("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    fields.only("embeddings_scale_by_sqrt_dim", (True,), True)
    width, heads = fields.integer("hidden_size", 2560), fields.integer("num_attention_heads", 10)
    mlp = MLPConfig(hidden_size=fields.integer("intermediate_size", 7680) // 2, activation=Activation.GELU, bias=True)
    mixers = {RECURRENT: _recurrent(fields, width, heads), ATTENTION: _attention(fields, width, heads)}
    cycle = fields.get("block_types", [RECURRENT, RECURRENT, ATTENTION])
    if not isinstance(cycle, list | tuple) or not cycle or not set(cycle) <= set(mixers):
        raise fields.error("block_types", cycle, f"a list of {RECURRENT!r} and {ATTENTION!r}")
    kinds = [cycle[n % len(cycle)] for n in range(fields.integer("num_hidden_layers", 26))]
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 256000),
        width=width,
        layers=grouped([Block(mixers[kind], mlp) for kind in kinds]),
        tied=fields.flag("tie_word_embeddings", True),
        embed_scale=embed_scale(width),
        logits_cap=fields.number("logits_soft_cap", 30.0),
        norm=NormConfig(eps=fields.number("rms_norm_eps", 1e-6), zero_centred=True),
    )


def embed_scale(width: int) -> float:
    """sqrt(width) as transformers keeps it, rounded to bfloat16: 50.5 for a width of 2560, not 50.596."""
    return float(np.float32(width**0.5).astype(ml_dtypes.bfloat16))


def _recurrent(fields: Fields, width: int, heads: int) -> RGLRUConfig:
    size = fields.integer("lru_width", None) or width
    return RGLRUConfig(recurrent_size=size, blocks=heads, conv_width=fields.integer("conv1d_width", 4), bias=True)


def _attention(fields: Fields, width: int, heads: int) -> AttentionConfig:
    rope = Fields({"model_type": fields.model_type, **(fields.get("rope_parameters", None) or fields.values)})
    rope.only("rope_type", ("default",), "default")
    return AttentionConfig(
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", None) or heads,
        head_size=width // heads,
        # Counts the keys that a token sees, its own included, as ours does.
        window=fields.integer("attention_window_size", 2048),
        rope_base=rope.number("rope_theta", 10_000.0),
        rope_fraction=rope.number("partial_rotary_factor", 0.5),
        bias=fields.flag("attention_bias", False),
        output_bias=True,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    found = [tuple(step.config for step in block) for block in blocks(config, 2)]
    mixers = [mixer for mixer, _ in found]
    if not all(isinstance(mixer, RGLRUConfig | AttentionConfig) for mixer in mixers):
        raise ValueError("its mixers are RGLRUConfig and AttentionConfig")
    if not all(isinstance(mlp, MLPConfig) for _, mlp in found):
        raise ValueError("a mixer is followed by an MLPConfig")
    recurrent = next((mixer for mixer in mixers if isinstance(mixer, RGLRUConfig)), None)
    attention = next((mixer for mixer in mixers if isinstance(mixer, AttentionConfig)), None)
    mlp: Any = found[0][1]
    kinds = [RECURRENT if isinstance(mixer, RGLRUConfig) else ATTENTION for mixer in mixers]
    written: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(kinds),
        "block_types": kinds[: period(kinds)],
        "intermediate_size": 2 * hidden_width(mlp, config.width),
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": config.tied,
        "logits_soft_cap": config.logits_cap,
        "rms_norm_eps": config.norm.eps,
        "num_attention_heads": attention.heads if attention else recurrent.blocks if recurrent else 1,
    }
    if recurrent:
        written |= {"lru_width": recurrent.channels(config.width), "conv1d_width": recurrent.conv_width}
    if attention:
        rope = {"rope_theta": attention.rope_base, "partial_rotary_factor": attention.rope_fraction}
        written |= {
            "num_key_value_heads": attention.kv_heads or attention.heads,
            "attention_window_size": attention.window,
            "attention_bias": attention.bias,
            "rope_parameters": {"rope_type": "default", **rope},
        }
    return written


def outer(config: ModelConfig) -> tuple[Rule, ...]:
    return (rule("model.embed_tokens.weight", "embedding"), *norm("model.final_norm", "norm"))


def block(configs: tuple[LayerConfig, ...], config: ModelConfig) -> tuple[Rule, ...]:
    mixer = configs[0]
    if isinstance(mixer, AttentionConfig):
        inner = attention_rules(mixer)
    else:
        assert isinstance(mixer, RGLRUConfig)
        inner = recurrent_rules(mixer, config.width)
    return (
        *norm("temporal_pre_norm", "0.norm"),
        *inner,
        *norm("channel_pre_norm", "1.norm"),
        *linear("mlp_block.gate_proj", "1.layer.gate", bias=True),
        *linear("mlp_block.up_proj", "1.layer.up", bias=True),
        *linear("mlp_block.down_proj", "1.layer.down", bias=True),
    )


def attention_rules(mixer: AttentionConfig) -> tuple[Rule, ...]:
    return (
        *linear("temporal_block.q_proj", "0.layer.query", bias=mixer.bias),
        *linear("temporal_block.k_proj", "0.layer.key", bias=mixer.bias),
        *linear("temporal_block.v_proj", "0.layer.value", bias=mixer.bias),
        *linear("temporal_block.o_proj", "0.layer.out", bias=True),
    )


def recurrent_rules(mixer: RGLRUConfig, width: int) -> tuple[Rule, ...]:
    size = mixer.channels(width)
    flat = shaped((size,), (mixer.blocks, size // mixer.blocks))
    return (
        *linear("temporal_block.linear_y", "0.layer.gate", bias=True),
        *linear("temporal_block.linear_x", "0.layer.input", bias=True),
        *convolution("temporal_block.conv_1d", "0.layer.conv"),
        rule("temporal_block.rg_lru.recurrent_param", "0.layer.decay"),
        rule("temporal_block.rg_lru.input_gate_weight", "0.layer.input_gate.kernel"),
        rule("temporal_block.rg_lru.input_gate_bias", "0.layer.input_gate.bias", flat),
        rule("temporal_block.rg_lru.recurrent_gate_weight", "0.layer.recurrence_gate.kernel"),
        rule("temporal_block.rg_lru.recurrent_gate_bias", "0.layer.recurrence_gate.bias", flat),
        *linear("temporal_block.linear_out", "0.layer.out", bias=True),
    )


RECURRENT_GEMMA = Architecture(
    model_type="recurrent_gemma",
    class_name="RecurrentGemmaForCausalLM",
    read=read,
    write=write,
    outer=outer,
    block=block,
    prefix="model.layers.{}.",
    depth=2,
)
