"""What a table is: cells to run, what the paper says of them, and what it claims."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.harness.results import Results


class Scale(enum.StrEnum):
    """How much of a table is run: `smoke` seconds; `cpu` an hour on 2 cores; `gpu` half an hour on one; `paper` all."""

    SMOKE = "smoke"
    CPU = "cpu"
    GPU = "gpu"
    PAPER = "paper"


Curve = Mapping[str, Sequence[float | None]]
"""Columns of one length, the first of them the horizontal axis: {"position": [..], "accuracy": [..]}."""


class Outcome(NamedTuple):
    """What a cell measured: scalars, and curves by name."""

    metrics: Mapping[str, float]
    curve: Mapping[str, Curve] = {}


class Work(NamedTuple):
    """What a cell gets to run with: `folder` outlives a stop of the process, `report` takes the finished part of 1."""

    seed: int
    folder: Path
    report: Callable[[float], None]


@runtime_checkable
class Runnable(Protocol):
    """A cell's config: a frozen dataclass that says all there is to run."""

    def run(self, work: Work) -> Outcome: ...


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model in one setting; a seed makes it a run. `config` is a diff against `parent`, which rows record.

    `variant` names one point of a sweep (a learning rate): the report takes the best one. `cost` is the time that it
    takes beside other cells, for the estimate of the time left.
    """

    model: str
    setting: str
    config: Any
    parent: Any = None
    variant: str = ""
    cost: float = 1.0

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.setting, self.model, self.variant) if part)


@dataclasses.dataclass(frozen=True)
class Measure:
    """A metric as a column of the report; the table's first one decides what is best."""

    name: str
    title: str
    form: str = "{:.3f}"
    better: Literal["higher", "lower"] = "higher"


@dataclasses.dataclass(frozen=True)
class Published:
    """A number from the paper. `where` it stands there; `verified`: how it came here, and how far it was checked.

    `measure`: what it is a value of, by default the table's first; `over`: it is the mean over runs, or the best one.
    """

    model: str
    setting: str
    value: float
    where: str
    verified: str
    measure: str | None = None
    over: Literal["mean", "best"] = "mean"


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the paper says, and whether the results agree: `test` raises NotTested where they cannot say."""

    text: str
    where: str
    test: Callable[[Results], bool]


@dataclasses.dataclass(frozen=True)
class Table:
    """`cells(scale)` in the order of the report. `seeds`: how many runs of each cell, where no flag says.

    `alone`: one cell at a time with the whole machine, for measurements of time. `options`: what the table's command
    takes besides, a frozen dataclass whose fields are strings, numbers or None and have defaults; they are given to
    `cells(scale, options)` then.
    """

    name: str
    title: str
    paper: str
    cells: Callable[..., Iterable[Cell]]
    measures: tuple[Measure, ...]
    seeds: Mapping[Scale, int]
    published: tuple[Published, ...] = ()
    claims: tuple[Claim, ...] = ()
    plot: Callable[[Results, Figure], None] | None = None
    alone: bool = False
    options: Any = None

    def at(self, scale: Scale) -> list[Cell]:
        """The cells of a scale; raises ValueError where two have one name."""
        cells = list(self.cells(scale) if self.options is None else self.cells(scale, self.options))
        twice = [name for name, times in Counter(cell.name for cell in cells).items() if times > 1]
        if twice:
            raise ValueError(f"{self.name} has several cells named {', '.join(twice)}: give each a variant of its own")
        return cells

    def told(self) -> str:
        """The options as JSON, for a process that runs one cell."""
        return json.dumps(None if self.options is None else dataclasses.asdict(self.options))

    def given(self, options: Mapping[str, Any] | None) -> Table:
        """The table with other options, by name."""
        return dataclasses.replace(self, options=dataclasses.replace(self.options, **options)) if options else self
