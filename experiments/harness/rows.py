"""Rows: one JSON line a finished cell, in a file that a stopped table goes on with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.harness.table import Cell, Scale
from seqmodels.train.files import replace_file, writing
from seqmodels.train.run import as_json, differences

Row = dict[str, Any]
KEYS = ("scale", "cell", "seed", "config", "metrics", "curve", "versions", "device", "commit", "seconds")


def settings(value: Any) -> Any:
    """A config as JSON without the fields that have their default, so that new fields leave old rows as they are.

    Fields that do not count when configs are compared (`dataclasses.field(compare=False)`) are no settings either.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        told = {}
        for field in dataclasses.fields(value):
            if not field.compare:
                continue
            held = getattr(value, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if default is dataclasses.MISSING or held != default:
                told[field.name] = settings(held)
        return {"type": type(value).__name__, **told}
    if isinstance(value, (tuple, list)):
        return [settings(item) for item in value]
    if isinstance(value, dict):
        return {str(name): settings(item) for name, item in value.items()}
    return as_json(value)


def described(cell: Cell) -> dict[str, Any]:
    """A row's `config`: the cell's settings, and in `changes` how they differ from those of its parent."""
    own = settings(cell.config)
    told = {"model": cell.model, "setting": cell.setting, "variant": cell.variant, "settings": own}
    return told if cell.parent is None else {**told, "changes": differences(settings(cell.parent), own)}


def compared(config: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs one: a row's `config` without `changes`, which the parent alone may alter."""
    return {name: value for name, value in config.items() if name != "changes"}


class Rows:
    """The rows of one table at one scale, in `FOLDER/SCALE.jsonl`, by (cell, seed); the later of two counts."""

    def __init__(self, folder: Path, scale: Scale):
        self.scale, self.path = scale, folder / f"{scale}.jsonl"
        self._rows: dict[tuple[str, int], Row] = {}
        if self.path.exists():
            for number, line in enumerate(self.path.read_text().splitlines(), start=1):
                self._take(self._parsed(number, line))

    def _parsed(self, number: int, line: str) -> Row:
        try:
            row = json.loads(line)
            missing = [key for key in KEYS if key not in row]
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"line {number} of {self.path} is no JSON row ({error}): take that line out, its cell is run again"
            ) from None
        if missing:
            raise ValueError(f"line {number} of {self.path} lacks {', '.join(missing)}: take it out, or mend it")
        return row

    def _take(self, row: Row) -> None:
        self._rows[row["cell"], row["seed"]] = row

    def add(self, row: Row) -> None:
        """Keeps a row, in place of an older one of the same cell and seed, on disk before this returns."""
        self._take(row)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, "".join(json.dumps(row) + "\n" for row in self._rows.values()))

    def of(self, cell: Cell, seed: int) -> Row | None:
        """The row of this cell as it is now; None where it was not run, or with other settings."""
        row = self._rows.get((cell.name, seed))
        now = json.loads(json.dumps(compared(described(cell))))
        return row if row is not None and compared(row["config"]) == now else None

    def done(self, cell: Cell, seed: int) -> bool:
        """Whether there is a row that does not tell of a failure."""
        row = self.of(cell, seed)
        return row is not None and "error" not in row

    def found(self, cells: Iterable[Cell]) -> list[tuple[Cell, Row]]:
        """The cells' rows as they are now, failures included, by seed."""
        seeds = sorted({seed for _, seed in self._rows})
        return [(cell, row) for cell in cells for seed in seeds if (row := self.of(cell, seed)) is not None]

    def outdated(self, cells: Iterable[Cell]) -> list[str]:
        """Cells, and seeds, whose rows were run with settings that the table no longer has."""
        current = {cell.name: cell for cell in cells}
        stale = [key for key in self._rows if key[0] not in current or self.of(current[key[0]], key[1]) is None]
        return [f"{name} seed {seed}" for name, seed in stale]
