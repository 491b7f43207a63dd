"""Cells of length generalisation: text and its windows, shared bases, measures, passkeys, and a checkpoint's cells."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import length_generalization, length_settings
from experiments.harness import NotTested, Scale, Work, lengths
from experiments.harness.cell import run_cell
from experiments.harness.command import command
from experiments.harness.passkeys import PasskeyRun, retrieval, tokenised
from experiments.harness.rows import settings
from experiments.harness.text import Text, Windows, read_text, spread_rows
from experiments.length_generalization import TABLE, below, copies, diverged, flat, reaches
from experiments.length_settings import BASE, BPTT, COPYING, FITTED, PASSING, PASSKEY, ZEROS, Options, headings
from seqmodels import ModelConfig
from seqmodels.data import DOCUMENT, documents
from seqmodels.data.tasks import Passkey
from seqmodels.hf import save_pretrained
from seqmodels.layers import NormConfig
from seqmodels.mixers import Mamba2Config
from seqmodels.train import InitialKind, InitialState, TrainConfig
from tests.experiments.fabricated import fabricated

TEXT = (np.arange(600) * 7919 % 251).astype(np.int32)
MIXER = Mamba2Config(head_size=16, state_size=8)
MODEL = ModelConfig(257, 16, (((MIXER,), 1),), norm=NormConfig(eps=1e-5), remat=False)
TRAIN = TrainConfig(steps=3, batch_size=2, length=8, learning_rate=1e-2, warmup=1)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "read_text", lambda corpus, encode=None: Text(TEXT, TEXT[::-1].copy()))


def test_a_corpus_is_one_row_of_its_documents_the_longest_first() -> None:
    heldout = documents("cpython", "heldout")
    text = read_text("cpython")
    assert len(text.heldout) == sum(len(one.bytes) + 1 for one in heldout)
    longest = max(heldout, key=lambda one: len(one.bytes)).bytes
    assert text.heldout[0] == DOCUMENT
    assert text.heldout[1 : len(longest) + 1].tobytes() == np.frombuffer(longest, np.uint8).astype(np.int32).tobytes()
    words = read_text("cpython", lambda text: [len(word) for word in text.split()])
    assert len(words.heldout) == sum(len(one.bytes.decode().split()) for one in heldout)


def test_windows_stand_for_themselves_or_go_on() -> None:
    make = lambda **kind: Windows(TEXT, batch_size=3, length=5, seed=1, **kind)
    alone, batches = make(), make(consecutive=True)
    first = [next(batches) for _ in range(150)]  # once around the ring, and on
    assert first[0]["start"].tolist() == [[True] + [False] * 4] * 3
    for before, after in itertools.pairwise(first):
        assert not after["start"].any()
        np.testing.assert_array_equal(after["tokens"][:, 0], before["targets"][:, -1])
    seen = {one["tokens"].tobytes() for one in (next(alone) for _ in range(10))}
    assert len(seen) == 10
    batch = next(alone)
    assert batch["start"][:, 0].all()
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    for batches in (alone, make(consecutive=True)):
        state = json.loads(json.dumps(batches.get_state()))
        again = make(consecutive=batches is not alone)
        again.set_state(state)
        np.testing.assert_array_equal(next(again)["targets"], next(batches)["targets"])
    with pytest.raises(ValueError, match="the state of other batches"):
        Windows(TEXT, batch_size=3, length=5, seed=2).set_state(alone.get_state())
    with pytest.raises(ValueError, match="a text of 5 tokens has no window of 5"):
        Windows(TEXT[:5], batch_size=1, length=5, seed=0)
    with pytest.raises(ValueError, match="has 600 tokens, and rows of 601 were asked"):
        spread_rows(TEXT, rows=2, length=601)
    np.testing.assert_array_equal(spread_rows(TEXT, rows=3, length=100)[:, 0], TEXT[[0, 250, 500]])


@pytest.mark.slow
def test_a_base_is_trained_once_and_gone_on_from(short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = Windows.__next__
    monkeypatch.setattr(Windows, "__next__", lambda self: taken.append(self._taken) or real(self))
    base = lengths.LengthRun(lengths.Trained(MODEL, TRAIN, "none"), length=8, longest=128, rows=2)
    work = lambda name: Work(0, tmp_path / name, lambda part: None)
    told = base.run(work("one"))
    assert taken == [0, 1, 2]
    assert list(told.curve["training"]["step"]) == [1, 2, 3]
    assert told.curve["loss"]["position"] == [8, 16, 32, 64, 128]
    assert told.metrics["rise"] == told.metrics["loss_last"] - told.metrics["loss_afresh"]
    assert told.metrics["perplexity_16x"] == pytest.approx(np.exp(told.metrics["loss_16x"]))
    assert 0 <= told.metrics["remembrance"] <= 1
    assert told.metrics["std_8x"] > 0
    taken.clear()
    config = dataclasses.replace(TRAIN, steps=2, initial=InitialState(InitialKind.TRUNCATED_BPTT))
    after = dataclasses.replace(base, post=config).run(work("two"))
    assert taken == [0, 1], "the base is not trained again"
    assert after.metrics["loss_last"] != told.metrics["loss_last"]
    assert len(list(tmp_path.glob("base-0-*.lock"))) == 1
    other = dataclasses.replace(base.base, train=dataclasses.replace(TRAIN, steps=4))
    monkeypatch.setattr(Windows, "__next__", raises)
    assert base.base.get(work("three")).loss == told.curve["training"]
    with pytest.raises(InterruptedError):  # other settings are another base, which has to be trained
        other.get(work("other"))


@pytest.mark.slow
def test_a_rise_is_told_from_the_same_text_read_afresh(short: None) -> None:
    """Every token of the last half, with 4 to 8 tokens before it."""
    model = MODEL.make(rngs=nnx.Rngs(0))
    metrics, _ = lengths.measure(model, TEXT, length=8, longest=64, rows=1)
    losses = []
    for before in range(4, 8):
        targets = np.arange(33 + before - 4, 65, 4)
        rows = TEXT[targets[:, None] - before - 1 + np.arange(before + 2)]
        hidden, _, _ = model.forward(jnp.asarray(rows[:, :-1]))
        told = jax.nn.log_softmax(model.logits(hidden)[:, -1].astype(jnp.float32))
        losses.extend(-told[np.arange(len(rows)), rows[:, -1]])
    assert len(losses) == 32
    np.testing.assert_allclose(metrics["loss_afresh"], np.mean(losses), rtol=1e-5)
    assert metrics["loss_1x"] != metrics["loss_afresh"]


def raises(self: Windows) -> None:
    raise InterruptedError


@pytest.mark.slow
def test_a_psm_has_losses_and_remembrance_but_no_state(short: None) -> None:
    from experiments import zoo

    model = dataclasses.replace(zoo.psm(16, chunk=4, heads=2), vocab_size=257).make(rngs=nnx.Rngs(0))
    metrics, curves = lengths.measure(model, TEXT, length=8, longest=64, rows=1)
    assert set(curves) == {"loss", "remembrance"}
    assert "std_1x" not in metrics
    assert metrics["last"] == 64


def test_passkeys_are_read_in_chunks_as_in_one_go() -> None:
    from experiments.harness.tasks import ask

    model = MODEL.make(rngs=nnx.Rngs(0))
    task = Passkey(length=150, depth=0.5)
    whole = ask(model, task, size=4, batch_size=4).metrics
    assert retrieval(model, task, size=4, chunk=64) == pytest.approx(whole)
    words = tokenised(task, lambda text: [len(word) for word in text.split()], 50)
    row = words.sample(np.random.default_rng(0))
    assert words.vocab_size == 50
    assert len(row.tokens) == 150
    assert row.targets[row.scored].tolist() == [5], "one word of five digits"
    assert dataclasses.replace(words, length=90, depth=0.1).spell("12345", 0.1).tokens.max() < 50


def test_a_passkey_cell(short: None, tmp_path: Path) -> None:
    base = lengths.Trained(MODEL, TRAIN, "none")
    config = dataclasses.replace(TRAIN, steps=2, initial=InitialState(InitialKind.FITTED_NOISE))
    run = PasskeyRun(base, Passkey(length=80), (1, 2), config, depths=(0.0, 1.0), size=2)
    told = run.run(Work(0, tmp_path / "one", lambda part: None))
    assert told.curve["passkey"]["length"] == [80, 160]
    assert set(told.curve["passkey"]) == {"length", "depth 0", "depth 1", "passkey"}
    assert told.metrics["reach"] in (0, 80, 160)


@pytest.mark.slow
def test_a_checkpoint_has_cells_and_its_place_is_no_setting(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny"
    save_pretrained(MODEL.make(rngs=nnx.Rngs(0)), folder)
    given = TABLE.given({"checkpoint": str(folder)})
    names = lambda table, scale: [cell.name for cell in table.at(scale)]
    more = set(names(given, Scale.SMOKE)) - set(names(TABLE, Scale.SMOKE))
    assert more == {f"tiny/{kind}" for kind in (BASE, FITTED)} | {f"passkey, tiny/{kind}" for kind in (BASE, FITTED)}
    cell = next(cell for cell in given.at(Scale.SMOKE) if cell.name == f"tiny/{FITTED}")
    assert cell.config.base.directory == str(folder)
    assert str(tmp_path) not in json.dumps(settings(cell.config))
    row = run_cell(given, Scale.SMOKE, f"tiny/{FITTED}", 0, tmp_path / "cell")
    assert row["metrics"]["last"] == 256
    assert row["metrics"]["loss_1x"] > 0

    official = next(cell for cell in TABLE.at(Scale.PAPER) if cell.name == f"mamba2-370m/{PASSING}")
    with pytest.raises(ValueError, match="the weights of mamba2-370m are needed: --checkpoint DIR/mamba2-370m"):
        official.config.run(Work(0, tmp_path, lambda part: None))
    named = headings(Scale.PAPER, Options("/elsewhere/mamba2-370m"))
    assert named["mamba2-370m"].base.directory == "/elsewhere/mamba2-370m"
    assert named["mamba2-370m"] == headings(Scale.PAPER, Options())["mamba2-370m"]
    small = dataclasses.replace(MODEL, vocab_size=200)
    save_pretrained(small.make(rngs=nnx.Rngs(0)), tmp_path / "small")
    with pytest.raises(ValueError, match="200 tokens, fewer than the 257 that bytes need"):
        lengths.Pretrained("small", "none", str(tmp_path / "small")).get(Work(0, tmp_path, lambda part: None))


def test_options_of_a_table_reach_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    command(TABLE, "experiments.length_generalization", "About.", ["--list", "--checkpoint", "/nowhere/some-model"])
    assert f"some-model/{BASE}: 0 of 1 seeds" in capsys.readouterr().out
    assert json.loads(TABLE.given({"checkpoint": "x"}).told()) == {"checkpoint": "x"}
    assert TABLE.given(None) is TABLE


def test_claims_stand_on_bases_that_diverge() -> None:
    good = {"rise": 0.02, "loss_1x": 2.0, "loss_last": 2.02}
    bad = {"rise": 1.0, "loss_1x": 2.0, "loss_last": 3.0}
    ends = lambda loss: {"loss_last": loss, "rise": loss - 2}
    results = lambda values: fabricated(TABLE, Scale.CPU, values)
    with pytest.raises(NotTested, match="the base of Mamba-2, GLA does not diverge"):
        diverged(results({("Mamba-2", BASE): good, ("GLA", BASE): good}))
    with pytest.raises(NotTested, match="no base was run"):
        diverged(results({("Mamba-2", ZEROS): ends(1.0)}))
    told = {("Mamba-2", BASE): good, ("GLA", BASE): bad, ("GLA", PASSING): ends(2.05), ("GLA", BPTT): ends(2.09)}
    assert diverged(results(told)) == ["GLA"]
    assert flat(results(told))
    assert not flat(results({**told, ("GLA", BPTT): ends(2.2)}))
    griffin = {(length_generalization.GRIFFIN, kind): bad for kind in (BASE, PASSING, BPTT)}
    assert flat(results({**told, **griffin})), "Griffin is judged by itself"
    assert not flat(results({**told, **griffin}), griffin=True)
    endless = {**told, ("GLA", BASE): {**bad, "rise": None, "loss_last": None}}
    assert diverged(results(endless)) == ["GLA"], "a loss that is not finite has diverged"
    passing: Callable[[Any], bool] = below(PASSING, BASE)
    assert passing(results(endless))
    assert passing(results(told))
    assert not passing(results({**told, ("GLA", PASSING): ends(3.5)}))
    assert not passing(results({**told, ("GLA", PASSING): ends(2.999)})), "a thousandth of a nat is nothing"
    copied = lambda zeros, passing: {
        (COPYING, ZEROS): {"token_accuracy": zeros}, (COPYING, PASSING): {"token_accuracy": passing}
    }  # fmt: skip
    assert copies(results(copied(0.2, 0.4)))
    assert not copies(results(copied(0.4, 0.2)))
    with pytest.raises(NotTested, match="neither copies more than guessing does"):
        copies(results(copied(0.04, 0.05)))
    found = lambda zeros, fitted: {(PASSKEY, ZEROS): {"reach": zeros}, (PASSKEY, FITTED): {"reach": fitted}}
    assert reaches(results(found(256, 512)))
    assert not reaches(results(found(256, 256)))
    with pytest.raises(NotTested, match="no passkey is found at any length"):
        reaches(results(found(0, 0)))
    assert length_settings.KINDS[FITTED] == InitialKind.FITTED_NOISE
