"""The harness of the paper tables, with a table of cells that compute next to nothing."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.harness import NotTested, Results, Scale
from experiments.harness.cell import POINTS, slug, thinned
from experiments.harness.command import chosen, command
from experiments.harness.command import run as start
from experiments.harness.report import DIFFERS, REPRODUCED, UNTESTED, as_csv, markdown, verdicts
from experiments.harness.rows import KEYS, Rows, described, settings
from seqmodels.train.config import TrainConfig
from tests.experiments.toy import BASE, HELD, TABLE, Toy, cells

ROOT = Path(__file__).parents[2]
MODULE = "tests.experiments.toy"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def run(*arguments: str) -> None:
    command(TABLE, MODULE, "What it is about.", ["--results", "results", *arguments])


def rows_of(scale: str = "cpu") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("results", f"{scale}.jsonl").read_text().splitlines()]


def results_of(scale: Scale) -> Results:
    return Results(TABLE, scale, Rows(Path("results"), scale).found(TABLE.at(scale)))


def test_a_table_keeps_a_row_a_cell_shows_failures_and_tries_them_again(here: Path, capfd: Any) -> None:
    Path("broken").touch()
    with pytest.raises(ValueError, match=r"2 cells failed \(second/broken seed 0, second/broken seed 1\).*tries them"):
        run("--scale", "cpu")
    rows = rows_of()
    assert len(rows) == 8
    assert all(list(row)[: len(KEYS)] == list(KEYS) for row in rows if "error" not in row)
    good = {(row["cell"], row["seed"]): row["metrics"]["score"] for row in rows if "error" not in row}
    assert good["first/one", 1] == 1.25
    assert good["first/swept [-1, 1]/rate 2", 0] == 1.0
    failed = [row for row in rows if "error" in row]
    assert all("exit status 1" in row["error"] and "nan at rate 1.0" in row["error"] for row in failed)
    out = capfd.readouterr().out
    assert "[8/8]" in out
    assert "left" in out
    swept = next(row for row in rows if row["cell"] == "first/swept [-1, 1]/rate 2")
    assert swept["config"]["changes"] == ["score: 0.25 -> 1.0", "rate: (absent) -> 2.0"]
    assert swept["curve"]["loss"]["step"][0] == 0
    assert swept["curve"]["loss"]["step"][-1] == 999
    assert swept["curve"]["loss"]["loss"][-1] is None  # JSON has no NaN

    told = Path("results/cpu.md").read_text()
    assert "| one | 2 | 0.750 (0.250 to 1.250) | 0.500 | +0.250 | 1,000,000 | - |" in told
    assert "| broken | 0 | failed |" in told
    assert "- second/broken, seed 0: exit status 1: " in told
    by_claim = {text: verdict for text, _, verdict, _ in verdicts(results_of(Scale.CPU))}
    assert by_claim == {"the sweep wins": REPRODUCED, "one is perfect": DIFFERS, "broken is best": UNTESTED}

    before = {(row["cell"], row["seed"]): row["time"] for row in rows if "error" not in row}
    Path("broken").unlink()
    run("--scale", "cpu")
    again = rows_of()
    assert not any("error" in row for row in again)
    assert {key: row["time"] for row in again if (key := (row["cell"], row["seed"])) in before} == before
    run("--scale", "cpu")  # nothing is left to do
    assert rows_of() == again
    assert "cells" not in capfd.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("stop", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_table_goes_on_where_it_was(here: Path, stop: int) -> None:
    arguments = [sys.executable, "-m", MODULE, "--scale", "gpu", "--results", "results"]
    # a shell may have started these tests in the background, where SIGINT is ignored by all children
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heard)
    kept = lambda: [len(path.read_text()) for path in Path("runs").glob("tables/toy/gpu/*/pieces")]
    for _ in range(600):
        time.sleep(0.1)
        if kept() == [HELD]:
            break
    process.send_signal(stop)
    out = process.communicate(timeout=60)[0]
    assert process.returncode in (128 + stop, 130)
    assert "stopped: 0 of 1 cells are done; the same command goes on" in out
    assert not Path("results/gpu.jsonl").exists()
    assert kept() == [HELD]
    Path("go").touch()
    run("--scale", "gpu")
    (row,) = rows_of("gpu")
    assert row["metrics"]["began_at"] == HELD
    assert row["seconds"] > 0.5  # six pieces of 0.1: those before the stop count too
    assert not any(Path("runs/tables/toy/gpu").glob("*/"))


def test_a_table_runs_from_python_as_from_the_command(here: Path) -> None:
    found = start(TABLE, Scale.SMOKE, module=MODULE, only=("first",), results=Path("results"))
    assert found.value("one", "first") == 0.25
    assert Path("results/smoke.md").exists()
    assert found.entries == results_of(Scale.SMOKE).entries


def test_two_processes_do_not_run_one_table(here: Path) -> None:
    from experiments.harness.runner import _held

    with (
        _held(Path("runs/tables/toy/cpu")),
        pytest.raises(ValueError, match="another process runs this table in runs/tables/toy/cpu"),
    ):
        run("--scale", "cpu")


def test_a_row_of_other_settings_is_run_again_and_never_shown(here: Path) -> None:
    run("--scale", "smoke", "--only", "one")
    (row,) = rows_of("smoke")
    row["config"]["settings"]["score"] = 9.0
    Path("results/smoke.jsonl").write_text(json.dumps(row) + "\n")
    rows = Rows(Path("results"), Scale.SMOKE)
    assert rows.outdated(cells(Scale.SMOKE)) == ["first/one seed 0"]
    told = markdown(Results(TABLE, Scale.SMOKE, rows.found(cells(Scale.SMOKE))), rows, "")
    assert "| one | 0 | not run |" in told
    assert "Rows of other settings than today's are left out: first/one seed 0." in told
    run("--scale", "smoke", "--only", "one")
    assert rows_of("smoke")[0]["config"]["settings"] == {"type": "Toy", "score": 0.25}


def test_a_sweep_is_shown_by_its_best_and_csv_holds_all(here: Path) -> None:
    run("--scale", "smoke", "--only", "first")
    results = results_of(Scale.SMOKE)
    assert results.entry("swept [-1, 1]", "first").variant == "rate 2"
    assert results.value("swept [-1, 1]", "first") == 1.0
    assert results.value("swept [-1, 1]", "first", over="best") == 1.0
    told = "swept [-1, 1], first: 1.000"
    assert results.said() == [told, f"{told}, best of 2 runs, whose mean is 0.625"]
    with pytest.raises(NotTested, match="no run of broken in second"):
        results.value("broken", "second")
    with pytest.raises(NotTested, match="ghost in first is not run at this scale"):
        results.value("ghost", "first")
    lines = as_csv(results).splitlines()
    assert lines[0].startswith("scale,setting,model,variant,chosen,seeds,failed,score_mean,score_min,score_max,")
    assert lines[0].endswith("score_published,size_mean,size_min,size_max")
    assert lines[1:4] == [
        "smoke,first,one,,1,1,0,0.25,0.25,0.25,0.5,1e+06,1e+06,1e+06",
        'smoke,first,"swept [-1, 1]",rate 0.5,0,1,0,0.25,0.25,0.25,,1e+06,1e+06,1e+06',
        'smoke,first,"swept [-1, 1]",rate 2,1,1,0,1,1,1,,1e+06,1e+06,1e+06',
    ]
    assert lines[4] == "smoke,second,broken,,1,0,0,,,,,,,"


def test_cells_by_name() -> None:
    found = cells(Scale.CPU)
    assert chosen(found, []) == found
    assert [cell.name for cell in chosen(found, ["[-1, 1]/rate 2"])] == ["first/swept [-1, 1]/rate 2"]
    assert len(chosen(found, ["first/*", "broken"])) == 4
    with pytest.raises(ValueError, match="--only ghost names no cell; there are first/one, first/swept"):
        chosen(found, ["ghost"])
    assert slug("first/DeltaNet [-1, 1]/rate 0.5") == "first-DeltaNet-m1-1-rate-0.5"


def test_errors_of_the_command(here: Path) -> None:
    with pytest.raises(ValueError, match="--seeds is 0: a cell is run at least once"):
        run("--seeds", "0")
    with pytest.raises(ValueError, match=r"--workers is 99: this machine has \d+ cores"):
        run("--workers", "99")
    with pytest.raises(ValueError, match="--slurm takes NAME=VALUE, not 'gpu'"):
        run("--slurm", "gpu")
    Path("results").mkdir()
    Path("results/cpu.jsonl").write_text("{]\n")
    with pytest.raises(ValueError, match=r"line 1 of results/cpu.jsonl is no JSON row .*its cell is run again"):
        run("--scale", "cpu")
    Path("results/cpu.jsonl").write_text('{"scale": "cpu"}\n')
    with pytest.raises(ValueError, match=r"lacks cell, seed, config"):
        run("--scale", "cpu")


def test_list_runs_nothing(here: Path, capsys: Any) -> None:
    run("--scale", "cpu", "--list")
    assert capsys.readouterr().out.splitlines()[0] == "first/one: 0 of 2 seeds"
    assert not Path("results").exists()


def test_two_cells_of_one_name_are_refused() -> None:
    import dataclasses

    table = dataclasses.replace(TABLE, cells=lambda scale: [cells(scale)[0]] * 2)
    with pytest.raises(ValueError, match="several cells named first/one"):
        table.at(Scale.CPU)


def test_settings_leave_defaults_out_so_that_new_fields_change_no_row() -> None:
    assert settings(Toy(0.5, rate=2.0)) == {"type": "Toy", "score": 0.5, "rate": 2.0}
    assert settings(TrainConfig(steps=7)) == {"type": "TrainConfig", "steps": 7}
    assert described(cells(Scale.CPU)[1])["changes"] == ["rate: (absent) -> 0.5"]
    assert settings(BASE) == {"type": "Toy", "score": 0.25}


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    curve = thinned({"x": list(range(1001)), "y": [i / 3 for i in range(1001)]})
    assert len(curve["x"]) == POINTS
    assert (curve["x"][0], curve["x"][-1], curve["y"][1]) == (0, 1000, 1.66667)
    assert thinned({"x": [], "y": []}) == {"x": [], "y": []}
    with pytest.raises(ValueError, match=r"different lengths: \{'x': 2, 'y': 1\}"):
        thinned({"x": [1, 2], "y": [1]})


@pytest.mark.slow
def test_jobs_of_a_cluster(here: Path) -> None:
    """The same jobs through submitit, with the executor that runs them on this machine."""
    from experiments.harness.places import SlurmPlaces
    from experiments.harness.runner import Runner

    places = SlurmPlaces(Path("runs"), {"timeout_min": 5}, cluster="local")
    rows = Rows(Path("results"), Scale.SMOKE)
    Path("broken").touch()
    failed = Runner(TABLE, MODULE, rows, Path("runs"), places).run(TABLE.at(Scale.SMOKE), [0])
    assert failed == ["second/broken seed 0"]
    assert len(rows_of("smoke")) == 4
    assert "nan at rate 1.0" in next(row["error"] for row in rows_of("smoke") if "error" in row)


def test_places_are_the_accelerators_or_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.harness.places import _accelerators, local_places

    assert local_places(None, alone=False).size == len(os.sched_getaffinity(0))  # JAX_PLATFORMS is cpu here
    assert local_places(None, alone=True).size == 1
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert _accelerators() == ("CUDA_VISIBLE_DEVICES", ["2", "3"])
    assert local_places(None, alone=False).size == 2
    with pytest.raises(ValueError, match="--workers is 3: this machine has 2 accelerators"):
        local_places(3, alone=False)
