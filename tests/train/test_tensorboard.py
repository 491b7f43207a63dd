"""TensorBoard's files, read back with the package that writes them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from seqmodels.train import tensorboard
from seqmodels.train.metrics import read_rows
from tests.train.quick import Batches, run

tensorboardX = pytest.importorskip("tensorboardX")  # part of the dev install


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Every scalar of every event file below `folder`: records of length, checksum, event, checksum."""
    found = []
    for file in folder.rglob("events.out.tfevents.*"):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = tensorboardX.proto.event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += size + 16
    return found


def test_scalars_are_the_rows_and_a_resumed_run_repeats_none(tmp_path):
    with pytest.raises(ValueError, match="ended"):
        run(tmp_path, Batches(last=5))
    folder = tmp_path / "tensorboard"
    assert {step for _, step, _ in scalars(folder)} == {1, 2, 3, 4, 5}
    other = folder / "notes.txt"
    other.write_text("mine")
    # as after a kill: rows beyond the checkpoint that will be trained again, and a file cut short
    (tmp_path / "checkpoints" / "5").rename(tmp_path / "elsewhere")
    (event_file,) = folder.glob("events.*")
    event_file.write_bytes(event_file.read_bytes()[:-3])
    run(tmp_path, tensorboard=True)
    rows = read_rows(tmp_path / "metrics.jsonl")
    expected = {(name, row["step"]): value for row in rows for name, value in row.items() if name != "step"}
    found = scalars(folder)
    assert len(found) == len(expected)
    assert {(name, step): value for name, step, value in found} == pytest.approx(expected, rel=1e-6)  # float32
    assert {name for name, _, _ in found} >= {"loss", "gradient_norm", "learning_rate"}
    assert {step for _, step, _ in found} == set(range(1, 9))
    assert other.read_text() == "mine"


def test_what_is_asked_for_and_not_installed_is_an_error_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "WRITERS", ("no_such_package",))
    with pytest.raises(ValueError, match="nothing that writes them is installed: pip install tensorboardX"):
        run(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run")  # not asked for
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_without_a_folder_it_cannot_be_written():
    with pytest.raises(ValueError, match="tensorboard needs a workdir"):
        run(None, tensorboard=True)
