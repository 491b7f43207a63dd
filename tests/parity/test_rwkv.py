"""RWKV-4 beside transformers' plain torch path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import torch
import transformers

from seqmodels.mixers.rwkv4 import RWKV4State
from tests.parity import pairs

pytestmark = pytest.mark.parity

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3}
CASES = {"untied": {}, "tied": {"tie_word_embeddings": True, "intermediate_size": 48}}


def adjust(name: str, value: torch.Tensor) -> torch.Tensor | None:
    """Shares of the present token lie between 0 and 1."""
    return torch.rand_like(value) if "time_mix" in name else None


@pytest.fixture(scope="module", params=CASES)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> pairs.Pair:
    """transformers mixes rows up when it decodes more than one."""
    config = transformers.RwkvConfig(**SIZES, **CASES[request.param])
    return pairs.make_pair(config, tmp_path_factory.mktemp("rwkv"), adjust, rows=1)


def cached(output: Any) -> Iterator[Any]:
    """Per block: last input, average and the log of its weight; then the last input of the channel mix."""
    channel, time, numerator, denominator, log_max = output.state
    for layer in range(time.shape[-1]):
        n, d, m = (a[..., layer] for a in (numerator, denominator, log_max))
        yield time[..., layer], n / d, torch.log(d) + m
        yield (channel[..., layer],)


def of_ours(state: Any) -> Any:
    if not isinstance(state, RWKV4State):
        return (state.last,)
    log_max, numerator, denominator = state.average
    return state.last, numerator / denominator, jnp.log(denominator) + log_max


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


def test_another_width_of_the_average(tmp_path: Path) -> None:
    """transformers cannot keep the state of such a model."""
    config = transformers.RwkvConfig(**SIZES, attention_hidden_size=24)
    made = pairs.make_pair(config, tmp_path / "narrow", adjust)
    pairs.check_logits(made)
    pairs.check_gradients(made)
    pairs.check_round_trip(made, tmp_path / "again")
