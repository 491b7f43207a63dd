"""Scans, forward and backward, against `jax.lax` written by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from experiments.bench import by_hand, families
from experiments.bench.case import Function, Row, measured, over_heads
from experiments.bench.measure import Work
from seqmodels.operators import diagonal_scan, gated_linear_attention


def rows(*, quick: bool, seed: int) -> Iterator[Row]:
    """One row for every case, direction and implementation."""
    yield from _outer(128 if quick else 2048, seed)
    yield from families.cases(128 if quick else 2048, seed)
    for length in (256,) if quick else (64, 256, 1024, 4096, 16384, 65536):
        yield from _diagonal(length, seed)


def _outer(length: int, seed: int) -> Iterator[Row]:
    """S' = a S + k v^T with a decay a head: 8 heads of 64 x 64."""
    heads, size = 8, 64
    random = np.random.default_rng(seed)
    query, key, value = (random.standard_normal((1, length, heads, size)) / 8 for _ in range(3))
    log_decay = -np.logaddexp(random.standard_normal((1, length, heads)), 0) / 10
    inputs = (query, key, value, log_decay)

    def ours(method: str) -> Function:
        return lambda *x: gated_linear_attention(*x, method=method)[0]

    loop = over_heads(by_hand.outer)
    implementations = {
        "lax.scan": loop,
        "lax.associative_scan": over_heads(by_hand.associative_outer),
        "chunked": ours("chunked"),
        "auto": ours("auto"),
    }
    moved = 4.0 * (sum(x.size for x in inputs) + value.size)
    work = Work(moved, 2.0 * 3 * length * heads * size * size)
    yield from measured(
        f"outer, a decay per head, T={length}", implementations, over_heads(by_hand.outer), inputs, work
    )


def _diagonal(length: int, seed: int) -> Iterator[Row]:
    """h' = a h + b over 256 channels."""
    width = 256
    random = np.random.default_rng(seed)
    log_decay = -np.exp(random.standard_normal((1, length, width)) - 2)
    drive = random.standard_normal((1, length, width))

    implementations = {
        "lax.scan": by_hand.diagonal,
        "lax.associative_scan": by_hand.associative_diagonal,
        "auto": lambda *x: diagonal_scan(*x)[0],
    }
    work = Work(4.0 * 3 * drive.size, 0.0)
    # the programs that are compared may be the same: the long ones, whose times vary most, take more turns
    yield from measured(f"diagonal, T={length}", implementations, by_hand.diagonal, (log_decay, drive), work, least=25)


def verdicts(found: list[Row]) -> Iterator[str]:
    """What the figures say about the project's own targets."""
    times = {(row["case"], row["direction"], row["implementation"]): row["seconds"]["median"] for row in found}
    cases = dict.fromkeys((row["case"], row["direction"]) for row in found)
    for case, direction in cases:
        scan, ours = (times[case, direction, name] for name in ("lax.scan", "auto"))
        associative = times.get((case, direction, "lax.associative_scan"))
        if associative is None:
            yield f"{case}, {direction}: {scan / ours:.1f} x lax.scan"
        elif case.startswith("diagonal"):
            yield f"{case}, {direction}: {ours / min(scan, associative):.2f} of the time of the better of the two"
        else:
            yield f"{case}, {direction}: {scan / ours:.1f} x lax.scan, {associative / ours:.1f} x associative_scan"
