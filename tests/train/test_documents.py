"""Over any restarts a run sees the very documents that an uninterrupted one sees: none twice, none left out."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import params
from seqmodels.data import Document, make_loader
from seqmodels.train import train
from tests.train.tiny import BATCH, LENGTH, tiny_config, tiny_model

EPOCHS = 3
EVERY = 3  # steps between checkpoints, so that most kills repeat some steps


def corpus() -> list[Document]:
    """Forty documents, each byte of which says whose it is; some are empty, some longer than a row."""
    random = np.random.default_rng(3)
    sizes = [0, 3 * LENGTH, *random.integers(1, LENGTH + 5, 38)]
    return [Document(f"{number:02d}", bytes([number + 100]) * size) for number, size in enumerate(sizes)]


class Recorded:
    """A loader that notes what every batch holds, and crashes before it hands out batch number `crash`."""

    def __init__(self, crash: int | None = None):
        self.inner = make_loader(corpus(), batch_size=BATCH, length=LENGTH, seed=0, epochs=EPOCHS)
        self.number, self.crash, self.seen = 0, crash, {}

    def __next__(self):
        if self.number + 1 == self.crash:
            raise ConnectionError("killed")
        batch = next(self.inner)
        self.number += 1
        self.seen[self.number] = {name: array.tobytes() for name, array in batch.items()}, batch
        return batch

    def get_state(self):
        return {"number": self.number, "inner": self.inner.get_state()}

    def set_state(self, state):
        self.number = state["number"]
        self.inner.set_state(state["inner"])


def embedding_alone(model: Any, batch: Any, key: Any) -> Any:
    loss = jnp.mean(params.split(model)[1]["embedding"][batch["tokens"]] ** 2)
    return loss, {"loss": loss}


def run(workdir: Path, batches: Recorded) -> None:
    config = tiny_config(steps=10**6, checkpoint_every=EVERY, log_every=100)
    train(tiny_model(), batches, config, workdir=workdir, loss=embedding_alone, quiet=True)


def test_no_document_is_repeated_or_left_out_over_restarts(tmp_path):
    whole = Recorded()
    with pytest.raises(ValueError, match="the batches ended after step"):
        run(tmp_path / "whole", whole)
    steps = len(whole.seen)
    # the epochs are counted exactly: every byte is a target once an epoch, and so is every document's end
    targets = collections.Counter()
    for _, batch in whole.seen.values():
        targets.update(batch["targets"][batch["valid"]].tolist())
    expected = collections.Counter({256: EPOCHS * len(corpus())})
    for document in corpus():
        expected.update({byte: EPOCHS * count for byte, count in collections.Counter(document.bytes).items()})
    assert targets == expected
    assert steps > 4 * EPOCHS

    random = np.random.default_rng(0)
    crashes = sorted({2, 3, 8, *random.integers(9, steps, 4).tolist()})
    effective = {}
    for crash in crashes:
        parts = Recorded(crash)
        with pytest.raises(ConnectionError):
            run(tmp_path / "parts", parts)
        effective |= parts.seen
    last = Recorded()
    with pytest.raises(ValueError, match="the batches ended after step"):
        run(tmp_path / "parts", last)
    effective |= last.seen
    assert len(crashes) >= 5
    assert 1 < min(last.seen) <= max(last.seen) == steps
    assert {step: content for step, (content, _) in effective.items()} == {
        step: content for step, (content, _) in whole.seen.items()
    }
