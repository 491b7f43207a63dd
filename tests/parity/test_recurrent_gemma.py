"""RecurrentGemma beside transformers' plain torch path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from seqmodels.mixers.attention import AttentionState
from tests.parity import pairs

pytestmark = pytest.mark.parity

WINDOW = 8
SIZES = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 4}
SIZES |= {"attention_window_size": WINDOW, "num_hidden_layers": 5}
SIZES |= {"pad_token_id": None}  # torch gives the embedding of that token no gradient
CASES = {
    "published-pattern": {"num_key_value_heads": 1},
    "untied-biased": {"tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 2},
    "other-pattern": {"block_types": ["attention", "recurrent"], "logits_soft_cap": 3.0, "conv1d_width": 2},
}


def first(theirs: Any, tokens: np.ndarray) -> Any:
    """transformers keeps recurrent states in its modules, and a cache of keys only if one is given."""
    theirs._setup_cache(theirs.config, len(tokens), "cpu", torch.float32)
    cache = transformers.DynamicCache(config=theirs.config)
    output = theirs(torch.tensor(tokens), use_cache=True, past_key_values=cache)
    output.past_key_values, output.blocks = cache, [layer.temporal_block for layer in theirs.model.layers]
    return output


@pytest.fixture(scope="module", params=CASES)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> pairs.Pair:
    config = transformers.RecurrentGemmaConfig(**SIZES, **CASES[request.param])
    return pairs.make_pair(config, tmp_path_factory.mktemp("recurrent_gemma"), first=first)


def cached(output: Any) -> Iterator[Any]:
    """What the convolution and the unit keep, or keys and values (the next token sees no more of them), time first."""
    for block, layer in zip(output.blocks, output.past_key_values.layers, strict=True):
        if hasattr(block, "rg_lru"):
            yield block.conv1d_state.transpose(1, 2), block.rg_lru.recurrent_states
        else:
            yield layer.keys.transpose(1, 2), layer.values.transpose(1, 2)


def of_ours(state: Any) -> Any:
    if not isinstance(state, AttentionState):
        return state.conv, state.hidden
    length = int(state.length[0])
    slots = jnp.arange(max(0, length - (WINDOW - 1)), length) % WINDOW
    return state.key[:, slots], state.value[:, slots]


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


def test_a_recurrence_of_another_width(tmp_path: Path) -> None:
    """transformers cannot keep the state of such a model."""
    made = pairs.make_pair(transformers.RecurrentGemmaConfig(**SIZES, lru_width=64), tmp_path / "wide")
    pairs.check_logits(made)
    pairs.check_gradients(made)
    pairs.check_round_trip(made, tmp_path / "again")
