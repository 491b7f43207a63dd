"""Mamba-2 beside transformers' plain torch path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.parity import pairs

pytestmark = pytest.mark.parity

SIZES = {"vocab_size": 61, "hidden_size": 32, "state_size": 8, "head_dim": 16, "num_heads": 4, "num_hidden_layers": 3}
CASES = {
    "groups": {"n_groups": 2, "chunk_size": 8},
    "one-group-tied-biased": {"n_groups": 1, "chunk_size": 8, "tie_word_embeddings": True, "use_bias": True},
    "no-conv-bias": {"n_groups": 4, "use_conv_bias": False, "conv_kernel": 3, "layer_norm_epsilon": 1e-3},
}


@pytest.fixture(scope="module", params=CASES)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> pairs.Pair:
    config = transformers.Mamba2Config(**SIZES, **CASES[request.param])
    return pairs.make_pair(config, tmp_path_factory.mktemp("mamba2"))


def cached(output: Any) -> Iterator[Any]:
    """transformers keeps one more input of the convolution than it needs, and states as [head size, state size]."""
    cache = output.cache_params
    for layer in range(len(cache)):
        conv, ssm = cache.get_conv_state(layer, state_idx=0), cache.get_recurrent_state(layer, state_idx=0)
        yield conv.transpose(1, 2)[:, 1:], ssm.transpose(2, 3)


@pytest.mark.optimised
def test_logits(pair: pairs.Pair) -> None:
    pairs.check_logits(pair)


def test_states(pair: pairs.Pair) -> None:
    pairs.check_states(pair, cached, lambda state: (state.conv, state.ssm))


def test_decoding(pair: pairs.Pair) -> None:
    pairs.check_decoding(pair)


def test_gradients(pair: pairs.Pair) -> None:
    pairs.check_gradients(pair)


def test_round_trip(pair: pairs.Pair, tmp_path: Path) -> None:
    pairs.check_round_trip(pair, tmp_path / "again")


def test_a_limit_on_steps(tmp_path: Path) -> None:
    """transformers keeps dt within its limits in whole calls only, not in decoding."""
    config = transformers.Mamba2Config(**SIZES, n_groups=2, time_step_limit=(0.01, 0.7))
    made = pairs.make_pair(config, tmp_path / "limited")
    assert made.ours.config.layers[0][0][0].step_limit == (0.01, 0.7)
    pairs.check_logits(made)
    pairs.check_gradients(made)
    pairs.check_round_trip(made, tmp_path / "again")
