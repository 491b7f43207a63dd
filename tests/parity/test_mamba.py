"""Mamba and FalconMamba beside transformers' plain torch path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.parity import pairs

pytestmark = pytest.mark.parity

SIZES = {"vocab_size": 61, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 3}
MAMBA, FALCON = transformers.MambaConfig, transformers.FalconMambaConfig
CASES = {
    "mamba": (MAMBA, {}),
    "mamba-untied-biased": (MAMBA, {"tie_word_embeddings": False, "use_bias": True, "time_step_rank": 3}),
    "mamba-no-conv-bias": (MAMBA, {"use_conv_bias": False, "conv_kernel": 3, "layer_norm_epsilon": 1e-3}),
    "falcon": (FALCON, {"mixer_rms_eps": 1e-2}),
    "falcon-untied-sized": (FALCON, {"expand": 16, "intermediate_size": 48, "tie_word_embeddings": False}),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> pairs.Pair:
    kind, changes = CASES[request.param]
    return pairs.make_pair(kind(**SIZES, **changes), tmp_path_factory.mktemp("mamba"))


def cached(output: Any) -> Iterator[Any]:
    """transformers keeps one more input of the convolution than it needs."""
    cache = output.cache_params
    for layer in range(len(cache)):
        yield (
            cache.get_conv_state(layer, state_idx=0).transpose(1, 2)[:, 1:],
            cache.get_recurrent_state(layer, state_idx=0),
        )


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
