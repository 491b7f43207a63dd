"""Signals as flags, so that a run saves before it stops."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal after `step`, which was saved. `code` is the exit status for a shell."""

    def __init__(self, signum: int, step: int) -> None:
        self.signum, self.step, self.code = signum, step, 128 + signum
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} after step {step}, which was saved; the same command goes on from there")


class SignalFlag:
    """While open, SIGTERM and SIGINT set `received`; a second SIGINT stops at once, without saving.

    Outside the main thread, where Python allows no handlers, it never fires.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum

    def __enter__(self) -> SignalFlag:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
