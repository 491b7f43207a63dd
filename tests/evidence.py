"""How far the library is from its oracles: tests record the errors they find, `pytest --evidence FILE` keeps them.

The file holds the largest error of each system and oracle; what a run does not test stays in it as it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

_largest: dict[str, dict[str, float]] = {}


def record(system: str, oracle: str, error: float) -> None:
    """`system`: a config's class or a published architecture; `oracle`: a file or package, `error`: what it is off."""
    own = _largest.setdefault(system, {})
    own[oracle] = max(own.get(oracle, 0.0), float(error))


def relative_error(actual: Any, expected: Any) -> float:
    """The largest difference, as a part of the largest expected entry."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def write(path: Path) -> None:
    """Two digits: the rest differs from machine to machine."""
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for system, own in _largest.items():
        known.setdefault(system, {}).update({oracle: float(f"{error:.1e}") for oracle, error in own.items()})
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
