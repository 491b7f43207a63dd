"""The bench of training steps: it compares before it times."""

from __future__ import annotations

import pytest

from experiments.bench import peers


@pytest.mark.parity
def test_a_step_here_and_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    options = peers.configs()["mamba2"]
    monkeypatch.setattr(peers, "configs", lambda: {"mamba2": options})
    ours, theirs = peers.rows(quick=True, seed=0)
    assert theirs["implementation"].startswith("transformers 5.")
    assert 0 < ours["error"] == theirs["error"] < peers.TOLERANCE
    (verdict,) = peers.verdicts([ours, theirs])
    assert "times the tokens a second of transformers" in verdict
