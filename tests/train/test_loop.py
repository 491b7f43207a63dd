"""The loop: an interrupted run repeats itself to the bit, whatever interrupted it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from seqmodels import params
from seqmodels.train import Interrupted, RunMismatch, make_evaluator, train
from seqmodels.train.metrics import read_rows
from tests.train.tiny import BATCH, LENGTH, loader, texts, tiny_config, tiny_model

STEPS = 12


class Trouble:
    """Batches that do something before batch number `at` is handed out."""

    def __init__(self, at: int, act):
        self.inner, self.at, self.act, self.count = loader(), at, act, 0

    def __next__(self):
        self.count += 1
        if self.count == self.at:
            self.act()
        return next(self.inner)

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        self.inner.set_state(state)


def run(workdir: Path, batches=None, **changes):
    return train(tiny_model(), batches or loader(), tiny_config(steps=STEPS, **changes), workdir=workdir, quiet=True)


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[tuple[int, float]]:
    """The losses of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    result = run(workdir)
    found = losses(workdir)
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    assert found == [(row["step"], row["loss"]) for row in result.rows]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir() if path.is_dir()) == ["12", "8"]
    assert {"config.json", "environment.json", "curve.csv", "curve.png"} <= {path.name for path in workdir.iterdir()}
    assert len({loss for _, loss in found}) == STEPS
    return found


@pytest.mark.parametrize("at", [2, 7])  # before the first checkpoint, and between two
def test_a_crashed_run_goes_on_to_the_bit(tmp_path, whole, at):
    def crash():
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        run(tmp_path, Trouble(at, crash))
    assert losses(tmp_path) == whole[: at - 2]  # the last step's row was still to be fetched
    run(tmp_path)
    assert losses(tmp_path) == whole


@pytest.mark.parametrize(("signum", "at"), [(signal.SIGTERM, 6), (signal.SIGINT, 6), (signal.SIGTERM, STEPS)])
def test_a_signal_saves_first(tmp_path, whole, signum, at):
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match=f"after step {at}, which was saved") as stopped:
        run(tmp_path, Trouble(at, lambda: os.kill(os.getpid(), signum)))
    assert stopped.value.code == 128 + signum
    assert signal.getsignal(signum) is before
    assert losses(tmp_path) == whole[:at]
    assert (tmp_path / "checkpoints" / str(at)).is_dir()
    run(tmp_path)
    assert losses(tmp_path) == whole


@pytest.mark.slow
def test_a_run_with_dropout_goes_on_to_the_bit(tmp_path, whole):
    model = tiny_model(dropout=0.2)
    config = tiny_config(steps=STEPS)
    drop = lambda name, batches: train(model, batches, config, workdir=tmp_path / name, quiet=True)
    drop("whole", loader())
    with pytest.raises(Interrupted):
        drop("parts", Trouble(6, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    drop("parts", loader())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert not {loss for _, loss in losses(tmp_path / "whole")} & {loss for _, loss in whole}


def test_logging_and_saving_at_other_intervals_changes_no_number(tmp_path, whole):
    run(tmp_path, log_every=5, checkpoint_every=7)
    assert losses(tmp_path) == [whole[step - 1] for step in (1, 5, 10, 12)]


def test_a_finished_run_is_not_trained_again_and_may_be_prolonged(tmp_path, whole):
    result = run(tmp_path)
    again = train(tiny_model(), Trouble(1, pytest.fail), tiny_config(steps=STEPS), workdir=tmp_path, quiet=True)
    np.testing.assert_array_equal(again.arrays["embedding"], result.arrays["embedding"])
    more = train(tiny_model(), loader(), tiny_config(steps=STEPS + 2), workdir=tmp_path, quiet=True)
    assert losses(tmp_path)[:STEPS] == whole
    assert more.rows[-1]["step"] == STEPS + 2
    with pytest.raises(RunMismatch, match=r"train.steps: 14 -> 12"):
        run(tmp_path)


def test_other_settings_and_other_text_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(RunMismatch, match=r"train.learning_rate: 0.003 -> 0.1"):
        run(tmp_path, learning_rate=0.1)
    with pytest.raises(ValueError, match="other documents"):
        train(tiny_model(), _other_text(), tiny_config(steps=STEPS), workdir=tmp_path, quiet=True)


def _other_text():
    from seqmodels.data import make_loader

    return make_loader(texts(seed=1), batch_size=BATCH, length=LENGTH, seed=0)


def test_batches_that_cannot_be_saved_need_no_folder_but_get_none(tmp_path):
    batches = lambda: (batch for batch in loader())
    config = tiny_config(steps=2, evaluate_every=2)
    model = tiny_model()
    evaluate = make_evaluator(params.split(model)[0], texts(), batch_size=BATCH, length=LENGTH)
    result = train(model, batches(), config, evaluate=evaluate, quiet=True)
    assert result.rows[-1]["heldout_bits_per_byte"] == pytest.approx(evaluate(result.arrays)["bits_per_byte"])
    with pytest.raises(TypeError, match="get_state"):
        train(model, batches(), config, workdir=tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    def poisoned(model, batch, key):
        loss = params.split(model)[1]["embedding"].sum() / (batch["step"] < 3)
        return loss, {"loss": loss}

    batches = Trouble(0, None)
    batches.inner = _Counting()
    with pytest.raises(FloatingPointError, match="step 3 has loss"):
        train(tiny_model(), batches, tiny_config(checkpoint_every=1), workdir=tmp_path, loss=poisoned, quiet=True)
    assert (tmp_path / "checkpoints" / "2").is_dir()
    assert not (tmp_path / "checkpoints" / "3").exists()


class _Counting:
    def __init__(self):
        self.step = 0

    def __next__(self):
        self.step += 1
        return {"step": np.int32(self.step)}

    def get_state(self):
        return {"step": self.step}
