"""The allocator of the host's memory, in which programs on CPUs live."""

from __future__ import annotations

import ctypes
import sys

# mallopt(3), glibc's malloc.h: (parameter, value)
ONE_ARENA = (-8, 1)  # the others are too small for a program's memory, which then comes from the system after all
NOTHING_MAPPED = (-4, 0)
NEVER_TRIMMED = (-1, 2**31 - 1)
TAKEN_AT_ONCE = (-2, 1 << 28)  # bytes


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, for the next program; False where the C library is not glibc.

    XLA takes the memory of a program on a CPU anew at every run, and glibc by default gives large pieces back to the
    system, so that a training step first has to be handed its memory page by page: a fifth of the CPU time of a small
    model's. The commands of `experiments` call this; a script of your own calls it before anything else. The process
    then stays as large as it ever was.
    """
    library = _glibc()
    if library is None:
        return False
    settings = (ONE_ARENA, NOTHING_MAPPED, NEVER_TRIMMED, TAKEN_AT_ONCE)
    done = [library.mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(done)


def return_freed_memory() -> bool:
    """Gives the system what was kept so far; False where the C library is not glibc, or has nothing to give."""
    library = _glibc()
    return library is not None and library.malloc_trim(0) == 1


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None
