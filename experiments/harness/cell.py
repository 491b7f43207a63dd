"""A cell in a process of its own: from its name to its row."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.harness.rows import Row, described
from experiments.harness.table import Cell, Curve, Scale, Table, Work

RUN_CELL = "--run-cell"  # a process for one cell: --run-cell SCALE NAME SEED FOLDER OPTIONS
ROW, PROGRESS, SECONDS = "row.json", "progress", "seconds"
POINTS = 200  # of a curve in a row; longer ones are thinned
_EVERY = 0.5  # seconds between two reports


def slug(name: str) -> str:
    """A cell's name as that of a folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name.replace("-1", "m1")).strip("-")


def find(table: Table, scale: Scale, name: str) -> Cell:
    for cell in table.at(scale):
        if cell.name == name:
            return cell
    raise ValueError(f"{table.name} has no cell {name!r} at scale {scale}")


def run_cell(table: Table, scale: Scale, name: str, seed: int, folder: Path) -> Row:
    """Runs a cell in `folder`, where it goes on if it was stopped, and leaves its row there."""
    from seqmodels.train.files import replace_file
    from seqmodels.train.run import environment

    cell = find(table, scale, name)
    folder.mkdir(parents=True, exist_ok=True)
    began, before = time.perf_counter(), _number(folder / SECONDS)
    spent = lambda: before + time.perf_counter() - began
    try:
        outcome = cell.config.run(Work(seed, folder, _reporter(folder / PROGRESS)))
    finally:
        replace_file(folder / SECONDS, f"{spent()}\n")
    told = environment()
    row = {
        "scale": str(scale),
        "cell": cell.name,
        "seed": seed,
        "config": described(cell),
        "metrics": {key: _finite(value) for key, value in outcome.metrics.items()},
        "curve": {key: thinned(curve) for key, curve in outcome.curve.items()},
        **{key: told[key] for key in ("versions", "device", "commit")},
        "seconds": round(spent(), 1),
        "time": told["time"],
    }
    replace_file(folder / ROW, json.dumps(row) + "\n")
    return row


def _number(path: Path) -> float:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return 0.0


def _reporter(path: Path) -> Callable[[float], None]:
    last = 0.0

    def report(part: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _EVERY:
            last = now
            path.write_text(f"{part:.4f}")

    return report


def progress_of(folder: Path) -> float:
    """The finished part of a cell that runs in `folder`."""
    return min(max(_number(folder / PROGRESS), 0.0), 1.0)


def _finite(value: Any) -> float | None:
    """JSON has no NaN: what is not finite becomes null."""
    value = float(value)
    return value if math.isfinite(value) else None


def thinned(curve: Curve) -> Mapping[str, list[float | None]]:
    """At most `POINTS` points of a curve, its first and last among them, to six digits."""
    length = len(next(iter(curve.values()), ()))
    if any(len(column) != length for column in curve.values()):
        sizes = {name: len(column) for name, column in curve.items()}
        raise ValueError(f"the columns of a curve have different lengths: {sizes}")
    count = min(length, POINTS)
    chosen = [round(i * (length - 1) / max(count - 1, 1)) for i in range(count)]
    rounded = lambda value: None if value is None or _finite(value) is None else float(f"{float(value):.6g}")
    return {name: [rounded(column[i]) for i in chosen] for name, column in curve.items()}
