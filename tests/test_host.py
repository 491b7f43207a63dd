"""What `keep_freed_memory` is for: a program that runs again does not wait for its memory again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from seqmodels.host import keep_freed_memory
if "keep" in sys.argv:
    print(keep_freed_memory())
import jax, jax.numpy as jnp
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
run = jax.jit(lambda x: jnp.sum(jnp.sin(x) @ x[:2048, :64]))  # a product needs its inputs in memory
x = jnp.ones((6144, 2048))
for _ in range(3):
    run(x).block_until_ready()
before = faults()
for _ in range(10):
    run(x).block_until_ready()
print((faults() - before) / 10)
"""
PAGES = 6144 * 2048 * 4 / 4096  # of its input alone
ATTEMPTS = 6  # what else is allocated may stand in the way of large pieces: in one process of five, on a busy machine


def run(*arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_was_freed_is_kept() -> None:
    (without,) = run()
    assert float(without) > PAGES / 2  # otherwise this shows nothing
    found = []
    for _ in range(ATTEMPTS):
        kept, faults = run("keep")
        assert kept == "True"
        found.append(float(faults))
        if found[-1] < float(without) / 2:
            return
    pytest.fail(f"{without} pages a run from the system without, {found} with")


RETURNED = """
import os
from pathlib import Path
from seqmodels.host import keep_freed_memory, return_freed_memory
keep_freed_memory()
import numpy as np
held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
x = np.ones(2**25)
del x
kept = held()
print(return_freed_memory(), kept - held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_kept_memory_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True)
    returned, size = done.stdout.split()
    assert returned == "True"
    assert int(size) > 0.9 * 8 * 2**25


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from seqmodels import host

    monkeypatch.setattr(host.ctypes, "CDLL", lambda name: object())
    assert not host.keep_freed_memory()
    assert not host.return_freed_memory()
