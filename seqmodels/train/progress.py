"""What a running training shows: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def duration(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class TrainProgress:
    """Counts steps and tokens; the speed leaves out the first step, which compiles, and what is `paused`."""

    def __init__(self, *, start: int, steps: int, tokens_per_step: int, quiet: bool = False) -> None:
        self._start, self._steps, self._tokens = start, steps, tokens_per_step
        self._first: float | None = None
        self._last = 0.0
        self._done = start
        self._quiet = quiet
        self._bar: Progress | None = None
        console = Console(file=sys.stderr)
        if console.is_terminal and not quiet:
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("compiling", total=steps, completed=start)

    @property
    def tokens_per_second(self) -> float | None:
        """Since the first step of this process was done; None before its second."""
        steps = self._done - self._start - 1
        if self._first is None or steps < 1 or self._last <= self._first:
            return None
        return steps * self._tokens / (self._last - self._first)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (evaluating, saving) is not training time."""
        begin = time.perf_counter()
        yield
        if self._first is not None:
            spent = time.perf_counter() - begin
            self._first += spent
            self._last += spent

    def advance(self, step: int) -> None:
        """Step `step` has finished on the device."""
        self._done, self._last = step, time.perf_counter()
        if self._first is None:
            self._start, self._first = step - 1, self._last
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, row: Mapping[str, Any]) -> None:
        if self._quiet:
            return
        text = f"step {row['step']}/{self._steps}  loss {row['loss']:.4f}"
        if "heldout_loss" in row:
            text += f"  held out {row['heldout_loss']:.4f}"
        speed = self.tokens_per_second
        if speed:
            left = (self._steps - row["step"]) * self._tokens / speed
            text += f"  {speed:,.0f} tokens/s  {duration(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
