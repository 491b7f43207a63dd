"""The bench of training steps: its row, and which part of a program's time is taken by products."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import training


@pytest.mark.slow
def test_a_row_says_how_fast_and_how_much_is_outside_products(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "MODELS", ("GLA",))
    out = tmp_path / "training.jsonl"
    bench.main(["training", "--quick", "--out", str(out)])
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["case"] == "train GLA"
    assert row["tokens_per_second"] == pytest.approx(2 * 64 / row["seconds"]["median"])
    assert 0 < row["outside_products"] < 1
    assert "of the time outside products" in capsys.readouterr().out


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the profiler names instructions on CPUs alone")
@pytest.mark.parametrize("multiplies", [True, False])
def test_products_are_told_from_the_rest(multiplies: bool) -> None:
    x = jnp.ones((256, 256))
    program = jax.jit(lambda x: x @ x if multiplies else jnp.sort(jnp.sin(x), axis=0)).lower(x).compile()
    share = training.outside_products(lambda: program(x), program.as_text())
    assert share is not None
    assert share < 0.5 if multiplies else share == 1
