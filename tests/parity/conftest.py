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
