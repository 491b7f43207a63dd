"""xLSTM-7B's architecture beside transformers' own implementation (without the package xlstm)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import torch
import transformers

from tests.parity import pairs

pytestmark = pytest.mark.parity

# transformers' cache has keys and values in multiples of 64 channels.
SIZES = {"vocab_size": 61, "hidden_size": 128, "num_hidden_layers": 2, "autocast_kernel_dtype": "float32"}
CASES = {
    "two-heads": {"num_heads": 2, "chunk_size": 8},
    "four-heads-capped": {"num_heads": 4, "chunk_size": 64, "gate_soft_cap": 2.0, "output_logit_soft_cap": 3.0},
    "other-sizes": {"num_heads": 2, "chunk_size": 4, "qk_dim_factor": 1.0, "v_dim_factor": 0.5, "norm_eps": 1e-3}
    | {"ffn_proj_factor": 1.3, "ffn_round_up_to_multiple_of": 3},
}


def adjust(name: str, value: torch.Tensor) -> torch.Tensor | None:
    """Input gates as published, near exp(-10), would leave nothing of what is tested."""
    return torch.randn_like(value) if "igate_preact.bias" in name else None


@pytest.fixture(scope="module", params=CASES)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> pairs.Pair:
    config = transformers.xLSTMConfig(**SIZES, **CASES[request.param])
    return pairs.make_pair(config, tmp_path_factory.mktemp("xlstm"), adjust)


def cached(output: Any) -> Iterator[Any]:
    """Memories and normalisers as they are meant, whatever maximum they are kept under (from 0 there, -inf here)."""
    for memory, normaliser, log_max in output.cache_params.rnn_state.values():
        yield torch.exp(log_max)[..., None] * memory, torch.exp(log_max) * normaliser


def of_ours(state: Any) -> Any:
    log_max, normaliser, memory = state.cell
    scale = jax.numpy.exp(log_max)[..., None]
    return scale[..., None] * memory, scale * normaliser


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
