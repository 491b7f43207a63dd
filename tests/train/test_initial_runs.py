"""Whole runs whose rows start from a state: stopped and continued to the bit, over meshes, and from the commands."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import chex
import jax
import pytest

from experiments import generate as generate_command
from experiments import train as train_command
from experiments.command import parse_train
from seqmodels.train import InitialKind, InitialState, Interrupted, MeshConfig, RunMismatch, train
from tests.train.starting import KINDS, hybrid, streams
from tests.train.test_loop import Trouble
from tests.train.test_mesh import RUN
from tests.train.tiny import RECURRENT, tiny_config, tiny_model

STEPS = 5


def run(
    kind: InitialKind, workdir: Path | None = None, batches: Any = None, *, model: Any = None, **changes: Any
) -> dict[str, Any]:
    """What a run logs, and its parameters."""
    model = tiny_model(RECURRENT) if model is None else model
    config = tiny_config(steps=STEPS, checkpoint_every=2, initial=InitialState(kind, refresh=2), **changes)
    result = train(model, batches or streams(), config, workdir=workdir, quiet=True)
    rows = [{name: row[name] for name in ("step", "loss", "gradient_norm")} for row in result.rows]
    return {"params": jax.device_get(result.arrays), "rows": rows}


@functools.cache
def whole(kind: InitialKind) -> dict[str, Any]:
    return run(kind)


class Stopped(Trouble):
    """Batches of a stream, and SIGTERM before number `at`."""

    def __init__(self, at: int) -> None:
        super().__init__(at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        self.inner = streams()


# Of the kinds two are in the quick tier.
some = pytest.mark.parametrize("kind", [*KINDS[:2], *(pytest.param(x, marks=pytest.mark.slow) for x in KINDS[2:])])


@some
def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path, kind: InitialKind) -> None:
    with pytest.raises(Interrupted):
        run(kind, tmp_path, Stopped(3))
    chex.assert_trees_all_equal(run(kind, tmp_path), whole(kind))


def test_kinds_differ_and_a_run_keeps_its_own(tmp_path: Path) -> None:
    assert len({whole(kind)["rows"][-1]["loss"] for kind in InitialKind}) == len(InitialKind)
    with pytest.raises(Interrupted):
        run(InitialKind.NOISE, tmp_path, Stopped(1))
    with pytest.raises(RunMismatch, match=r"train\.initial\.kind: noise -> state_passing"):
        run(InitialKind.STATE_PASSING, tmp_path)


@some
def test_eight_devices_are_one(kind: InitialKind) -> None:
    """Rows, parameters and time are divided; states are drawn, shuffled and carried as on one device."""
    chex.assert_trees_all_close(run(kind, mesh=MeshConfig(2, 2, 2)), whole(kind), rtol=RUN, atol=RUN)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_parts_over_a_mesh_and_another_mesh_afterwards(tmp_path: Path, kind: InitialKind) -> None:
    in_parts = functools.partial(run, kind, tmp_path, model=hybrid(), accumulate=2)
    with pytest.raises(Interrupted):
        in_parts(Stopped(3), mesh=MeshConfig(data=2))
    found = in_parts(mesh=MeshConfig(fsdp=2, sequence=2))
    chex.assert_trees_all_close(found, run(kind, model=hybrid()), rtol=RUN, atol=RUN)


def test_flags_say_what_rows_start_from() -> None:
    flags = "--train.initial.kind STATE_PASSING --train.initial.probability 0.5 --train.initial.refresh 7"
    run, _ = parse_train(["demo", *flags.split(), "--train.initial.std", "2"])
    assert run.experiment.train.initial == InitialState(InitialKind.STATE_PASSING, 2.0, 0.5, 7)
    assert parse_train(["demo"])[0].experiment.train.initial == InitialState()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TRUNCATED_BPTT", "FITTED_NOISE"])
def test_the_commands_train_and_generate(tmp_path: Path, capsys: Any, kind: str) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for part in range(3):
        (text / f"{part}.txt").write_text("".join(f"{number} plus {part}.\n" for number in range(300)))
    small = "--model.width 16 --model.layers.0.0.2.window 8 --train.batch-size 2 --train.length 32 --steps 3"
    flags = f"{small} --data.source {text} --workdir {tmp_path / 'out'} --train.initial.kind {kind}"
    train_command.main(["demo", *flags.split()])
    capsys.readouterr()
    generate_command.main([str(tmp_path / "out"), "--prompt", "1 plus", "--steps", "4"])
    assert capsys.readouterr().out.startswith("1 plus")
