"""What `seqmodels` itself exports, and what importing it costs."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import seqmodels

HOMES = {
    "Context": "seqmodels.typing",
    "LanguageModel": "seqmodels.models.lm",
    "ModelConfig": "seqmodels.models.lm",
    "Recurrence": "seqmodels.scan",
    "Segments": "seqmodels.typing",
}


def test_the_exports_are_the_objects_of_their_modules() -> None:
    assert sorted(seqmodels.__all__) == sorted(HOMES)
    for name, home in HOMES.items():
        assert getattr(seqmodels, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="no attribute 'Recurence'"):
        _ = seqmodels.Recurence


def test_the_scan_package_is_not_hidden_by_a_function_of_its_name() -> None:
    from seqmodels.scan import scan, sharded_scan, step

    assert all(callable(f) for f in (scan, sharded_scan, step))
    assert importlib.import_module("seqmodels.scan") is seqmodels.scan


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Commands print their help within two seconds: the package itself must not cost jax's import."""
    check = "import sys, seqmodels; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
