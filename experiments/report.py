"""Writes all reports again from their rows, and with them the tables' part of docs/reproducing.md.

    python -m experiments.report

Every module of `experiments` with a `TABLE` is one entry: what it claims, the verdicts, and the plot of the largest
scale that was run. The README shows the verdicts and the plot of one table, SHOWN. What stands outside the two markers
of a page is left as it is.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

import experiments
from experiments.command import guarded
from experiments.harness.command import RESULTS
from experiments.harness.report import UNTESTED, provenance, verdicts, write_report
from experiments.harness.results import Results
from experiments.harness.rows import Rows
from experiments.harness.table import Scale, Table

PAGE = Path("docs/reproducing.md")
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
FINDING, END_FINDING = "<!-- finding: begin -->", "<!-- finding: end -->"
SHOWN = "word_problems"
SCALES = (Scale.PAPER, Scale.GPU, Scale.CPU)  # the largest first; smoke is no result


@dataclasses.dataclass(frozen=True)
class Options:
    page: Path = PAGE
    """The page whose part between the markers is written."""
    readme: Path = Path("README.md")
    """The page that shows what one table found."""
    results: Path = RESULTS
    """Where the tables' rows are."""
    list: bool = False
    """Print the tables' names, and write nothing."""


def tables() -> Iterator[tuple[Table, str]]:
    """Every table, with its module's docstring."""
    for found in pkgutil.iter_modules(experiments.__path__):
        module = importlib.import_module(f"experiments.{found.name}")
        if isinstance(getattr(module, "TABLE", None), Table):
            yield module.TABLE, inspect.getdoc(module) or ""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(Options, prog="python -m experiments.report", description=__doc__, args=arguments)
    if options.list:
        print("\n".join(table.name for table, _ in tables()))
        return
    known = list(tables())
    entries = [line for table, about in known for line in entry(table, about, options)]
    write_between(options.page, BEGIN, END, "\n" + "\n".join(entries))
    (shown,) = [table for table, _ in known if table.name == SHOWN]
    write_between(options.readme, FINDING, END_FINDING, "\n".join(finding(shown, options)))
    print(f"written: {options.page}, {options.readme}")


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Puts a text between two lines of a page. Raises ValueError where it lacks them."""
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} lacks the lines {begin} and {end}, between which the tables stand: put them in")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def entry(table: Table, about: str, options: Options) -> Iterator[str]:
    """A table's part of the page; its reports are written on the way."""
    folder = options.results / table.name
    ready: dict[Scale, Any] = {}
    for scale in SCALES:
        rows = Rows(folder, scale)
        if rows.found(table.at(scale)):
            for path in write_report(table, rows, folder, about):
                print(f"written: {path}")
            ready[scale] = Results.of(table, rows)
    yield from (f"### {table.title}", "")
    yield from (f"`python -m experiments.{table.name} --scale SCALE` ({table.paper})", "", about, "")
    for scale in reversed(SCALES):
        if scale not in ready:
            yield f"- **{scale}**: not run"
            continue
        done = sum(bool(e.rows) for e in ready[scale].entries)
        failed = sum(len(e.failures) for e in ready[scale].entries)
        told = f", {failed} runs failed" if failed else ""
        link = f"../experiments/results/{table.name}/{scale}.md"
        yield f"- **{scale}**: {done} of {len(ready[scale].entries)} entries run{told}: [numbers]({link})"
    yield ""
    for scale in SCALES:
        if scale in ready:
            yield from shown(table, ready[scale])
            return


def finding(table: Table, options: Options) -> Iterator[str]:
    """The verdicts and the plot of a table's largest scale, for a page at the project's root."""
    for scale in SCALES:
        results = Results.of(table, Rows(options.results / table.name, scale))
        if not any(entry.rows for entry in results.entries):
            continue
        yield f"`python -m experiments.{table.name} --scale {scale}` ({table.paper}):"
        yield ""
        for text, _, verdict, read in verdicts(results):
            if verdict != UNTESTED:
                yield f"- {text}: **{verdict}** ({read})"
        yield ""
        yield f"![{table.title}](experiments/results/{table.name}/{scale}.png)"
        return


def shown(table: Table, results: Results) -> Iterator[str]:
    """The verdicts and the plot of one scale."""
    yield from (provenance(results, f"../experiments/results/{table.name}/"), "")
    if table.claims:
        yield from (f"| claim | where | verdict at {results.scale} |", "| --- | --- | --- |")
        for text, where, verdict, evidence in verdicts(results):
            yield f"| {text} | {where} | **{verdict}**: {evidence} |"
        yield ""
    if table.plot is not None:
        yield from (f"![{table.title}](../experiments/results/{table.name}/{results.scale}.png)", "")


if __name__ == "__main__":
    guarded(main)
