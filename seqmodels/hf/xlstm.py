"""xLSTM-7B's architecture (`model_type` xlstm): mLSTM blocks, each with a gated MLP."""

from __future__ import annotations

import math
from typing import Any

from seqmodels.hf.architecture import Architecture, LayerConfig, alike, blocks
from seqmodels.hf.fields import Fields
from seqmodels.hf.tables import Rule, joined, linear, norm, rule
from seqmodels.layers.mlp import Activation, MLPConfig, hidden_width
from seqmodels.layers.norms import NormConfig
from seqmodels.layers.stack import Block
from seqmodels.mixers.mlstm import MLSTMConfig
from seqmodels.models.lm import ModelConfig
from seqmodels.operators.exponential import EPS


def read(fields: Fields) -> ModelConfig:
    fields.only("weight_mode", ("single",), "single")
    fields.only("use_bias", (False,), False)
    fields.only("add_out_norm", (True,), True)
    fields.only("eps", (EPS,), EPS)
    width, heads = (
        fields.integer("hidden_size", None) or fields.integer("embedding_dim"),
        fields.integer("num_heads", 8),
    )
    fields.only("embedding_dim", (width, None), None)
    layers = fields.integer("num_hidden_layers", None) or fields.integer("num_blocks", 32)
    fields.only("num_blocks", (layers, None), None)
    values, keys = (
        int(width * fields.number(name, default)) for name, default in (("v_dim_factor", 1.0), ("qk_dim_factor", 0.5))
    )
    if values % heads or keys % heads:
        raise fields.error("num_heads", heads, f"a divisor of {values} channels of values and {keys} of keys")
    eps, multiple = fields.number("norm_eps", 1e-6), fields.integer("ffn_round_up_to_multiple_of", 64)
    mixer = MLSTMConfig(
        heads=heads,
        expansion=values / width,
        key_size=keys // heads,
        gate_cap=fields.number("gate_soft_cap", 15.0),
        norm_eps=eps,
    )
    hidden = int((width * fields.number("ffn_proj_factor", 2.667) + multiple - 1) // multiple) * multiple
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 50304),
        width=width,
        layers=(((Block(mixer, MLPConfig(hidden_size=hidden, activation=Activation.SILU)),), layers),),
        tied=False,  # transformers does not tie this model's head, whatever tie_word_embeddings says
        logits_cap=fields.number("output_logit_soft_cap", 30.0),
        norm=NormConfig(eps=eps),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    mixer, mlp = alike(config, MLSTMConfig, MLPConfig)
    values = round(mixer.expansion * config.width)
    keys = mixer.heads * (mixer.key_size or max(1, values // mixer.heads // 2))
    layers = len(blocks(config, 2))
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "embedding_dim": config.width,
        "num_hidden_layers": layers,
        "num_blocks": layers,
        "num_heads": mixer.heads,
        "v_dim_factor": _factor(values, config.width),
        "qk_dim_factor": _factor(keys, config.width),
        "ffn_proj_factor": _factor(hidden_width(mlp, config.width), config.width),
        "ffn_round_up_to_multiple_of": 1,
        "gate_soft_cap": mixer.gate_cap,
        "output_logit_soft_cap": config.logits_cap,
        "norm_eps": mixer.norm_eps,
        "weight_mode": "single",
        "use_bias": False,
        "add_out_norm": True,
        "eps": EPS,
        "tie_word_embeddings": False,
    }


def _factor(size: int, width: int) -> float:
    """size / width, such that int(width * factor) is the size again."""
    factor = size / width
    return factor if int(width * factor) == size else math.nextafter(factor, math.inf)


def outer(config: ModelConfig) -> tuple[Rule, ...]:
    return (rule("backbone.embeddings.weight", "embedding"), *norm("backbone.out_norm", "norm"))


def block(configs: tuple[LayerConfig, ...], config: ModelConfig) -> tuple[Rule, ...]:
    gates = [f"mlstm_layer.{gate}_preact" for gate in ("igate", "fgate")]
    return (
        *norm("norm_mlstm", "0.norm"),
        *linear("mlstm_layer.q", "0.layer.query"),
        *linear("mlstm_layer.k", "0.layer.key"),
        *linear("mlstm_layer.v", "0.layer.value"),
        *linear("mlstm_layer.ogate_preact", "0.layer.gate"),
        joined([f"{gate}.weight" for gate in gates], "0.layer.gates.kernel", axis=1),
        rule(f"{gates[0]}.bias", "0.layer.input_bias"),
        rule(f"{gates[1]}.bias", "0.layer.forget_bias"),
        *norm("mlstm_layer.multihead_norm", "0.layer.norm"),
        *linear("mlstm_layer.out_proj", "0.layer.out"),
        *norm("norm_ffn", "1.norm"),
        *linear("ffn.proj_up_gate", "1.layer.gate"),
        *linear("ffn.proj_up", "1.layer.up"),
        *linear("ffn.proj_down", "1.layer.down"),
    )


XLSTM = Architecture(
    model_type="xlstm",
    class_name="xLSTMForCausalLM",
    read=read,
    write=write,
    outer=outer,
    block=block,
    prefix="backbone.blocks.{}.",
    depth=2,
)
