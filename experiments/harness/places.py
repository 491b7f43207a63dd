"""Where cells run: processes on the devices of this machine, or jobs of a SLURM cluster."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

GRACE = 60.0  # seconds that a process has to save its state before it is killed


class Running(Protocol):
    """A command under way."""

    def status(self) -> int | None:
        """The exit status, None while it runs."""

    def stop(self) -> None:
        """Asks it to save its state and end."""

    def ended(self) -> None:
        """Waits for the end after `stop`."""


class Places(Protocol):
    """Takes up to `size` commands at a time."""

    size: int

    def start(self, place: int, command: Sequence[str], log: Path) -> Running: ...


class _Process:
    def __init__(self, process: subprocess.Popen[bytes]):
        self._process = process

    def status(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def ended(self) -> None:
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class LocalPlaces:
    """One process a place, each with its own device: an accelerator, or some of the processor's cores."""

    def __init__(self, environments: Sequence[Mapping[str, str]], cores: Sequence[Sequence[int]]):
        self.size = len(environments)
        self._environments, self._cores = environments, cores

    def start(self, place: int, command: Sequence[str], log: Path) -> Running:
        # pinned by the child's first action: XLA makes as many threads as it may use cores
        pinned = lambda: os.sched_setaffinity(0, self._cores[place])
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environments[place]},
                start_new_session=True,  # Ctrl-C is for the table, which then stops its cells
                preexec_fn=pinned if hasattr(os, "sched_setaffinity") else None,
            )
        return _Process(process)


def local_places(workers: int | None, *, alone: bool) -> LocalPlaces:
    """A place for every accelerator, or for every core where there is none; `alone`: one place with everything.

    Raises ValueError where `workers` are more than the cores, or than the accelerators.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    variable, devices = _accelerators()
    most = len(devices) or len(cores)
    count = 1 if alone else most if workers is None else workers
    if not 1 <= count <= most:
        kind = "accelerators" if devices else "cores"
        raise ValueError(f"--workers is {count}: this machine has {most} {kind}, each for one cell at a time")
    environments = [{variable: device} for device in devices[:count]] if devices and not alone else [{}] * count
    # with more accelerators than cores, places share them
    return LocalPlaces(environments, [cores[place::count] or [cores[place % len(cores)]] for place in range(count)])


def _accelerators() -> tuple[str, list[str]]:
    """The environment variable that names a process's accelerators, and what it is for each: found without jax."""
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return "", []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return "CUDA_VISIBLE_DEVICES", [device for device in visible.split(",") if device]
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        return "CUDA_VISIBLE_DEVICES", re.findall(r"^GPU (\d+):", listed, re.MULTILINE)
    chips = glob.glob("/dev/accel[0-9]*")
    return "TPU_VISIBLE_CHIPS", [str(number) for number in range(len(chips))]


class SlurmPlaces:
    """One job a cell, through submitit (the extra `slurm`): `options` are those of its executor.

    `cluster="local"` runs the same jobs on this machine. Raises ValueError where submitit is missing.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any], *, size: int = 64, cluster: str = "slurm"):
        try:
            import submitit
        except ImportError:
            raise ValueError(
                "cells on a cluster need submitit: pip install submitit (or 'seqmodels[slurm]'), or leave --slurm away"
            ) from None
        self.size = size
        self._command = submitit.helpers.CommandFunction
        self._executor = submitit.AutoExecutor(folder=folder / "slurm", cluster=cluster)
        known = ("timeout_min", "gpus_per_node", "cpus_per_task", "mem_gb")
        self._executor.update_parameters(**{k if k in known else f"slurm_{k}": v for k, v in options.items()})

    def start(self, place: int, command: Sequence[str], log: Path) -> Running:
        # a job that is taken down gets SIGTERM, like a process here, and its command goes on when it is started again
        return _Job(self._executor.submit(self._command(list(command), verbose=False)), log)


class _Job:
    def __init__(self, job: Any, log: Path):
        self._job, self._log = job, log
        self._status: int | None = None

    def status(self) -> int | None:
        if self._status is None and self._job.done():
            error = self._job.exception()
            self._log.write_text(f"{self._job.stderr() or ''}{'' if error is None else error}")
            self._status = 0 if error is None else 1
        return self._status

    def stop(self) -> None:
        self._job.cancel(check=False)

    def ended(self) -> None:
        deadline = time.monotonic() + GRACE
        while not self._job.done(force_check=True) and time.monotonic() < deadline:
            time.sleep(0.5)
        self._status = 1 if self._status is None else self._status
