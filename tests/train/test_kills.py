"""Processes killed at any moment: what is left goes on to the bit."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from seqmodels.train import train
from seqmodels.train.metrics import read_rows
from tests.train.runner import MARKER
from tests.train.tiny import loader, tiny_config, tiny_model

COMMAND = [sys.executable, "-m", "tests.train.runner"]
QUICK_STEPS, QUICK_EVERY = 10, 4
STEPS = 300
# where the kills of the slow test fall: during a save, after some steps, or anywhere from the process's start on
KILLS = {"save": 8, "steps": 8, "start": 4}
SAVE_SECONDS = 0.06  # about the length of a save
ROWS = 10  # a process that was not killed before is killed after so many: the run shall outlive all kills


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(workdir / "metrics.jsonl")]


def wait_until(done, process: subprocess.Popen, what: str) -> None:
    end = time.monotonic() + 120
    while not done():
        assert process.poll() is None, f"the process ended before {what}"
        assert time.monotonic() < end, f"two minutes without {what}"
        time.sleep(0.001)


def wait(seconds: float, enough: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not enough():
        time.sleep(0.001)


def kill(process: subprocess.Popen) -> None:
    assert process.poll() is None, "it finished before it could be killed"
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_run_killed_during_a_save_goes_on_to_the_bit(tmp_path):
    config = tiny_config(steps=QUICK_STEPS, checkpoint_every=QUICK_EVERY)
    run = lambda workdir: train(tiny_model(), loader(), config, workdir=workdir, quiet=True)
    killed = tmp_path / "killed"
    process = subprocess.Popen([*COMMAND, str(killed), str(QUICK_STEPS), str(QUICK_EVERY)])
    wait_until((killed / MARKER).exists, process, "a save")
    kill(process)
    assert (killed / MARKER).exists(), "the kill missed the save"
    run(tmp_path / "whole")
    run(killed)
    assert losses(killed) == losses(tmp_path / "whole")
    assert len(losses(killed)) == QUICK_STEPS
    assert not list((killed / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_a_run_killed_twenty_times_goes_on_to_the_bit(tmp_path):
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")  # shown if the test fails
    random = np.random.default_rng(seed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    marker = killed / MARKER
    subprocess.run([*COMMAND, str(whole), str(STEPS)], check=True, timeout=300)
    reached = lambda row: len(losses(killed)) >= row
    startup, inside = 1.0, 0
    for kind in random.permutation([kind for kind, count in KILLS.items() for _ in range(count)]):
        began, before = time.monotonic(), len(losses(killed))
        process = subprocess.Popen([*COMMAND, str(killed), str(STEPS)])
        enough = lambda before=before: reached(before + ROWS)
        if kind == "start":
            wait(random.uniform(0, startup), enough)
        elif kind == "save":
            wait_until(marker.exists, process, "a save")
            wait(random.uniform(0, SAVE_SECONDS), enough)
        else:
            wanted = before + int(random.integers(1, ROWS))
            wait_until(lambda wanted=wanted: reached(wanted), process, f"row {wanted}")
            startup = time.monotonic() - began
            wait(random.uniform(0, SAVE_SECONDS), enough)
        kill(process)
        inside += marker.exists()
        print(f"{kind}: {len(losses(killed))} rows, killed {'inside' if marker.exists() else 'outside'} a save")
        marker.unlink(missing_ok=True)
    assert inside >= KILLS["save"] // 2
    assert len(losses(killed)) < STEPS
    subprocess.run([*COMMAND, str(killed), str(STEPS)], check=True, timeout=300)
    assert losses(killed) == losses(whole)
    assert len(losses(whole)) == STEPS


@pytest.mark.slow
def test_sigterm_ends_a_process_with_its_status(tmp_path):
    process = subprocess.Popen([*COMMAND, str(tmp_path), "100000"], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: losses(tmp_path), process, "a row")
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in errors
    assert "Traceback" not in errors
