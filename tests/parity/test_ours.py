"""Models that were made here are read by transformers, which computes the same with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from seqmodels.hf import load_pretrained, save_pretrained
from tests.hf import models
from tests.parity import pairs

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", models.MODELS)
def test_transformers_reads_what_we_write(name: str, tmp_path: Path) -> None:
    ours = models.moved(models.MODELS[name])
    save_pretrained(ours, tmp_path / "ours")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = np.random.default_rng(3).integers(0, 11, (2, 13))
    pair = pairs.Pair(name, theirs, ours, tmp_path / "ours", pairs.first_call, pairs.BATCH)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens), use_cache=False).logits.numpy()
    pairs.close(pair, "logits", pairs.run(ours, tokens)[0], expected)


def test_files_that_transformers_split_and_rounded(tmp_path: Path) -> None:
    """Tensors in bfloat16 over several files: read exactly, and written back as they were."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=8)
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    ours, _ = load_pretrained(tmp_path / "theirs")
    np.testing.assert_array_equal(ours.embedding[...], theirs.get_input_embeddings().weight.detach().float().numpy())
    pair = pairs.Pair("mamba", theirs, ours, tmp_path / "theirs", pairs.first_call, pairs.BATCH)
    pairs.check_round_trip(pair, tmp_path / "again")
