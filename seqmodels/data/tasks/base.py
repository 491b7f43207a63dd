"""Synthetic tasks as seeded data: what a task is, its rows by number, and an endless, resumable stream of batches.

A batch is the train loop's dict: int32 `tokens` and `targets` and Bool `start`, `valid` and `scored`, all
`[batch_size, length]`. `targets[b, t]` is what the model has to say after reading `tokens[b, : t + 1]`; only positions
where `scored` is True are asked (elsewhere targets are 0). `valid` is False on padding, which stands at row ends.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast

import grain
import numpy as np
from jaxtyping import Bool, Float, Int

from seqmodels.data.loader import Batch, Resumable
from seqmodels.data.tasks import metrics

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

# Rows of an endless source: no run reads so many, and grain still counts them in 64 bits.
_ENDLESS = 2**48


class Row(NamedTuple):
    """One example before padding: tokens, what to say after each, and which of those answers count."""

    tokens: Int[np.ndarray, "T"]
    targets: Int[np.ndarray, "T"]
    scored: Bool[np.ndarray, "T"]


def answers(tokens: Sequence[int] | np.ndarray, positions: Mapping[int, int]) -> Row:
    """A row whose only answers are `positions`: position (counted from the end where negative) -> target."""
    targets, scored = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), bool)
    for position, target in positions.items():
        targets[position], scored[position] = target, True
    return Row(np.asarray(tokens, np.int32), targets, scored)


class Task(abc.ABC):
    """Base of every task: a frozen dataclass of settings that draws rows from a generator.

    `metric` names the published measure among those that `metrics` returns. `evaluation()` is the task at its
    published test setting; train and test rows come from disjoint streams of random numbers in any case.
    """

    metric: ClassVar[str] = "token_accuracy"

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids, padding included where the paper counts it."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Positions in a row."""

    @abc.abstractmethod
    def sample(self, generator: np.random.Generator) -> Row:
        """One example of at most `length` positions."""

    def row(self, seed: int, index: int, split: Split = "train") -> Row:
        """Example number `index`: it depends on the arguments and the task's settings alone."""
        return self.sample(stream(seed, index, split))

    def evaluation(self) -> Task:
        return self

    def metrics(
        self, predictions: Int[np.ndarray, "B T"] | Float[np.ndarray, "B T V"], batch: Batch
    ) -> dict[str, float]:
        """Measures of one batch, however large: over all its scored positions, and over its rows."""
        return {
            "token_accuracy": metrics.token_accuracy(predictions, batch),
            "sequence_accuracy": metrics.sequence_accuracy(predictions, batch),
        }

    def source(self, seed: int, size: int, split: Split = "train") -> Source:
        return Source(self, seed=seed, size=size, split=split)


def stream(seed: int, index: int, split: Split) -> np.random.Generator:
    """The random numbers of row `index`: no two rows, splits or seeds share a stream."""
    sequence = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))
    return np.random.Generator(np.random.PCG64(sequence))


class Source:
    """`size` padded rows of a task by number, as grain's `MapDataset.source` takes them."""

    def __init__(self, task: Task, *, seed: int, size: int, split: Split = "train"):
        if size < 1 or seed < 0:
            raise ValueError(f"size {size} and seed {seed}: a source has at least one row, its seed is not negative")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; a task has {' and '.join(map(repr, SPLITS))}")
        self.task, self.seed, self.size, self.split = task, seed, size, split

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of {self.size}")
        row = self.task.row(self.seed, int(index), self.split)
        size, length = len(row.tokens), self.task.length
        padding = (0, length - size)
        position = np.arange(length)
        return {
            "tokens": np.pad(row.tokens.astype(np.int32), padding),
            "targets": np.pad(np.where(row.scored, row.targets, 0).astype(np.int32), padding),
            "start": position == 0,
            "valid": position < size,
            "scored": np.pad(row.scored, padding),
        }


def stack(rows: Sequence[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def make_task_loader(
    task: Task,
    *,
    batch_size: int,
    seed: int,
    size: int | None = None,
    epochs: int | None = None,
    split: Split = "train",
) -> grain.DatasetIterator:
    """Batches of a task, whose iterator's state is a small JSON-able dict: what `seqmodels.train.train` takes.

    With `size` the data set is that many rows, shuffled anew in every epoch, for `epochs` epochs or without end;
    a last batch that is not full is left out. Without `size` no row comes twice. A loader made from the same
    arguments goes on after `set_state(get_state())` with the very batches that this one would have given;
    `set_state` raises ValueError for the state of another task or other arguments.
    """
    if batch_size < 1 or (size is not None and size < batch_size):
        raise ValueError(f"batch_size is {batch_size}, size {size}: a batch has at least one row, a data set a batch")
    if size is None and epochs is not None:
        raise ValueError(f"epochs is {epochs}, but fresh rows have none: give the size of an epoch, or no epochs")
    rows = grain.MapDataset.source(task.source(seed, size or _ENDLESS, split))
    if size is not None:
        rows = rows.seed(seed).shuffle().repeat(epochs)
    # Rows are made in microseconds: grain's reading threads would cost more than they bring.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    batches = rows.to_iter_dataset(options).batch(batch_size, drop_remainder=True, batch_fn=stack)
    arguments = {"batch_size": batch_size, "seed": seed, "size": size, "epochs": epochs, "split": split}
    return iter(Resumable(batches, {"task": describe(task), **arguments}))


class Stages:
    """A curriculum's batches: so many of each stage in turn, the last without end; resumable as the loaders are."""

    def __init__(self, stages: Sequence[tuple[int | None, Task]], length: int, rows: int, make: Any):
        self._stages, self._length, self._rows, self._make = stages, length, rows, make
        self._enter(0)

    def _enter(self, stage: int) -> None:
        self._stage, self._taken = stage, 0
        self._batches = self._make(self._stages[stage][1], stage)

    def __iter__(self) -> Stages:
        return self

    def __next__(self) -> Batch:
        while self._taken == self._stages[self._stage][0]:
            self._enter(self._stage + 1)
        self._taken += 1
        batch = {name: array.reshape(self._rows, -1) for name, array in next(self._batches).items()}
        missing = self._length - batch["tokens"].shape[1]
        return {name: np.pad(array, ((0, 0), (0, missing))) for name, array in batch.items()}

    def get_state(self) -> dict[str, Any]:
        return {"stage": self._stage, "taken": self._taken, "batches": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        if not 0 <= state["stage"] < len(self._stages):
            raise ValueError(f"stage {state['stage']} of {len(self._stages)}: the state of another curriculum")
        self._enter(state["stage"])
        self._batches.set_state(state["batches"])
        self._taken = state["taken"]


def make_stages_loader(
    stages: Sequence[tuple[int | None, Task]],
    *,
    batch_size: int,
    seed: int,
    size: int | None = None,
    packed: bool = False,
) -> Stages:
    """Batches of a curriculum: `(number of batches, task)` one stage after the other, the last without end (None).

    Rows are padded to the longest task's length, so that one program serves all; all tasks share a vocabulary. Each
    stage draws rows of its own. `size` as in `make_task_loader`, of every stage. `packed`: as many examples of a
    shorter task as fit stand in a row, each a document of its own.
    """
    if not stages or stages[-1][0] is not None or any(count is None or count < 1 for count, _ in stages[:-1]):
        counts = [count for count, _ in stages]
        raise ValueError(f"the stages have {counts} batches: each but the last has at least one, and the last None")
    vocabularies = {task.vocab_size for _, task in stages}
    if len(vocabularies) > 1:
        raise ValueError(f"the stages have vocabularies of {sorted(vocabularies)} tokens: a model has one")
    length = max(task.length for _, task in stages)

    def make(task: Task, stage: int) -> grain.DatasetIterator:
        examples = batch_size * (length // task.length if packed else 1)
        return make_task_loader(task, batch_size=examples, seed=_stage_seed(seed, stage), size=size)

    return Stages(stages, length, batch_size, make)


def _stage_seed(seed: int, stage: int) -> int:
    """The first stage has the run's own; the others do not repeat its rows."""
    return seed if stage == 0 else int(np.random.SeedSequence((seed, stage)).generate_state(1)[0])


def describe(task: Task) -> dict[str, Any]:
    """A task's name and settings, JSON-able."""
    return {"name": type(task).__name__, **dataclasses.asdict(cast(Any, task))}
