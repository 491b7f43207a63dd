"""What a run writes besides checkpoints: metrics, curve, settings, environment."""

from __future__ import annotations

import csv
import dataclasses
import enum
import json

import pytest

from seqmodels.train.metrics import MetricsLog, read_rows, write_curve
from seqmodels.train.run import RunFolder, RunMismatch, as_json, differences

SETTINGS = {"train": {"steps": 10, "seed": 0}, "model": {"layers": [[{"type": "A", "heads": 4}], 2]}}


def record(**changes):
    return {"settings": {**SETTINGS, **changes}}


def test_rows_after_the_restored_step_are_cut_and_a_torn_last_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in (1, 2, 3, 4):
            log.write({"step": step, "loss": step / 3})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    with MetricsLog(path, since=3) as log:
        log.write({"step": 4, "loss": 9.0})
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 9.0)]
    assert log.rows == read_rows(path)


def test_the_curve_is_a_table_and_a_picture(tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "heldout_loss": 1.5}]
    table, picture = write_curve(rows, tmp_path)
    with table.open() as file:
        assert [row["heldout_loss"] for row in csv.DictReader(file)] == ["", "1.5"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert write_curve([], tmp_path / "none") == []


def test_a_config_becomes_json():
    class Kind(enum.StrEnum):
        BIG = "big"

    @dataclasses.dataclass(frozen=True)
    class Part:
        kind: Kind = Kind.BIG
        sizes: tuple = (1, (2.5, None))

    assert as_json({"part": Part()}) == {"part": {"type": "Part", "kind": "big", "sizes": [1, [2.5, None]]}}
    assert json.loads(json.dumps(as_json(Part()))) == as_json(Part())


def test_differences_name_the_fields():
    other = {"train": {"steps": 10}, "model": {"layers": [[{"type": "A", "heads": 8}], 2]}}
    assert differences(SETTINGS, other) == ["train.seed: 0 -> (absent)", "model.layers.0.0.heads: 4 -> 8"]
    assert differences(SETTINGS, other, free=["train.seed", "model.layers.0.0.heads"]) == []


def test_a_folder_takes_the_same_run_or_more_steps_of_it(tmp_path):
    for changes in ({}, {}, {"train": {"steps": 20, "seed": 0}}, {"train": {"steps": 20, "seed": 0, "keep": 3}}):
        RunFolder(tmp_path, record(**changes), free=["train.keep"]).close()
    for changes, message in (
        ({"train": {"steps": 19, "seed": 0}}, "train.steps: 20 -> 19"),
        ({"train": {"steps": 20, "seed": 1}}, "train.seed: 0 -> 1"),
        ({"train": {"steps": 20, "seed": 0}, "model": {}}, "model"),
    ):
        with pytest.raises(RunMismatch, match=message):
            RunFolder(tmp_path, record(**changes), free=["train.keep"])
    launches = json.loads((tmp_path / "environment.json").read_text())["launches"]
    assert len(launches) == 4
    assert set(launches[0]) == {"command", "time", "commit", "device", "versions"}
    assert {"python", "jax", "flax", "seqmodels"} <= set(launches[0]["versions"])


def test_a_folder_is_held_by_one_process(tmp_path):
    held = RunFolder(tmp_path, record())
    with pytest.raises(RunMismatch, match="another process"):
        RunFolder(tmp_path, record())
    held.close()
    RunFolder(tmp_path, record()).close()
