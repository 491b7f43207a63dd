"""Comparisons with transformers are collected only where they may run: importing torch takes seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Left out where the markers exclude them (bare pytest), or where the extra `parity` is not installed."""
    installed = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    excluded = "not parity" in config.getoption("markexpr") or not installed
    return True if collection_path.name.startswith("test_") and excluded else None


@pytest.fixture(autouse=True)
def compiled_in_a_hurry(request: pytest.FixtureRequest) -> None:
    """Compilation is most of the time here; `test_logits` runs programs as users do."""
    if "logits" not in request.node.name:
        request.getfixturevalue("quick_compilation")
