"""Memory: what there is, and what scans with their gradients and training steps need a token, compiled and not run."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from experiments.bench import training
from experiments.bench.case import Row
from experiments.bench.kernels_cases import FAMILIES, QUICK, Family, Shape, structs, with_gradients
from experiments.bench.measure import Compiled, compiled, size_of

LENGTHS, HEADS, SIZE = (1024, 2048, 4096, 8192), 16, 128
STEPS = (1024, 2048, 4096)
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
    """The compiled peak at several lengths: of the scan and gradients of every family, and of training steps."""
    for family in FAMILIES:
        scan = functools.partial(family.xla, method="auto")
        for length in (128, 256) if quick else LENGTHS:
            shape = _shape(family, length, quick)
            given = structs(family, shape, "float32")
            out, _ = jax.eval_shape(scan, *given)
            program = compiled(with_gradients(scan, len(given)), *given, out)
            yield _row(f"memory {family.name}, {_sizes(shape)}", length, size_of(out) / length, program)
    width = 32 if quick else training.WIDTH
    for name in training.MODELS:
        for length in (64, 128) if quick else STEPS:
            # a model is the same at every length
            step, start, batch = training.parts(name, width, length, seed, window=64 if quick else training.LENGTH)
            case = f"memory train {name}, {training.LAYERS} layers of width {width}, {training.BATCH} rows"
            yield _row(case, batch["tokens"].size, 4 * width, compiled(step, start(), batch))


def _shape(family: Family, length: int, quick: bool) -> Shape:
    """One row; families without products have the width of their only shape."""
    heads, size = (2, 32) if quick else (HEADS, SIZE)
    own = Shape(1, length, heads, size) if family.products else QUICK[family.name][0] if quick else family.shapes[0]
    return own._replace(batch=1, length=length)


def _sizes(shape: Shape) -> str:
    if shape.heads > 1:
        return f"{shape.heads} heads of {shape.size} x {shape.size}"
    return f"width {shape.size}" + (f", state {shape.state}" if shape.state else "")


def _row(case: str, tokens: int, array_bytes_per_token: float, program: Compiled) -> Row:
    return {
        "case": case,
        "tokens": tokens,
        "peak_bytes": program.peak_bytes,
        "array_bytes_per_token": array_bytes_per_token,
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
    """A fixed part and one that grows with the tokens, by least squares; arrays are those of values, or of a
    model's width."""
    for case in dict.fromkeys(row["case"] for row in found):
        here = [row for row in found if row["case"] == case and row["peak_bytes"] is not None]
        if len(here) < 2:
            continue
        tokens, peaks = (np.array([row[name] for row in here], float) for name in ("tokens", "peak_bytes"))
        slope, fixed = np.polyfit(tokens, peaks, 1)
        off = np.max(np.abs(fixed + slope * tokens - peaks) / peaks)
        arrays = slope / here[0]["array_bytes_per_token"]
        token = f"{slope / 1e3:.0f} kB a token ({arrays:.1f} arrays)"
        yield f"{case}: {token} and {round(fixed / 1e6)} MB, within {off:.1%}"
