"""Qwen3-Next (`model_type` qwen3_next): gated DeltaNet or gated attention, then a mixture of experts or an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from seqmodels.hf.architecture import Architecture, LayerConfig, blocks, grouped
from seqmodels.hf.fields import Fields
from seqmodels.hf.tables import SAME, TRANSPOSED, Rule, Transform, convolution, linear, norm, rule, stacked
from seqmodels.layers.mlp import Activation, MLPConfig, hidden_width
from seqmodels.layers.moe import MoEConfig
from seqmodels.layers.norms import NormConfig
from seqmodels.layers.stack import Block
from seqmodels.mixers.attention import AttentionConfig
from seqmodels.mixers.gated_deltanet import GatedDeltaNetConfig
from seqmodels.mixers.gla import head_size
from seqmodels.models.lm import ModelConfig

LINEAR, FULL = "linear_attention", "full_attention"


def read(fields: Fields) -> ModelConfig:
    fields.only("hidden_act", ("silu", "swish"), "silu")
    layers = fields.integer("num_hidden_layers", 48)
    norms = NormConfig(eps=fields.number("rms_norm_eps", 1e-6), zero_centred=True)
    mixers = {LINEAR: _delta(fields), FULL: _attention(fields, norms)}
    dense = MLPConfig(hidden_size=fields.integer("intermediate_size", 5632), activation=Activation.SILU)
    experts, every = fields.integer("num_experts", 512), _period(fields, "decoder_sparse_step", 1)
    moe = _moe(fields, experts) if experts else dense
    flat = fields.get("mlp_only_layers", None) or []
    if not isinstance(flat, list) or not set(flat) <= set(range(layers)):
        raise fields.error("mlp_only_layers", flat, f"a list of numbers of layers below {layers}")
    sparse = [(n + 1) % every == 0 and n not in flat for n in range(layers)]
    kinds = _kinds(fields, layers)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 151936),
        width=fields.integer("hidden_size", 2048),
        layers=grouped([Block(mixers[kind], moe if has else dense) for kind, has in zip(kinds, sparse, strict=True)]),
        tied=fields.flag("tie_word_embeddings", False),
        norm=norms,
    )


def _period(fields: Fields, name: str, default: int) -> int:
    if (value := fields.integer(name, default)) < 1:
        raise fields.error(name, value, "at least 1")
    return value


def _kinds(fields: Fields, layers: int) -> list[str]:
    kinds = fields.get("layer_types", None)
    if kinds is None:
        every = _period(fields, "full_attention_interval", 4)
        return [LINEAR if (n + 1) % every else FULL for n in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {LINEAR, FULL}:
        raise fields.error("layer_types", kinds, f"a list of {layers} entries, each {LINEAR!r} or {FULL!r}")
    return list(kinds)


def _delta(fields: Fields) -> GatedDeltaNetConfig:
    return GatedDeltaNetConfig(
        heads=fields.integer("linear_num_key_heads", 16),
        value_heads=fields.integer("linear_num_value_heads", 32),
        key_size=fields.integer("linear_key_head_dim", 128),
        value_size=fields.integer("linear_value_head_dim", 128),
        conv_width=fields.integer("linear_conv_kernel_dim", 4),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
    )


def _attention(fields: Fields, norms: NormConfig) -> AttentionConfig:
    fields.only("attention_dropout", (0.0,), 0.0)
    size = fields.integer("head_dim", 256)
    rope = fields.get("rope_parameters", None) or fields.get("rope_scaling", None) or {}
    older = {name: fields.get(name) for name in ("rope_theta", "partial_rotary_factor") if name in fields}
    rope = Fields({"model_type": fields.model_type, **older, **rope})
    rope.only("rope_type", ("default",), "default")
    fraction = rope.number("partial_rotary_factor", 0.25)
    if int(size * fraction) % 2:
        raise fields.error("partial_rotary_factor", fraction, f"an even number of a head's {size} channels")
    return AttentionConfig(
        heads=fields.integer("num_attention_heads", 16),
        kv_heads=fields.integer("num_key_value_heads", 2),
        head_size=size,
        rope_base=rope.number("rope_theta", 10_000.0),
        rope_fraction=fraction,
        bias=fields.flag("attention_bias", False),
        query_key_norm=norms,
        output_gate=True,
    )


def _moe(fields: Fields, experts: int) -> MoEConfig:
    """The balance loss counts where transformers adds it. Ours is one for each layer, theirs one for all together."""
    balanced = fields.flag("output_router_logits", False)
    return MoEConfig(
        experts=experts,
        top_k=fields.integer("num_experts_per_tok", 10),
        hidden_size=fields.integer("moe_intermediate_size", 512),
        renormalise=fields.flag("norm_topk_prob", True),
        shared_hidden_size=fields.integer("shared_expert_intermediate_size", 512),
        balance=fields.number("router_aux_loss_coef", 0.001) if balanced else 0.0,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    every = blocks(config, 2)
    written: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(every),
        "layer_types": [LINEAR if isinstance(mixer.config, GatedDeltaNetConfig) else FULL for mixer, _ in every],
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm.eps,
        "num_experts": 0,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [n for n, (_, channel) in enumerate(every) if isinstance(channel.config, MLPConfig)],
    }
    for step in (step.config for block in every for step in block):
        match step:
            case GatedDeltaNetConfig():
                written |= _written_delta(step, config.width)
            case AttentionConfig():
                written |= _written_attention(step, config.width)
            case MoEConfig():
                written |= _written_moe(step, config.width)
            case MLPConfig():
                written["intermediate_size"] = hidden_width(step, config.width)
            case _:
                raise ValueError(f"it has no {type(step).__name__}")
    return written


def _written_delta(mixer: GatedDeltaNetConfig, width: int) -> dict[str, Any]:
    heads, key_size, value_size = _delta_sizes(mixer, width)
    return {
        "linear_num_key_heads": mixer.heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": key_size,
        "linear_value_head_dim": value_size,
        "linear_conv_kernel_dim": mixer.conv_width,
    }


def _delta_sizes(mixer: GatedDeltaNetConfig, width: int) -> tuple[int, int, int]:
    """Heads of values, and the sizes of a key and of a value."""
    heads = mixer.value_heads or mixer.heads
    key_size = mixer.key_size or head_size(width, mixer, "expand_key", mixer.heads)
    return heads, key_size, mixer.value_size or head_size(width, mixer, "expand_value", heads)


def _written_attention(mixer: AttentionConfig, width: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": mixer.rope_base, "partial_rotary_factor": mixer.rope_fraction}
    return {
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads or mixer.heads,
        "head_dim": mixer.head_size or width // mixer.heads,
        "rope_parameters": rope,
        "attention_bias": mixer.bias,
    }


def _written_moe(moe: MoEConfig, width: int) -> dict[str, Any]:
    if moe.shared_hidden_size is None:
        raise ValueError("its mixtures of experts have a shared expert: set MoEConfig.shared_hidden_size")
    losses = {"output_router_logits": True, "router_aux_loss_coef": moe.balance}
    return {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": hidden_width(moe, width),
        "norm_topk_prob": moe.renormalise,
        "shared_expert_intermediate_size": moe.shared_hidden_size,
        **(losses if moe.balance else {"output_router_logits": False}),
    }


def outer(config: ModelConfig) -> tuple[Rule, ...]:
    return (rule("model.embed_tokens.weight", "embedding"), *norm("model.norm", "norm"))


def block(steps: tuple[LayerConfig, ...], config: ModelConfig) -> tuple[Rule, ...]:
    mixer, channel = steps
    rules = (*norm("input_layernorm", "0.norm"), *norm("post_attention_layernorm", "1.norm"))
    if isinstance(mixer, GatedDeltaNetConfig):
        rules += _delta_rules(mixer, config.width)
    elif isinstance(mixer, AttentionConfig):
        rules += _attention_rules(mixer, config.width)
    if isinstance(channel, MoEConfig):
        return rules + _moe_rules(channel)
    return rules + _mlp_rules("mlp", "1.layer")


def _delta_rules(mixer: GatedDeltaNetConfig, width: int) -> tuple[Rule, ...]:
    heads, key_size, value_size = _delta_sizes(mixer, width)
    each = heads // mixer.heads  # value heads that share a key head
    mixed, gate = (key_size, key_size, each * value_size), (each * value_size,)
    names = lambda *names: tuple(f"0.layer.{name}.kernel" for name in names)
    return (
        by_head("linear_attn.in_proj_qkvz.weight", names("input", "gate"), mixer.heads, (mixed, gate)),
        by_head("linear_attn.in_proj_ba.weight", names("beta", "step"), mixer.heads, ((each,), (each,))),
        *convolution("linear_attn.conv1d", "0.layer.conv", bias=False),
        rule("linear_attn.A_log", "0.layer.a_log"),
        rule("linear_attn.dt_bias", "0.layer.dt_bias"),
        *norm("linear_attn.norm", "0.layer.norm"),
        *linear("linear_attn.out_proj", "0.layer.out"),
    )


def _attention_rules(mixer: AttentionConfig, width: int) -> tuple[Rule, ...]:
    """The query projection makes the queries and the output gate, head by head."""
    size = mixer.head_size or width // mixer.heads
    names = lambda kind: tuple(f"0.layer.{name}.{kind}" for name in ("query", "gate"))
    query = lambda theirs, ours, transform: by_head(
        f"self_attn.q_proj.{theirs}", names(ours), mixer.heads, ((size,), (size,)), transform
    )
    return (
        query("weight", "kernel", TRANSPOSED),
        *([query("bias", "bias", SAME)] if mixer.bias else []),
        *linear("self_attn.k_proj", "0.layer.key", bias=mixer.bias),
        *linear("self_attn.v_proj", "0.layer.value", bias=mixer.bias),
        *linear("self_attn.o_proj", "0.layer.out", bias=mixer.bias),
        *norm("self_attn.q_norm", "0.layer.query_norm"),
        *norm("self_attn.k_norm", "0.layer.key_norm"),
    )


def _moe_rules(moe: MoEConfig) -> tuple[Rule, ...]:
    of_experts = lambda name: [f"mlp.experts.{expert}.{name}_proj.weight" for expert in range(moe.experts)]
    return (
        *linear("mlp.gate", "1.layer.router"),
        *(stacked(of_experts(name), f"1.layer.{name}") for name in ("gate", "up", "down")),
        *_mlp_rules("mlp.shared_expert", "1.layer.shared"),
        *linear("mlp.shared_expert_gate", "1.layer.shared_gate"),
    )


def _mlp_rules(tensor: str, parameter: str) -> tuple[Rule, ...]:
    return sum((linear(f"{tensor}.{name}_proj", f"{parameter}.{name}") for name in ("gate", "up", "down")), ())


def by_head(
    tensor: str,
    parameters: Sequence[str],
    heads: int,
    sizes: Sequence[Sequence[int]],
    transform: Transform = TRANSPOSED,
) -> Rule:
    """One tensor whose outputs come head by head, in each head the parts of all parameters, of the given sizes.

    A parameter has its parts one after the other, in each all heads.
    """

    def load(tensor: np.ndarray) -> tuple[np.ndarray, ...]:
        whole = transform.load(tensor)
        ends = np.cumsum([size for own in sizes for size in own])[:-1]
        parts = np.split(whole.reshape(*whole.shape[:-1], heads, -1), ends, axis=-1)
        flat = iter([part.reshape(*whole.shape[:-1], -1) for part in parts])
        return tuple(np.concatenate([next(flat) for _ in own], axis=-1) for own in sizes)

    def save(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = []
        for array, own in zip(arrays, sizes, strict=True):
            flat = np.split(array, heads * np.cumsum(own)[:-1], axis=-1)
            parts += [part.reshape(*array.shape[:-1], heads, -1) for part in flat]
        whole = np.concatenate(parts, axis=-1)
        return (transform.save(whole.reshape(*whole.shape[:-2], -1)),)

    return Rule((tensor,), tuple(parameters), load, save)


QWEN3_NEXT = Architecture(
    model_type="qwen3_next",
    class_name="Qwen3NextForCausalLM",
    read=read,
    write=write,
    outer=outer,
    block=block,
    prefix="model.layers.{}.",
    depth=2,
    ignored=("mtp.",),  # predictions of several tokens ahead, which transformers leaves out as well
)
