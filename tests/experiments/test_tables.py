"""The paper tables: their cells, what they say is published, their reports, and the training of one cell."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import report
from experiments.harness import Results, Scale, Table, Work
from experiments.harness.cell import run_cell
from experiments.harness.report import UNTESTED, as_csv, draw, markdown, verdicts
from experiments.harness.rows import Rows
from experiments.harness.tasks import BINS, Counted, TaskRun, ask, by_position
from seqmodels import params
from seqmodels.data.tasks import Parity, Task
from seqmodels.data.tasks.metrics import prefix_accuracy
from seqmodels.train.config import TrainConfig

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
TABLES = {table.name: (table, about) for table, about in report.tables()}
RUN = [(name, scale) for name in TABLES for scale in report.SCALES if (RESULTS / name / f"{scale}.jsonl").exists()]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_cells_at_every_scale_and_says_what_it_costs(name: str) -> None:
    table, about = TABLES[name]
    assert table.name == name
    assert all(f"{scale}" in about for scale in Scale), "the docstring says the cost at each scale"
    assert re.search(r"\d{4}\.\d{5}", about), "the docstring names the paper"
    assert len((ROOT / "experiments" / f"{name}.py").read_text().splitlines()) < 150
    for scale in Scale:
        found = table.at(scale)
        assert found
        assert table.seeds[scale] >= 1
        assert all(hasattr(cell.config, "run") for cell in found)
    assert len(table.at(Scale.SMOKE)) < len(table.at(Scale.CPU)) <= len(table.at(Scale.PAPER))


@pytest.mark.parametrize("name", TABLES)
def test_what_is_published_stands_beside_a_cell_and_says_where_it_comes_from(name: str) -> None:
    table = TABLES[name][0]
    cells = {(cell.model, cell.setting) for scale in Scale for cell in table.at(scale)}
    for one in table.published:
        assert (one.model, one.setting) in cells
        assert one.where
        assert one.verified


@pytest.mark.parametrize("name", TABLES)
def test_claims_that_nothing_was_run_for_are_not_tested(name: str) -> None:
    table = TABLES[name][0]
    for scale in Scale:
        assert {verdict for _, _, verdict, _ in verdicts(Results(table, scale, []))} <= {UNTESTED}


@pytest.mark.parametrize(("name", "scale"), RUN)
def test_reports_are_what_their_rows_say(name: str, scale: Scale, tmp_path: Path) -> None:
    """`python -m experiments.report` was run after the last row: no number was written by hand."""
    table, about = TABLES[name]
    rows = Rows(RESULTS / name, scale)
    results = Results(table, scale, rows.found(table.at(scale)))
    assert (RESULTS / name / f"{scale}.md").read_text() == markdown(results, rows, about)
    assert (RESULTS / name / f"{scale}.csv").read_text() == as_csv(results)
    assert (RESULTS / name / f"{scale}.png").exists() == draw(results, tmp_path / "plot.png")
    assert not rows.outdated(table.at(scale)), "rows of settings that the table no longer has"


def test_the_page_is_what_the_rows_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "write_report", lambda *_: [])
    page, readme = tmp_path / "page.md", tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    readme.write_text(f"{report.FINDING}\n{report.END_FINDING}\n")
    arguments = ["--page", str(page), "--readme", str(readme), "--results", str(RESULTS)]
    report.main(arguments)
    inside = lambda path, begin, end: path.read_text().split(begin)[1].split(end)[0]
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nafter\n")
    for found, kept, marks in (
        (page, ROOT / report.PAGE, (report.BEGIN, report.END)),
        (readme, ROOT / "README.md", (report.FINDING, report.END_FINDING)),
    ):
        assert inside(found, *marks) == inside(kept, *marks)
    page.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the lines"):
        report.main(arguments)


def toy(**changes: Any) -> TaskRun:
    from experiments import zoo

    task = Parity(max_length=8)
    training = TrainConfig(steps=6, batch_size=4, learning_rate=1e-3, warmup=1)
    run = TaskRun(zoo.model("Mamba-2", 16, 1), training, task, dataclasses.replace(task, max_length=12), test_size=10)
    return dataclasses.replace(run, test_batch=4, **changes)


@pytest.mark.slow
def test_a_cell_that_was_stopped_in_training_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy(curriculum=((2, Parity(max_length=4)),))
    seen: list[float] = []
    whole = run.run(Work(0, tmp_path / "whole", seen.append))
    assert whole.curve["training"]["step"] == [1, 2, 3, 4, 5, 6]
    assert whole.metrics["parameters"] > 0
    assert whole.metrics["state_bytes"] > 0
    assert seen == sorted(seen)
    assert max(seen) <= 1

    real = Counted.__next__

    def stops(self: Counted) -> Any:
        if self._taken == 4:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr("experiments.harness.tasks.CHECKPOINTS", 2)
    monkeypatch.setattr(Counted, "__next__", stops)
    with pytest.raises(KeyboardInterrupt):
        run.run(Work(0, tmp_path / "stopped", lambda part: None))
    monkeypatch.setattr(Counted, "__next__", real)
    resumed = run.run(Work(0, tmp_path / "stopped", lambda part: None))
    assert resumed.curve["training"] == whole.curve["training"]
    assert resumed.metrics == whole.metrics


class Echo:
    """Answers every position with the token there."""

    def forward(self, tokens: Any, state: Any, segments: Any) -> Any:
        return tokens, None, {}

    def logits(self, hidden: Any) -> Any:
        import jax

        return jax.nn.one_hot(hidden, 3)


def test_answers_are_counted_by_position_as_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "split", lambda model: (model, {}))
    monkeypatch.setattr(params, "merge", lambda model, arrays: model)
    task: Task = Parity(min_length=3, max_length=8)
    answers = ask(Echo(), task, size=50, batch_size=16)
    rows = [task.row(0, index, "test") for index in range(50)]
    right = [int(row.tokens[-1]) == int(row.targets[-1]) for row in rows]
    assert answers.metrics["token_accuracy"] == pytest.approx(np.mean(right))
    for position, accuracy in zip(answers.by_position["position"], answers.by_position["accuracy"], strict=True):
        there = [ok for ok, row in zip(right, rows, strict=True) if len(row.tokens) == position]
        assert accuracy == pytest.approx(np.mean(there))


def test_accuracy_of_everything_up_to_a_position() -> None:
    random = np.random.default_rng(0)
    batch = {"scored": np.ones((30, 100), bool), "targets": random.integers(0, 2, (30, 100))}
    predictions = np.where(random.random((30, 100)) < 0.98, batch["targets"], 2)
    curve = by_position(predictions, batch)
    assert len(curve["position"]) == BINS
    whole = prefix_accuracy(predictions, batch)
    np.testing.assert_allclose(curve["sequence_accuracy"], [whole[int(p) - 1] for p in curve["position"]])
    spans = np.array_split(np.arange(100), BINS)
    right = predictions == batch["targets"]
    np.testing.assert_allclose(curve["accuracy"], [right[:, span].mean() for span in spans])


def test_a_run_made_shorter_keeps_the_rest() -> None:
    run = dataclasses.replace(toy(), examples=100).shorter(steps=100, rows=8, test_size=3, lengths=(3, 5), clip=0.5)
    assert (run.train.steps, run.train.batch_size, run.train.warmup, run.train.clip) == (100, 8, 5, 0.5)
    assert (run.train.learning_rate, run.examples, run.test_size) == (1e-3, None, 3)
    assert run.curriculum == ((10, Parity(max_length=3)), (10, Parity(max_length=5)))


def test_the_example_of_the_page_is_a_table(tmp_path: Path) -> None:
    page = (ROOT / report.PAGE).read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "reproducing.md", "exec"), names)
    table: Table = names["TABLE"]
    assert {verdict for _, _, verdict, _ in verdicts(Results(table, Scale.CPU, []))} == {UNTESTED}
    row = run_cell(table, Scale.SMOKE, "parity/sLSTM", 0, tmp_path)
    assert -1 <= row["metrics"]["scaled_accuracy"] <= 1
    assert "train.steps: 20000 -> 20" in row["config"]["changes"]
