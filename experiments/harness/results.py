"""What a table's rows say together: over seeds, and the best of a sweep."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence

from experiments.harness.rows import Row
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

    def values(self, metric: str) -> list[float]:
        return [row["metrics"][metric] for row in self.rows if row["metrics"].get(metric) is not None]


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
        return Entry(model, setting, best, len(variants), tuple(good[best]), failures)

    def entry(self, model: str, setting: str) -> Entry:
        """Raises NotTested where the scale has no such cell, or none of its runs ended well."""
        for entry in self.entries:
            if (entry.model, entry.setting) == (model, setting):
                if not entry.rows:
                    raise NotTested(f"no run of {model} in {setting}")
                return entry
        raise NotTested(f"{model} in {setting} is not run at this scale")

    def value(self, model: str, setting: str, metric: str | None = None, *, over: str = "mean") -> float:
        """A metric (by default the main one) over seeds: their `mean`, or the `best` of them.

        Raises NotTested where there is none.
        """
        measure = next((m for m in self.table.measures if m.name == metric), self.main)
        name = metric or self.main.name
        values = self.entry(model, setting).values(name)
        if not values:
            raise NotTested(f"no {name} of {model} in {setting}")
        if over == "best":
            found = max(values) if measure.better == "higher" else min(values)
        else:
            found = statistics.mean(values)
        told = measure.form.format(found) if measure.name == name else f"{found:.3g}"
        self.read.append(f"{model}, {setting}: {told}")
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
