"""Comparisons with transformers are collected only where they are asked for: importing torch takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    wanted = config.getoption("markexpr")
    return True if collection_path.name.startswith("test_") and ("parity" not in wanted or "not " in wanted) else None
