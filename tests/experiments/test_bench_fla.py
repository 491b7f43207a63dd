"""Kernels of others in the bench of the hot scans: what cannot be imported is named, what is timed is verified."""

from __future__ import annotations

import re
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest

from experiments.bench import by_hand, fla, kernels, kernels_cases, measure
from experiments.bench.case import over_heads
from experiments.bench.kernels_cases import FAMILIES, Shape
from experiments.bench.measure import Quartiles


def test_without_torch_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
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


def ssd(*arguments: Any) -> Any:
    return over_heads(by_hand.outer)(*fla.ssd_to_ours(*arguments))


def test_peers_are_verified_in_their_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fails says so in a note, and one that computes something else is not timed."""
    monkeypatch.setattr(kernels, "side_by_side", lambda runs, **_: dict.fromkeys(runs, Quartiles(1, 1, 1)))
    monkeypatch.setattr(kernels, "rates", lambda kind: measure.Rates(1, 1))
    right = lambda *x: kernels_cases.gated_linear_attention(*x)
    monkeypatch.setattr(kernels, "_functions", lambda *_: {"XLA chunked": right})
    scale = 1.0

    def made(peer: fla.Peer, inputs: Any, weights: Any, bounds: Any) -> fla.Made:
        if not scale:
            raise RuntimeError("out of shared memory")
        out, back = jax.vjp(ssd, *inputs)
        return lambda: out, lambda: out, (out * scale, list(back(weights)))

    monkeypatch.setattr(fla.Peer, "made", made)
    peers: dict[str, Any] = {peer.name: peer for peer in fla.PEERS if peer.to_ours is not None} | {"absent": "why"}
    take = lambda: list(kernels._measured(FAMILIES[0], Shape(1, 8, 1, 4), "float32", 0, peers))
    _, good, absent = take()
    assert good["implementation"] == "mamba_ssm mamba_chunk_scan_combined"
    assert good["error"] < 1e-4
    assert good["difference"] < 1e-4
    assert absent["note"] == "why"
    scale = 0.0
    assert [row.get("note") for row in take()] == [None, "why", "RuntimeError: out of shared memory"]
    scale = 1.01
    *_, wrong = take()
    assert wrong["failed"]
    assert re.match(r"AssertionError: .*mamba_chunk_scan_combined is off by .* not timed", wrong["note"])


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
    loop = ssd(c, b, x, dt)
    np.testing.assert_allclose(loop[:, -1], out, rtol=1e-12, atol=1e-12)
