"""How everything here is timed: side by side, compilation apart, against rates measured on the same machine."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BRIEF, WARM, SLOW = 1.0, 5.0, 30.0  # seconds


class Quartiles(NamedTuple):
    """Seconds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Quartiles:
        return cls(*np.percentile(seconds, (25, 50, 75)).tolist())


class Compiled(NamedTuple):
    """A program for given arguments, how long it took to trace and compile, and what it needs at its peak."""

    run: Callable[..., Any]
    seconds: float
    peak_bytes: int | None


def compiled(function: Callable[..., Any], *arguments: Any) -> Compiled:
    """Traces and compiles anew; what the process has compiled before does not count."""
    fresh = jax.jit(lambda *x: function(*x))
    began = time.perf_counter()
    program = fresh.lower(*arguments).compile()
    seconds = time.perf_counter() - began
    memory = program.memory_analysis()
    peak = None
    if memory is not None:  # arguments, results and what lies between; a result may take an argument's place
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        peak -= memory.alias_size_in_bytes
    return Compiled(program, seconds, peak)


def seconds_of(run: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - began


def side_by_side(
    runs: Mapping[str, Callable[[], Any]], *, budget: float = 2.0, least: int = 5, most: int = 200
) -> dict[str, Quartiles]:
    """Times of every run, taken in turn so that a busy machine slows all of them alike, from another one on each time.

    Each gets `least` to `most` turns, as many as fit into about `budget` seconds for each; one where a turn of some run
    takes over half a minute. One whose first call took less than a second runs once more before each turn: what ran
    before leaves its data in the caches, and gigabytes that it had in the allocator's hands.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    # the first call warms up; one that takes seconds need not be repeated to know how long it takes
    first = {name: seconds_of(run) for name, run in runs.items()}
    slowest = max(taken if taken > WARM else seconds_of(runs[name]) for name, taken in first.items())
    names = list(runs)
    taken = slowest if max(first.values()) >= BRIEF else 2 * slowest
    for turn in range(1 if slowest > SLOW else int(np.clip(budget / max(taken, 1e-9), least, most))):
        begin = turn % len(names)
        for name in names[begin:] + names[:begin]:
            if first[name] < BRIEF:
                seconds_of(runs[name])
            times[name].append(seconds_of(runs[name]))
    return {name: Quartiles.of(taken) for name, taken in times.items()}


class Work(NamedTuple):
    """What a computation cannot do without: bytes that it reads and writes, operations in products, exponentials."""

    moved: float
    operations: float
    exponentials: float = 0.0


class Rates(NamedTuple):
    """What this machine reaches in a second: bytes read and written by a large copy, operations of a large product,
    and exponentials in float32 of what lies in registers."""

    copy: float
    product: float
    exponential: float = math.inf

    def floors(self, work: Work) -> dict[str, float]:
        """Seconds that the machine needs at these rates for the bytes and the products, if there are any."""
        found = {"copy": work.moved / self.copy, "product": work.operations / self.product}
        return {name: seconds for name, seconds in found.items() if seconds}

    def exponentials(self, work: Work) -> float:
        """Seconds of these alone. They are no floor: some forms share them, and others hide them behind bytes."""
        return work.exponentials / self.exponential

    def share(self, work: Work, seconds: float) -> float:
        """The part of the time that the machine would need for the same work at these rates."""
        return max(self.floors(work).values()) / seconds


def rates(dtype: Any = "float32") -> Rates:
    """Measured once a process and type of products; copies and exponentials are in float32 in any case."""
    return _rates(jnp.dtype(dtype).name)


@functools.cache
def _rates(dtype: str) -> Rates:
    # On an accelerator a dispatch takes tens of microseconds, and each of these a millisecond or more: 4 GB moved,
    # 1.1 T operations, 17 G exponentials.
    on_cpu = jax.default_backend() == "cpu"
    large, side, chain = jnp.ones(1 << (24 if on_cpu else 29)), 1024 if on_cpu else 8192, 16 if on_cpu else 256
    few, square = large[: large.size // 8], jnp.ones((side, side), dtype)
    copy, product = jax.jit(lambda x: x + 1), jax.jit(lambda x: x @ x)
    exponential = jax.jit(lambda x: functools.reduce(lambda x, _: jnp.exp(-x), range(chain), x))
    runs = {
        "copy": lambda: copy(large),
        "product": lambda: product(square),
        "exponential": lambda: exponential(few),
    }
    low = {name: taken.low for name, taken in side_by_side(runs, budget=0.5).items()}
    return Rates(2 * large.nbytes / low["copy"], 2 * side**3 / low["product"], chain * few.size / low["exponential"])


def size_of(tree: Any) -> int:
    """Bytes of all arrays, which may be there in shape and type alone."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def largest_error(actual: Any, expected: Any) -> float:
    """The largest difference, array by array, relative to the array's largest entry."""

    def of(a: Any, b: Any) -> float:
        kind = np.complex128 if np.iscomplexobj(b) else np.float64
        a, b = np.asarray(a, kind), np.asarray(b, kind)
        return float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), 1e-300))

    return float(np.max(jax.tree.leaves(jax.tree.map(of, actual, expected))))  # Python's max passes over a NaN


def verify(name: str, actual: Any, expected: Any, tolerance: float) -> float:
    """The largest error; raises AssertionError where it is above `tolerance`, so that no wrong result is timed."""
    return allowed(name, largest_error(actual, expected), tolerance)


def allowed(name: str, error: float, tolerance: float) -> float:
    """The error itself; raises AssertionError where it is above `tolerance`, or is no number."""
    if not error <= tolerance:
        raise AssertionError(f"{name} is off by {error:.1e} of its largest entry (allowed {tolerance:.0e}): not timed")
    return error
