"""Cells that train a model on a synthetic task and ask it at the task's test setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from experiments.harness.table import Curve, Outcome, Work
from seqmodels.data.tasks import Task
from seqmodels.models.lm import ModelConfig
from seqmodels.train.config import TrainConfig

BINS = 40  # of a curve over positions
CHECKPOINTS = 5  # of a run


@dataclasses.dataclass(frozen=True)
class TaskRun:
    """Training on `task`, and before it on each `(steps, task)` of the curriculum; then `test`, `test_size` rows of it.

    Vocabulary and row length are those of the task that is longest; `packed`: a row holds as many examples of a shorter
    one as fit. `examples`: rows of the training set, which come again in every epoch; None: no row comes twice.
    """

    model: ModelConfig
    train: TrainConfig
    task: Task
    test: Task
    curriculum: tuple[tuple[int, Task], ...] = ()
    examples: int | None = None
    packed: bool = False
    test_size: int = 1024
    test_batch: int = 128

    def shorter(
        self, *, steps: int, rows: int, test_size: int, lengths: Sequence[int] = (), **training: Any
    ) -> TaskRun:
        """The same with fewer steps of fewer rows, a twentieth of them warmup, and no row twice.

        `lengths`: a curriculum, a tenth of the steps on rows (words, expressions) of up to each of these lengths.
        """
        stages = tuple((steps // 10, dataclasses.replace(cast(Any, self.task), max_length=n)) for n in lengths)
        changes = {"steps": steps, "batch_size": rows, "warmup": steps // 20, **training}
        config = dataclasses.replace(self.train, **changes)
        return dataclasses.replace(self, train=config, curriculum=stages, examples=None, test_size=test_size)

    def run(self, work: Work) -> Outcome:
        from flax import nnx

        from seqmodels import params
        from seqmodels.train import train

        length = max(task.length for task in (self.task, *(task for _, task in self.curriculum)))
        model_config = dataclasses.replace(self.model, vocab_size=self.task.vocab_size)
        config = dataclasses.replace(
            self.train, seed=work.seed, length=length, log_every=max(1, self.train.steps // 100),
            checkpoint_every=max(1, self.train.steps // CHECKPOINTS), keep=1,
        )  # fmt: skip
        model = model_config.make(rngs=nnx.Rngs(work.seed))
        batches = Counted(self._batches(config), work.report, config.steps)
        result = train(model, batches, config, workdir=work.folder / "train", quiet=True)
        answered = ask(result.model, self.test, size=self.test_size, batch_size=self.test_batch)
        fixed = {"parameters": params.count(model), "state_bytes": state_bytes(result.model, self.test.length)}
        loss = {"step": [row["step"] for row in result.rows], "loss": [row["loss"] for row in result.rows]}
        return Outcome(
            {**answered.metrics, **fixed, "final_loss": loss["loss"][-1]},
            {"position": answered.by_position, "training": loss},
        )

    def _batches(self, config: TrainConfig) -> Any:
        from seqmodels.data.tasks import make_stages_loader

        stages = (*self.curriculum, (None, self.task))
        arguments = {"size": self.examples, "packed": self.packed}
        return make_stages_loader(stages, batch_size=config.batch_size, seed=config.seed, **arguments)


class Counted:
    """Batches that report which part of `steps` has been taken, resumable as the iterator that they come from."""

    def __init__(self, batches: Any, report: Callable[[float], None], steps: int):
        self._batches, self._report, self._steps, self._taken = batches, report, steps, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._taken += 1
        self._report(0.95 * self._taken / self._steps)  # the rest is the evaluation
        return next(self._batches)

    def get_state(self) -> Any:
        return {"taken": self._taken, "batches": self._batches.get_state()}

    def set_state(self, state: Any) -> None:
        self._taken = state["taken"]
        self._batches.set_state(state["batches"])


class Answers(NamedTuple):
    metrics: dict[str, float]
    by_position: Curve


def ask(model: Any, task: Task, *, size: int, batch_size: int, seed: int = 0) -> Answers:
    """The task's metrics over its first `size` test rows, and over positions: how often the answer there is right, and
    how often all answers up to there are."""
    import jax

    from seqmodels import params
    from seqmodels.data.tasks.base import stack
    from seqmodels.typing import Segments

    definition, arrays = params.split(model)

    @jax.jit
    def predict(arrays: Any, batch: Any) -> Any:
        model = params.merge(definition, arrays)
        hidden, _, _ = model.forward(batch["tokens"], None, Segments(batch["start"], batch["valid"]))
        return model.logits(hidden).argmax(-1)

    source = task.source(seed, size, "test")
    rows = [source[i] for i in range(size)]
    rows += rows[: -size % batch_size]  # whole batches, of which the surplus is cut off again
    batches = [stack(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    predictions = np.concatenate([np.asarray(predict(arrays, batch)) for batch in batches])[:size]
    whole = {name: np.concatenate([batch[name] for batch in batches])[:size] for name in batches[0]}
    return Answers(task.metrics(predictions, whole), by_position(predictions, whole))


def by_position(predictions: np.ndarray, batch: dict[str, np.ndarray]) -> Curve:
    """Accuracy in up to `BINS` spans of positions (each named by its last), and of everything up to there."""
    right, scored = predictions == batch["targets"], batch["scored"]
    so_far = np.logical_and.accumulate(right | ~scored, axis=1)
    asked = np.flatnonzero(scored.any(0))
    columns: dict[str, list[float | None]] = {"position": [], "accuracy": [], "sequence_accuracy": []}
    for span in np.array_split(asked, min(BINS, len(asked))):
        columns["position"].append(int(span[-1]) + 1)
        columns["accuracy"].append(float(right[:, span][scored[:, span]].mean()))
        columns["sequence_accuracy"].append(float(so_far[:, span[-1]].mean()))
    return columns


def state_bytes(model: Any, length: int) -> int:
    """Bytes that a model carries for one sequence of `length` tokens."""
    import jax

    shapes = jax.eval_shape(lambda: model.init_state(1, length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes.layers))
