"""Runs the cells of a table that have no row yet, and keeps each row as soon as it is there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.harness.board import Board
from experiments.harness.cell import ROW, RUN_CELL, progress_of, slug
from experiments.harness.places import Places, Running
from experiments.harness.rows import Row, Rows, compared, described
from experiments.harness.table import Cell, Table

NOTE = "For simplicity, JAX has removed"  # what jax adds below an exception
_PAUSE = 0.2  # seconds between two looks at the processes


class Job(NamedTuple):
    cell: Cell
    seed: int
    folder: Path

    @property
    def label(self) -> str:
        return f"{self.cell.name} seed {self.seed}"


class Runner:
    """`module` is what `python -m` starts; `work` the folder where cells keep what they need to go on."""

    def __init__(self, table: Table, module: str, rows: Rows, work: Path, places: Places):
        self.table, self.module, self.rows, self.places = table, module, rows, places
        self.work = work / table.name / str(rows.scale)

    def run(self, cells: Sequence[Cell], seeds: Sequence[int]) -> list[str]:
        """Runs what is not done; returns the labels of cells that failed.

        Raises KeyboardInterrupt after it has stopped the cells under way: the same call goes on with them.
        """
        wanted = [Job(cell, seed, self._folder(cell, seed)) for seed in seeds for cell in cells]
        todo = [job for job in wanted if not self.rows.done(job.cell, job.seed)]
        if not todo:
            return []
        with _held(self.work), Board(self.table.name, wanted=len(wanted), todo=len(todo)) as board:
            return self._run(todo, board)

    def _folder(self, cell: Cell, seed: int) -> Path:
        """A cell of other settings has another folder, so that none goes on with what it is not."""
        digest = hashlib.sha256(json.dumps(compared(described(cell))).encode()).hexdigest()[:8]
        return self.work / f"{slug(cell.name)}-{seed}-{digest}"

    def _run(self, todo: list[Job], board: Board) -> list[str]:
        waiting, failed = list(todo), []
        running: dict[int, tuple[Job, Running]] = {}
        whole = sum(job.cell.cost for job in todo)
        done = 0.0
        try:
            while waiting or running:
                for place in range(self.places.size):
                    if place not in running and waiting:
                        running[place] = self._start(place, waiting.pop(0))
                for place, (job, process) in list(running.items()):
                    status = process.status()
                    if status is None:
                        continue
                    del running[place]
                    done += job.cell.cost
                    row = self._finish(job, status)
                    if "error" in row:
                        failed.append(job.label)
                    board.finished(job.label, self._told(row))
                under_way = {job.label: progress_of(job.folder) for job, _ in running.values()}
                part = sum(job.cell.cost * under_way[job.label] for job, _ in running.values())
                board.show((done + part) / whole, under_way)
                time.sleep(_PAUSE)
        finally:
            for _, process in running.values():
                process.stop()
            for _, process in running.values():
                process.ended()
        return failed

    def _start(self, place: int, job: Job) -> tuple[Job, Running]:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / ROW).unlink(missing_ok=True)
        command = [sys.executable, "-m", self.module, RUN_CELL, str(self.rows.scale), job.cell.name]
        command += [str(job.seed), str(job.folder), self.table.told()]
        return job, self.places.start(place, command, job.folder / "log.txt")

    def _finish(self, job: Job, status: int) -> Row:
        path = job.folder / ROW
        if status == 0 and path.exists():
            row = json.loads(path.read_text())
            self.rows.add(row)
            shutil.rmtree(job.folder, ignore_errors=True)
            return row
        row = self._failure(job, status)
        self.rows.add(row)
        return row

    def _failure(self, job: Job, status: int) -> Row:
        """A row that tells of a failure; the cell's folder stays, with all that it printed."""
        lines = []
        with contextlib.suppress(OSError):
            text = (job.folder / "log.txt").read_text(errors="replace")
            lines = [line.strip() for line in text.splitlines() if line.strip().strip("-")]
            lines = [line for line in lines if not line.startswith(NOTE)]
        # what a command says to its user, or the end of a traceback
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
        reason = (said[-1] if said else "it printed nothing")[:300]
        ended = f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
        return {
            "scale": str(self.rows.scale),
            "cell": job.cell.name,
            "seed": job.seed,
            "config": described(job.cell),
            **{"metrics": {}, "curve": {}, "versions": {}, "device": None, "commit": None, "seconds": None},
            "error": f"{ended}: {reason}",
        }

    def _told(self, row: Row) -> str:
        """One line about a finished cell."""
        if "error" in row:
            return f"FAILED, {row['error']}"
        shown = [
            f"{measure.title} {measure.form.format(row['metrics'][measure.name])}"
            for measure in self.table.measures[:2]
            if row["metrics"].get(measure.name) is not None
        ]
        return f"{', '.join(shown)} ({row['seconds']:.0f} s)"


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One process at a time runs a table at a scale."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process runs this table in {folder}: wait for it, or stop it") from None
        yield
