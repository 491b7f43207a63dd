"""Memory: what there is, and what scans with their gradients need for every token, of which nothing is run."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from experiments.bench.case import Row
from experiments.bench.kernels_cases import FAMILIES, Shape, structs, with_gradients
from experiments.bench.measure import compiled, size_of

LENGTHS, HEADS, SIZE = (1024, 2048, 4096, 8192), 16, 128
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@functools.cache
def there() -> float:
    """Bytes that the process may take, as seen when it first asks: it may keep, and take again, what it has freed."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if Path("/proc/meminfo").exists():
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        found += [1024 * int(available[1])] if available else []
    limits = [Path(limit).read_text().strip() for limit in LIMITS if Path(limit).exists()]  # of a container
    return min(found + [int(limit) for limit in limits if limit.isdigit()])


def too_much(needed: float) -> str | None:
    """Why a program is left out that needs so many bytes; None where it fits and a tenth is left."""
    if needed <= 0.9 * there():
        return None
    return f"left out: needs about {needed / 1e9:.1f} GB, {there() / 1e9:.1f} are there"


def rows(*, quick: bool, seed: int) -> Iterator[Row]:
    """The compiled peak of a scan and its gradients at several lengths, for every family with a state of K x V."""
    lengths, heads, size = ((128, 256), 2, 32) if quick else (LENGTHS, HEADS, SIZE)
    for family in FAMILIES:
        if not family.products:
            continue
        scan = functools.partial(family.xla, method="auto")
        for length in lengths:
            given = structs(family, Shape(1, length, heads, size), "float32")
            out, _ = jax.eval_shape(scan, *given)
            program = compiled(with_gradients(scan, len(given)), *given, out)
            yield {
                "case": f"memory {family.name}, {heads} heads of {size} x {size}",
                "tokens": length,
                "peak_bytes": program.peak_bytes,
                "array_bytes_per_token": size_of(out) / length,
                "compile_seconds": program.seconds,
            }


def cells(row: Row) -> dict[str, str]:
    peak = row["peak_bytes"]
    return {
        "case": row["case"],
        "tokens": f"{row['tokens']:,}",
        "peak MB": "" if peak is None else f"{peak / 1e6:,.1f}",
        "kB a token": "" if peak is None else f"{peak / row['tokens'] / 1e3:,.0f}",
        "compile s": f"{row['compile_seconds']:.1f}",
    }


def verdicts(found: list[Row]) -> Iterator[str]:
    """A fixed part and one that grows with the tokens, by least squares; arrays are those of values."""
    for case in dict.fromkeys(row["case"] for row in found):
        here = [row for row in found if row["case"] == case and row["peak_bytes"] is not None]
        if len(here) < 2:
            continue
        tokens, peaks = (np.array([row[name] for row in here], float) for name in ("tokens", "peak_bytes"))
        slope, fixed = np.polyfit(tokens, peaks, 1)
        off = np.max(np.abs(fixed + slope * tokens - peaks) / peaks)
        arrays = slope / here[0]["array_bytes_per_token"]
        yield f"{case}: {slope / 1e3:.0f} kB a token ({arrays:.1f} arrays) and {fixed / 1e6:.0f} MB, within {off:.1%}"
