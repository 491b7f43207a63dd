"""The bench refuses to time what is wrong, and says what it measured."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from experiments.bench import __main__ as bench
from experiments.bench import case, measure, models, peers, scans
from experiments.bench.measure import Quartiles, Rates, Work
from seqmodels import ModelConfig, params
from seqmodels.layers.moe import MoEConfig
from seqmodels.mixers import GLAConfig, examples


def test_a_wrong_implementation_is_not_timed() -> None:
    right = {"a": np.ones(3), "b": np.arange(4.0)}
    assert measure.verify("right", right, right, 1e-6) == 0
    wrong = {"a": np.ones(3), "b": np.arange(4.0) * 1.01}
    with pytest.raises(AssertionError, match=r"wrong is off by 1\.0e-02 of its largest entry .* not timed"):
        measure.verify("wrong", wrong, right, 1e-3)
    with pytest.raises(AssertionError, match="not timed"):
        measure.verify("no number", {**right, "a": np.full(3, np.nan)}, right, 1e-3)


def test_every_case_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of one in a hundred in what the library computes stops the bench."""
    original = scans.gated_linear_attention
    monkeypatch.setattr(scans, "gated_linear_attention", lambda *x, **o: (1.01 * original(*x, **o)[0], None))
    monkeypatch.setattr(case, "side_by_side", lambda runs: dict.fromkeys(runs, Quartiles(1, 1, 1)))
    with pytest.raises(AssertionError, match="chunked, forward is off by"):
        list(scans._outer(8, 0))


def test_runs_are_timed_by_turns() -> None:
    order: list[str] = []
    runs = {name: functools.partial(lambda name: order.append(name) or jnp.zeros(()), name) for name in "ab"}
    found = measure.side_by_side(runs, budget=0, least=4)
    assert "".join(order[-16:]) == "aabbbbaaaabbbbaa"  # each once more before its turn
    assert all(taken.low <= taken.median <= taken.high for taken in found.values())


def test_the_share_is_that_of_the_tighter_bound() -> None:
    assert Rates(copy=10, product=100).share(Work(moved=20, operations=100), seconds=4) == 0.5
    assert Rates(copy=10, product=100).share(Work(moved=20, operations=800), seconds=16) == 0.5


def test_compilation_is_counted_anew_each_time() -> None:
    traced = []

    def double(x: Any) -> Any:
        traced.append(x)
        return 2 * x

    for _ in range(2):
        program = measure.compiled(double, jnp.ones(3))
        np.testing.assert_array_equal(program.run(jnp.ones(3)), 2 * np.ones(3))
        assert program.seconds > 0
    assert len(traced) == 2


def test_verdicts() -> None:
    def row(name: str, implementation: str, median: float) -> dict[str, Any]:
        return {
            "case": name,
            "direction": "forward",
            "implementation": implementation,
            "seconds": {"low": 0, "median": median, "high": 0},
        }

    names = ("lax.scan", "lax.associative_scan", "auto")
    found = [row(name, *item) for name in ("diagonal", "outer") for item in zip(names, (2.0, 4.0, 1.0), strict=True)]
    assert list(scans.verdicts(found)) == [
        "diagonal, forward: 0.50 of the time of the better of the two",
        "outer, forward: 2.0 x lax.scan, 4.0 x associative_scan",
    ]
    decoded = [
        {"case": "decode x", "context": context, "seconds": {"median": seconds}, "state_bytes": 8}
        for context, seconds in ((1024, 2.0), (32768, 3.0))
    ]
    assert list(models.decode_verdicts(decoded)) == [
        "decode x: a token at 32,768 takes 1.50 of one at 1,024, state 8 and 8 bytes"
    ]


def test_rows_say_where_they_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows" / "bench.jsonl"
    bench.main(["step", "--quick", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"] for row in rows] == ["step dispatch", "step whole"]
    for name in ("command", "commit", "device", "versions", "seed", "rates"):
        assert all(row[name] is not None or name == "commit" for row in rows)
    assert "| step dispatch |" in capsys.readouterr().out


def test_peers_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"needs the extra `parity` \(torch is missing\).*make test-parity"):
        next(peers.rows(quick=True, seed=0))


def test_the_work_of_a_peer_is_that_of_the_parameters_a_token_meets() -> None:
    experts = MoEConfig(experts=4, top_k=2, hidden_size=8)
    model = ModelConfig(11, 16, ((((GLAConfig(heads=2)), experts), 3),), tied=False).make(rngs=nnx.Rngs(0))
    sizes = {path: array.size for path, array in traverse_util.flatten_dict(params.split(model)[1], sep=".").items()}
    all_but = sum(size for path, size in sizes.items() if path.endswith("kernel") and "steps.1" not in path)
    inside = {path: size for path, size in sizes.items() if "steps.1.layer" in path}
    routed = sum(size for path, size in inside.items() if "router" not in path)
    assert peers._in_products(model) == all_but + sum(inside.values()) - routed / 2


@pytest.mark.slow
def test_scans_and_decoding_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (case, models):  # a few turns: the figures mean nothing
        monkeypatch.setattr(module, "side_by_side", lambda runs, **_: measure.side_by_side(runs, budget=0, least=1))
    monkeypatch.setattr(models, "examples", lambda: [(n, c) for n, c in examples() if n in ("rg_lru", "attention")])
    bench.main(["scan", "decode", "--quick", "--out", str(tmp_path / "bench.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert {row["bench"] for row in rows} == {"scan", "decode"}
    assert all(row["error"] < 1e-3 for row in rows)
    assert jax.default_backend() in rows[0]["device"]
