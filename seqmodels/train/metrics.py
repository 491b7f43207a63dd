"""The record of a run: one JSON row per logged step, its loss curve as CSV and PNG."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a metrics file; a last line that a kill cut short is left out."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def replace_file(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one, nothing between."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


class MetricsLog:
    """Appends rows to `metrics.jsonl`; rows after step `since` are cut first, so that a resumed run repeats none.

    With `path=None` rows are only kept in memory.
    """

    def __init__(self, path: str | Path | None, *, since: int = 0) -> None:
        self.rows: list[Row] = []
        self._file = None
        if path is not None:
            path = Path(path)
            self.rows = [row for row in read_rows(path) if row["step"] <= since]
            replace_file(path, "".join(json.dumps(row) + "\n" for row in self.rows))
            self._file = path.open("a")

    def write(self, row: Row) -> None:
        self.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Before a checkpoint: the rows of its steps must not be younger on disk than itself."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def write_curve(rows: Sequence[Mapping[str, Any]], folder: str | Path, *, title: str = "") -> list[Path]:
    """`curve.csv` with every number of every row, and `curve.png` of the loss; returns their paths."""
    if not rows:
        return []
    folder = Path(folder)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "curve.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    _draw(rows, folder / "curve.png", title)
    return [folder / "curve.csv", folder / "curve.png"]


def _draw(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    # the object interface: no global backend is touched, so it works in notebooks and without a display alike
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="training")
    held_out = [(row["step"], row["heldout_loss"]) for row in rows if "heldout_loss" in row]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", label="held out")
        axes.legend()
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
