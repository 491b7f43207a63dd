"""The bench of the hot scans: what is wrong is not timed, rows and report have what they promise."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import fla, kernels, measure
from experiments.bench.case import over_heads
from experiments.bench.kernels import FAMILIES, MATRICES, Shape
from experiments.bench.kernels_report import latest
from experiments.bench.measure import Quartiles

KEYS = ("device", "family", "implementation", "shape", "ms_forward", "ms_forward_backward", "floor_ms")

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_documents_fill_a_row_and_are_of_mixed_lengths() -> None:
    starts = Shape(1, 8192, 16, 128, documents=16).starts()
    sizes = np.diff([*starts, 8192])
    assert starts[0] == 0
    assert len(sizes) == 16
    assert 8 < sizes.max() / sizes.min() <= 16.5
    assert str(MATRICES[-1]) == "1x8192x16x128, 16 documents"


def test_rows_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "side_by_side", lambda runs, **_: measure.side_by_side(runs, budget=0, least=1))
    out = tmp_path / "cpu.jsonl"
    bench.main(["kernels", "--quick", "--shapes", "diagonal", "head 1x256", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["family"], row["implementation"]) for row in rows] == [
        ("outer, a decay per head", "XLA chunked"),
        *(("diagonal", name) for name in ("XLA auto", "XLA sequential", "XLA chunked", "associative_scan")),
    ]
    for row in rows:
        assert all(row[key] is not None for key in KEYS)
        assert row["ratio"] == pytest.approx(row["ms_forward"] / row["floor_ms"])
        assert row["error"] < kernels.TOLERANCE["float32"]
    text = (tmp_path / "cpu.md").read_text()
    assert "| diagonal | 2x256x32 | associative_scan |" in text
    assert "of the floor's rate; " in text
    assert rows[0]["device"] in text
    assert (tmp_path / "cpu.png").stat().st_size > 1000
    assert "written: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        pytest.param(family, wrong, marks=[] if family is FAMILIES[0] else pytest.mark.slow)
        for family in FAMILIES
        for wrong in ("output", "gradients")
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_is_wrong_is_not_timed(family: kernels.Family, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by one in a hundred, in the output or in the gradient of the second input alone."""
    monkeypatch.setattr(kernels, "side_by_side", lambda runs, **_: dict.fromkeys(runs, Quartiles(1, 1, 1)))
    name = {"outer": "gated_linear_attention", "delta, gated": "delta_rule", "exponential": "mlstm_scan"}
    function = name.get(family.name.split(",")[0]) or name.get(family.name) or f"{family.name}_scan"
    original = getattr(kernels, function)

    def off(*inputs: Any, **options: Any) -> Any:
        if wrong == "output":
            return (1.01 * original(*inputs, **options)[0],)
        first, second, *rest = inputs
        bent = 1.01 * second - 0.01 * jax.lax.stop_gradient(second)  # the same value
        return (original(first, bent, *rest, **options)[0],)

    shape = kernels.QUICK.get(family.name, kernels.SMALL)[-1]
    good = list(kernels._measured(family, shape, "float32", 0, {}))
    assert good[0]["error"] < 1e-4
    monkeypatch.setattr(kernels, function, off)
    with pytest.raises(AssertionError, match=r"is off by .* not timed"):
        list(kernels._measured(family, shape, "float32", 0, {}))


def test_the_latest_row_counts() -> None:
    row = dict.fromkeys(("device", "dtype", "family", "shape", "implementation"), "a") | {"bench": "kernels"}
    assert latest([{**row, "n": 1}, {**row, "bench": "scan"}, {**row, "n": 2}]) == [{**row, "n": 2}]


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no shape contains any of 7x7: there are outer, a decay per head 1x8192x96"):
        next(kernels.rows(quick=False, seed=0, shapes=("7x7",)))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"--peer fla: torch .* cannot be imported: pip install torch .*mamba-ssm"):
        next(kernels.rows(quick=True, seed=0, peer="fla"))


def _modules(monkeypatch: pytest.MonkeyPatch, *, cuda: bool = True, without: tuple[str, ...] = ()) -> None:
    """Stands in for torch and the modules of all peers; those of `without` cannot be imported."""
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: cuda))
    monkeypatch.setitem(sys.modules, "torch", torch)
    for peer in fla.PEERS:
        module = None if peer.module.split(".")[0] in without else types.ModuleType(peer.module)
        monkeypatch.setitem(sys.modules, peer.module, module)


def test_peers_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the packages is enough, and what the other one lacks is a row's note; without both there is an error."""
    _modules(monkeypatch)
    found = fla.implementations()
    assert {(family, name) for family in found for name in found[family]} == {(p.family, p.name) for p in fla.PEERS}
    assert set(found) <= {family.name for family in FAMILIES}
    _modules(monkeypatch, without=("mamba_ssm",))
    found = fla.implementations()
    name = "mamba_ssm mamba_chunk_scan_combined"
    told = found["outer, a decay per head"].pop(name)
    assert isinstance(told, str)
    assert re.match(r"mamba_ssm\.ops\S* \(.*\) cannot be imported: pip install mamba-ssm", told)
    assert not any(isinstance(peer, str) for peers in found.values() for peer in peers.values())
    _modules(monkeypatch, without=("fla", "mamba_ssm"))
    with pytest.raises(
        ValueError, match=r"--peer fla: fla.*, mamba_ssm.* cannot be imported: pip install torch flash-"
    ):
        fla.implementations()
    _modules(monkeypatch, cuda=False)
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        fla.implementations()


def test_peers_are_verified_in_their_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fails says so in a note, and one that computes something else is not timed."""
    monkeypatch.setattr(kernels, "side_by_side", lambda runs, **_: dict.fromkeys(runs, Quartiles(1, 1, 1)))
    monkeypatch.setattr(kernels, "rates", lambda kind: measure.Rates(1, 1))
    monkeypatch.setattr(kernels, "_functions", lambda *_: {})
    scale = 1.0

    def made(peer: fla.Peer, inputs: Any, weights: Any, bounds: Any) -> fla.Made:
        if not scale:
            raise RuntimeError("out of shared memory")
        out, back = jax.vjp(over_heads(fla.ssd_loop), *inputs)
        return lambda: out, lambda: out, (out * scale, list(back(weights)))

    monkeypatch.setattr(fla.Peer, "made", made)
    peers: dict[str, Any] = {peer.name: peer for peer in fla.PEERS if peer.loop is not None} | {"absent": "why"}
    take = lambda: list(kernels._measured(FAMILIES[0], Shape(1, 8, 1, 4), "float32", 0, peers))
    good, absent = take()
    assert good["implementation"] == "mamba_ssm mamba_chunk_scan_combined"
    assert good["error"] < 1e-4
    assert absent["note"] == "why"
    scale = 0.0
    assert [row["note"] for row in take()] == ["RuntimeError: out of shared memory", "why"]
    scale = 1.01
    with pytest.raises(AssertionError, match=r"mamba_chunk_scan_combined is off by .* not timed"):
        take()


@pytest.mark.usefixtures("x64")
def test_ssd_computes_a_decay_per_head() -> None:
    """Its recurrence, token by token and head by head, with the arguments made for it."""
    random = np.random.default_rng(0)
    batch, length, heads, size = 2, 7, 3, 4
    query, key, value = random.standard_normal((3, batch, length, heads, size))
    decay = -random.uniform(0.01, 2, (batch, length, heads))
    c, b, x, dt = map(np.asarray, fla.ssd_inputs(query, key, value, decay))
    assert x.dtype == np.float64
    state, expected = np.zeros((batch, heads, size, size)), np.zeros((batch, heads, size, size))
    for t in range(length):
        state = np.exp(-dt[:, t])[..., None, None] * state + np.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], b[:, t])
        expected = np.exp(decay[:, t])[..., None, None] * expected + np.einsum("bhk,bhv->bhkv", key[:, t], value[:, t])
        out = np.einsum("bhpn,bhn->bhp", state, c[:, t])
        np.testing.assert_allclose(out, np.einsum("bhk,bhkv->bhv", query[:, t], expected), rtol=1e-12, atol=1e-12)
    loop = over_heads(fla.ssd_loop)(c, b, x, dt)
    np.testing.assert_allclose(loop[:, -1], out, rtol=1e-12, atol=1e-12)
