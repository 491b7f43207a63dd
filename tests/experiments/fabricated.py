"""Results that were never run, for claims to be tested on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.harness import Results, Scale, Table


def fabricated(
    table: Table,
    scale: Scale,
    values: Mapping[tuple[str, str], Mapping[str, Any]],
    curves: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
) -> Results:
    """Rows of a scale with these metrics, and curves, by setting and model: the same for every variant."""
    known = {(cell.setting, cell.model) for cell in table.at(scale)}
    assert set(values) <= known, f"no cell of {scale}: {set(values) - known}"
    found = [
        (cell, {"cell": cell.name, "seed": 0, "metrics": values[key], "curve": (curves or {}).get(key, {})})
        for cell in table.at(scale)
        if (key := (cell.setting, cell.model)) in values
    ]
    return Results(table, scale, found)
