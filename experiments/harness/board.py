"""The whole table's progress: a bar with the time left on a terminal, a line for each finished cell elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from seqmodels.train.progress import duration


class Board:
    def __init__(self, title: str, *, wanted: int, todo: int):
        self._title, self._wanted, self._ready = title, wanted, wanted - todo
        self._began = time.monotonic()
        self._part = 0.0
        self._cells: dict[str, TaskID] = {}
        self._console = Console()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), console=self._console
        )
        self._live = self._console.is_terminal
        self._whole = self._bar.add_task(title, total=1.0, told="")

    def __enter__(self) -> Board:
        already = f", {self._ready} of them done before" if self._ready else ""
        print(f"{self._title}: {self._wanted} cells{already}", flush=True)
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bar.stop()

    @property
    def left(self) -> str:
        """The time left as what is finished says."""
        if self._part <= 0:
            return "time left unknown"
        return f"{duration((time.monotonic() - self._began) * (1 - self._part) / self._part)} left"

    def show(self, part: float, cells: Mapping[str, float]) -> None:
        """`part`: how much of the work is finished; `cells`: the same of each that runs."""
        self._part = part
        if not self._live:
            return
        for label in set(self._cells) - set(cells):
            self._bar.remove_task(self._cells.pop(label))
        for label, own in cells.items():
            if label not in self._cells:
                self._cells[label] = self._bar.add_task(f"  {label}", total=1.0, told="")
            self._update(self._cells[label], completed=own, told=f"{own:.0%}")
        self._update(self._whole, completed=part, told=f"{self._ready} of {self._wanted} cells, {self.left}")

    def _update(self, task: TaskID, **fields: Any) -> None:
        self._bar.update(task, **fields)

    def finished(self, label: str, told: str) -> None:
        self._ready += 1
        line = f"[{self._ready}/{self._wanted}] {label}: {told}"
        if self._live:
            self._console.print(line, markup=False, highlight=False)
        else:
            print(f"{line}; {self.left}", flush=True)
