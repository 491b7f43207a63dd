"""Cells that teach a model to find a passkey at a short length and ask it at longer ones, by depth."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.harness.lengths import Pretrained, Trained, for_run
from experiments.harness.table import Outcome, Work
from experiments.harness.tasks import Counted
from experiments.harness.text import Encode
from seqmodels import params
from seqmodels.data.tasks import Passkey
from seqmodels.data.tasks.base import stack
from seqmodels.data.tasks.passkey import QUESTION
from seqmodels.train.config import TrainConfig
from seqmodels.typing import Segments

DEPTHS = (0.1, 0.5, 0.9)  # of the text before the key
FOUND = 0.5  # of the keys, at all depths together: that length is reached


@dataclasses.dataclass(frozen=True)
class PasskeyRun:
    """A base that goes on with passkeys of `task`, then `size` keys at every depth and multiple of the task's length.

    `train` None: the base is asked as it is.
    """

    base: Trained | Pretrained
    task: Passkey
    multiples: tuple[int, ...]
    train: TrainConfig | None
    depths: tuple[float, ...] = DEPTHS
    size: int = 64

    def run(self, work: Work) -> Outcome:
        from seqmodels.data.tasks import make_task_loader
        from seqmodels.train import train

        base = self.base.get(work)
        task = self.task if base.encode is None else tokenised(self.task, base.encode, base.model.config.vocab_size)
        model = base.model
        if self.train is not None:
            config = dataclasses.replace(for_run(self.train, work.seed), length=task.length)
            loader = make_task_loader(task, batch_size=config.batch_size, seed=work.seed)
            batches = Counted(loader, work.report, config.steps)
            model = train(model, batches, config, workdir=work.folder / "train", quiet=True).model
        columns: dict[str, list[float]] = {"length": []}
        metrics: dict[str, float] = {}
        for k in self.multiples:
            asked = [dataclasses.replace(task, length=k * task.length, depth=depth) for depth in self.depths]
            found = [retrieval(model, one, size=self.size, chunk=task.length) for one in asked]
            columns["length"].append(k * task.length)
            for depth, one in zip(self.depths, found, strict=True):
                columns.setdefault(f"depth {depth:g}", []).append(one["sequence_accuracy"])
            columns.setdefault("passkey", []).append(float(np.mean([one["sequence_accuracy"] for one in found])))
            metrics[f"passkey_{k}x"] = columns["passkey"][-1]
            metrics[f"digits_{k}x"] = float(np.mean([one["token_accuracy"] for one in found]))
        reached = [n for n, share in zip(columns["length"], columns["passkey"], strict=True) if share >= FOUND]
        return Outcome({**metrics, "reach": max(reached, default=0)}, {"passkey": columns})


def tokenised(task: Passkey, encode: Encode, vocabulary: int) -> Passkey:
    """The task in the tokens of a tokenizer, which have the space before the key's first digit."""

    class Words(Passkey):
        vocab_size = vocabulary

        def encode(self, text: str) -> Sequence[int]:
            return encode(text)

        def asked(self, key: str) -> tuple[Sequence[int], Sequence[int]]:
            return encode(QUESTION.rstrip()), encode(f" {key}")

    return Words(**dataclasses.asdict(task))


def retrieval(model: Any, task: Passkey, *, size: int, chunk: int, seed: int = 0) -> dict[str, float]:
    """The task's metrics over `size` test rows at once, whose text is read in chunks with a carried state."""
    definition, arrays = params.split(model)
    source = task.source(seed, size, "test")
    batch = stack([source[index] for index in range(size)])
    answer = int(batch["scored"].sum(axis=1).max())
    missing = -task.length % chunk  # padding before the start, so that all answers stand in the last chunk
    padded = {name: np.pad(batch[name], ((0, 0), (missing, 0))) for name in ("tokens", "start", "valid")}
    state, said = model.init_state(size, task.length), None
    for at in range(0, task.length + missing, chunk):
        piece = {name: array[:, at : at + chunk] for name, array in padded.items()}
        state, said = _read(definition, answer, arrays, state, **piece)
    predictions = np.zeros((size, task.length), np.int32)
    predictions[:, -answer:] = said
    return task.metrics(predictions, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(definition: Any, answer: int, arrays: Any, state: Any, tokens: Any, start: Any, valid: Any) -> Any:
    """The state after a chunk, and what the model says after its last `answer` tokens."""
    model = params.merge(definition, arrays)
    hidden, state, _ = model.forward(tokens, state, Segments(start, valid))
    return state, model.logits(hidden[:, -answer:]).argmax(-1)
