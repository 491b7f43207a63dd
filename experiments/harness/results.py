"""What a table's rows say together: over seeds, and the best of a sweep."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Literal

from experiments.harness.rows import Row, Rows
from experiments.harness.table import Cell, Measure, Scale, Table


class NotTested(Exception):
    """The results cannot tell, and why."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model in one setting: the rows of the chosen variant that did not fail, one a seed."""

    model: str
    setting: str
    variant: str
    variants: int
    rows: tuple[Row, ...]
    failures: tuple[Row, ...]
    swept: tuple[tuple[str, tuple[Row, ...]], ...] = ()
    """Every variant with its rows that did not fail."""

    def values(self, metric: str) -> list[float]:
        return [row["metrics"][metric] for row in self.rows if row["metrics"].get(metric) is not None]

    def of_all(self, metric: str) -> list[float]:
        """The values of every variant's runs, not of the chosen one's alone."""
        found = [row["metrics"].get(metric) for _, rows in self.swept for row in rows]
        return [value for value in found if value is not None]

    def endless(self, metric: str) -> int:
        """How many rows have the metric, but not as a finite number."""
        return sum(metric in row["metrics"] and row["metrics"][metric] is None for row in self.rows)


class Results:
    """The rows of a table at one scale. What claims read is kept in `read`, for the report to show."""

    def __init__(self, table: Table, scale: Scale, found: Sequence[tuple[Cell, Row]]):
        self.table, self.scale = table, scale
        self.read: list[str] = []
        self.cells = table.at(scale)
        groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
        for cell in self.cells:
            groups.setdefault((cell.setting, cell.model), {})[cell.variant] = []
        for cell, row in found:
            groups[cell.setting, cell.model][cell.variant].append(row)
        self.entries = [self._entry(*key, variants) for key, variants in groups.items()]

    @property
    def main(self) -> Measure:
        return self.table.measures[0]

    def _entry(self, setting: str, model: str, variants: dict[str, list[Row]]) -> Entry:
        good = {name: [row for row in rows if "error" not in row] for name, rows in variants.items()}
        failures = tuple(row for rows in variants.values() for row in rows if "error" in row)

        def rank(name: str) -> tuple[bool, float]:
            values = [row["metrics"].get(self.main.name) for row in good[name]]
            if not values or None in values:
                return False, 0.0
            return True, statistics.mean(values) * (1 if self.main.better == "higher" else -1)

        best = max(good, key=rank)
        swept = tuple((name, tuple(rows)) for name, rows in good.items())
        return Entry(model, setting, best, len(variants), tuple(good[best]), failures, swept)

    @classmethod
    def of(cls, table: Table, rows: Rows) -> Results:
        """What the rows of a file say of a table as it is now."""
        return cls(table, rows.scale, rows.found(table.at(rows.scale)))

    def entry(self, model: str, setting: str) -> Entry:
        """Raises NotTested where the scale has no such cell, or none of its runs ended well."""
        for entry in self.entries:
            if (entry.model, entry.setting) == (model, setting):
                if not entry.rows:
                    raise NotTested(f"no run of {model} in {setting}")
                return entry
        raise NotTested(f"{model} in {setting} is not run at this scale")

    def value(
        self,
        model: str,
        setting: str,
        metric: str | None = None,
        *,
        over: Literal["mean", "best"] = "mean",
        endless: float | None = None,
    ) -> float:
        """A metric (by default the main one): its `mean` over seeds, or the `best` of all seeds and variants.

        Raises NotTested where there is none, or where one is not a finite number; `endless` stands for it, where given.
        """
        measure = next((m for m in self.table.measures if m.name == metric), self.main)
        name = metric or self.main.name
        entry = self.entry(model, setting)
        values = entry.values(name)
        if endless is not None and entry.endless(name):
            self.read.append(f"{model}, {setting}: not finite")
            return endless
        if not values or entry.endless(name):
            kind = "no finite" if entry.endless(name) else "no"
            raise NotTested(f"{kind} {name} of {model} in {setting}")
        form = lambda value: measure.form.format(value) if measure.name == name else f"{value:.3g}"
        found, told = statistics.mean(values), ""
        if over == "best":
            runs = entry.of_all(name)
            found = max(runs) if measure.better == "higher" else min(runs)
            told = f", best of {len(runs)} runs, whose mean is {form(statistics.mean(runs))}" if len(runs) > 1 else ""
        self.read.append(f"{model}, {setting}: {form(found)}{told}")
        return found

    def models(self, setting: str) -> list[str]:
        """The models with a run in this setting, in the table's order."""
        return [entry.model for entry in self.entries if entry.setting == setting and entry.rows]

    def settings(self) -> list[str]:
        return list(dict.fromkeys(entry.setting for entry in self.entries))

    def curves(self, name: str, setting: str | None = None) -> Iterator[tuple[Entry, list[dict[str, list[float]]]]]:
        """The curves of that name, one a seed, of every entry that has some."""
        for entry in self.entries:
            found = [row["curve"][name] for row in entry.rows if name in row["curve"]]
            if found and setting in (None, entry.setting):
                yield entry, found

    def said(self) -> list[str]:
        """What was read since the last call, each once."""
        told, self.read = list(dict.fromkeys(self.read)), []
        return told
