"""The command of every table: `python -m experiments.NAME [--scale S] [--only FILTER] [--seeds N]`."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.command import guarded
from experiments.harness.cell import RUN_CELL, run_cell
from experiments.harness.places import Places, SlurmPlaces, local_places
from experiments.harness.results import Results
from experiments.harness.rows import Rows
from experiments.harness.runner import Runner
from experiments.harness.table import Cell, Scale, Table

RESULTS = Path("experiments/results")
WORK = Path("runs/tables")


@dataclasses.dataclass(frozen=True)
class Options:
    scale: Annotated[Scale, tyro.conf.EnumChoicesFromValues] = Scale.SMOKE
    """How much is run; smoke is to see that everything works."""
    only: tuple[str, ...] = ()
    """Only cells whose name contains one of these, or matches it as a pattern (*)."""
    seeds: int | None = None
    """Runs of each cell, with seeds from 0; by default what the table says for the scale."""
    results: Path | None = None
    """Where rows and reports go: experiments/results/NAME, or runs/smoke/NAME for smoke."""
    workers: int | None = None
    """Cells at a time: by default one a device, or one a core where there is no accelerator."""
    list: bool = False
    """Print the cells with what is done of them, and run nothing."""
    slurm: tuple[str, ...] = ()
    """Run cells as jobs of a cluster: options as NAME=VALUE (partition=gpu timeout_min=60 gpus_per_node=1)."""


def main(table: Table) -> None:
    """Runs a table from the command line of the module that holds it."""
    specification = sys.modules["__main__"].__spec__
    module = f"experiments.{table.name}" if specification is None else specification.name
    guarded(functools.partial(command, table, module, inspect.getdoc(sys.modules["__main__"]) or table.title))


def command(table: Table, module: str, about: str, arguments: Sequence[str]) -> None:
    if arguments[:1] == [RUN_CELL]:  # started by the runner for one cell
        scale, name, seed, folder, given = arguments[1:]
        run_cell(table.given(json.loads(given)), Scale(scale), name, int(seed), Path(folder))
        return
    options = tyro.cli(_kind(table), prog=f"python -m {module}", description=about, args=arguments)
    if table.options is not None:
        table = table.given({field.name: getattr(options, field.name) for field in dataclasses.fields(table.options)})
    _run(table, module, about, options)


def run(table: Table, scale: Scale, *, module: str | None = None, about: str = "", **options: Any) -> Results:
    """Runs what a table lacks at a scale and writes its report, as its command does; returns what its rows say.

    `options` are those of the command (`only`, `seeds`, `results`, `workers`, `slurm`). Cells are processes that
    import the table from `module`, by default experiments.NAME; `about` heads the report. Raises ValueError where cells
    failed.
    """
    rows = _run(table, module or f"experiments.{table.name}", about, Options(scale=scale, **options))
    return Results.of(table, rows)


def _run(table: Table, module: str, about: str, options: Options) -> Rows:
    results = options.results or _results(table, options.scale)
    cells = chosen(table.at(options.scale), options.only)
    seeds = range(table.seeds[options.scale] if options.seeds is None else options.seeds)
    if len(seeds) < 1:
        raise ValueError(f"--seeds is {options.seeds}: a cell is run at least once")
    rows = Rows(results, options.scale)
    if options.list:
        for cell in cells:
            ready = sum(rows.done(cell, seed) for seed in seeds)
            print(f"{cell.name}: {ready} of {len(seeds)} seeds")
        return rows
    failed: list[str] = []
    try:
        failed = Runner(table, module, rows, WORK, _places(table, options)).run(cells, seeds)
    except (KeyboardInterrupt, SystemExit):
        ready = sum(rows.done(cell, seed) for cell in cells for seed in seeds)
        print(f"\nstopped: {ready} of {len(cells) * len(seeds)} cells are done; the same command goes on", flush=True)
        raise
    finally:
        _report(table, rows, results, about)
    if failed:
        raise ValueError(
            f"{len(failed)} cells failed ({', '.join(failed)}): their folders in {WORK / table.name} say why; "
            "the same command tries them again"
        )
    return rows


def _kind(table: Table) -> Any:
    """`Options`, and the table's own beside them."""
    if table.options is None:
        return Options
    return dataclasses.make_dataclass("Options", (), bases=(Options, type(table.options)), frozen=True)


def _results(table: Table, scale: Scale) -> Path:
    return (Path("runs/smoke") if scale == Scale.SMOKE else RESULTS) / table.name


def _report(table: Table, rows: Rows, results: Path, about: str) -> None:
    from experiments.harness.report import write_report

    if rows.found(table.at(rows.scale)):
        for path in write_report(table, rows, results, about):
            print(f"written: {path}")


def _places(table: Table, options: Options) -> Places:
    if not options.slurm:
        return local_places(options.workers, alone=table.alone)
    parameters: dict[str, Any] = {}
    for option in options.slurm:
        name, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--slurm takes NAME=VALUE, not {option!r}: --slurm partition=gpu timeout_min=60")
        parameters[name] = int(value) if value.isdigit() else value
    return SlurmPlaces(WORK / table.name, parameters, size=options.workers or 64)


def chosen(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that a filter names, all where it is empty; raises ValueError where it names none."""
    # brackets are part of names (DeltaNet [-1, 1]), so a plain part counts before the pattern
    fits = lambda name: any(part in name or fnmatch.fnmatch(name, part) for part in only)
    found = [cell for cell in cells if not only or fits(cell.name)]
    if not found:
        raise ValueError(f"--only {' '.join(only)} names no cell; there are {', '.join(cell.name for cell in cells)}")
    return found
