"""Qwen3-Next beside transformers' plain torch path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from seqmodels import ModelConfig
from seqmodels.hf import load_pretrained, save_pretrained
from seqmodels.hf.fields import Fields
from seqmodels.hf.qwen3_next import read
from seqmodels.layers import Activation, Block, MLPConfig, MoEConfig, NormConfig
from seqmodels.mixers import AttentionConfig, GatedDeltaNetConfig
from tests.parity import pairs

pytestmark = pytest.mark.parity

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 4}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 10}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
SHARED = {"shared_expert_intermediate_size": 20}
CASES: dict[str, dict[str, Any]] = {
    "published-shape": {},
    "tied-dense-layers-mixed-in": {
        "tie_word_embeddings": True,
        "num_hidden_layers": 5,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention", "linear_attention"],
        "norm_topk_prob": False,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
    },
    "other-heads": {
        "num_hidden_layers": 3,
        "full_attention_interval": 3,
        "num_key_value_heads": 4,
        "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
        "linear_conv_kernel_dim": 3,
        "num_experts_per_tok": 6,
        "rms_norm_eps": 1e-3,
    },
    "dense": {"num_experts": 0, "num_hidden_layers": 2, "full_attention_interval": 2, "linear_num_value_heads": 6},
}


def made_config(**changes: Any) -> Any:
    sizes = {**SIZES, **ATTENTION, **LINEAR, **EXPERTS, **SHARED, **changes}
    return transformers.Qwen3NextConfig(**sizes, experts_implementation="eager")


def slower(name: str, value: torch.Tensor) -> torch.Tensor | None:
    """Rates of decay up to 3 in place of 20.

    A memory that forgets everything within a token leaves q k^T v, often nearly zero, to the norm, which divides by its
    size: both models are then off by 1e-4 from float64.
    """
    return value - 2.0 if name.endswith("A_log") else None


@pytest.fixture(scope="module", params=CASES)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> pairs.Pair:
    return pairs.make_pair(made_config(**CASES[request.param]), tmp_path_factory.mktemp("qwen3_next"), slower)


def cached(output: Any) -> Iterator[Any]:
    """A linear layer's last inputs of the convolution and its memory; a full one's keys and values.

    transformers keeps one input more than the convolution will look at.
    """
    for layer in output.past_key_values.layers:
        if hasattr(layer, "keys"):
            yield layer.keys.transpose(1, 2), layer.values.transpose(1, 2)
        else:
            yield layer.conv_states[0].transpose(1, 2)[:, 1:], layer.recurrent_states[0]


def of_ours(state: Any) -> Any:
    if hasattr(state, "memory"):
        return state.conv, state.memory
    length = int(state.length[0])
    return state.key[:, :length], state.value[:, :length]


@pytest.mark.optimised
def test_logits(pair: pairs.Pair) -> None:
    pairs.check_logits(pair)


def test_states(pair: pairs.Pair) -> None:
    pairs.check_states(pair, cached, of_ours)


def test_decoding(pair: pairs.Pair) -> None:
    pairs.check_decoding(pair)


def test_gradients(pair: pairs.Pair) -> None:
    pairs.check_gradients(pair)


def test_round_trip(pair: pairs.Pair, tmp_path: Path) -> None:
    pairs.check_round_trip(pair, tmp_path / "again")


def test_losses_of_routers(tmp_path: Path) -> None:
    """Where transformers adds the balance loss, so do we; for a model of one layer it is the same number."""
    changes = {
        "num_hidden_layers": 1,
        "full_attention_interval": 1,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.25,
    }
    made = pairs.make_pair(made_config(**changes), tmp_path / "routers")
    with torch.no_grad():
        expected = made.theirs(torch.tensor(made.tokens), output_router_logits=True).aux_loss.item()
    _, _, aux = made.ours.forward(made.tokens)
    # A mean of float32 probabilities over 42 tokens.
    np.testing.assert_allclose(aux["balance"], 0.25 * expected, rtol=1e-6)
    save_pretrained(made.ours, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["router_aux_loss_coef"] == 0.25


def test_names_and_sizes_of_the_published_config() -> None:
    """Qwen/Qwen3-Next-80B-A3B-Instruct, whose config.json is older than `layer_types` and `rope_parameters`."""
    published = {
        "model_type": "qwen3_next",
        "full_attention_interval": 4,
        "partial_rotary_factor": 0.25,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "mlp_only_layers": [],
    }
    config = read(Fields(published))
    ((pattern, repeats),) = config.layers
    assert (repeats, config.vocab_size, config.width, config.tied) == (12, 151936, 2048, False)
    norm = NormConfig(eps=1e-6, zero_centred=True)
    moe = MoEConfig(experts=512, top_k=10, hidden_size=512, shared_hidden_size=512, balance=0.0)
    delta = GatedDeltaNetConfig(16, value_heads=32, key_size=128, value_size=128, norm_eps=1e-6)
    attention = AttentionConfig(16, 2, 256, rope_base=1e7, rope_fraction=0.25, query_key_norm=norm, output_gate=True)
    assert pattern == (Block(delta, moe),) * 3 + (Block(attention, moe),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["linear_attention"]}, "layer_types=.*a list of 48 entries"),
        ({"layer_types": ["sliding_attention"] * 48}, "layer_types=.*'full_attention'"),
        ({"mlp_only_layers": [48]}, r"mlp_only_layers=\[48\].*below 48"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0.*at least 1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'.*'default'"),
        ({"partial_rotary_factor": 0.01, "head_dim": 300}, "partial_rotary_factor=0.01.*an even number"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(Fields({"model_type": "qwen3_next", **changes}))


def test_a_model_of_ours_becomes_a_folder_that_transformers_reads(tmp_path: Path) -> None:
    """Sizes given in other ways: factors of the width, as many heads of values as of keys."""
    norm = NormConfig(eps=1e-6, zero_centred=True)
    delta = GatedDeltaNetConfig(heads=2, expand_key=0.5, expand_value=1.0, norm_eps=1e-6)
    attention = AttentionConfig(heads=2, query_key_norm=norm, output_gate=True, rope_fraction=0.5)
    moe, mlp = MoEConfig(experts=4, expansion=0.5, shared_hidden_size=8), MLPConfig(activation=Activation.SILU)
    layers = (((Block(delta, moe), Block(attention, mlp)), 2),)
    ours = ModelConfig(61, 32, layers, norm=norm).make(rngs=nnx.Rngs(0))
    save_pretrained(ours, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    again, _ = load_pretrained(tmp_path / "saved")
    for model in (ours, again):
        pair = pairs.Pair("qwen3_next", theirs, model, tmp_path / "saved", pairs.first_call, pairs.BATCH)
        pairs.check_logits(pair)


def test_what_is_not_a_qwen3_next_cannot_be_saved_as_one(tmp_path: Path) -> None:
    norm = NormConfig(eps=1e-6, zero_centred=True)
    attention = AttentionConfig(heads=2, query_key_norm=norm)
    layers = (((Block(attention, MLPConfig(activation=Activation.SILU)),), 1),)
    with pytest.raises(ValueError, match=r"qwen3_next: AttentionConfig\.output_gate has to be True there, not False"):
        save_pretrained(ModelConfig(61, 32, layers, norm=norm).make(rngs=nnx.Rngs(0)), tmp_path / "saved")
