"""Training steps of whole models of 4 layers and width 512: tokens a second, and the time that is not in products."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments import zoo
from experiments.bench.case import Row
from experiments.bench.measure import compiled, side_by_side
from seqmodels import params
from seqmodels.train import TrainConfig, make_optimizer
from seqmodels.train.step import Step, TrainState, init_state, make_step

MODELS = ("Mamba-2", "GLA", "Griffin")
LAYERS, WIDTH, VOCABULARY, BATCH, LENGTH = 4, 512, 1024, 2, 1024


def rows(*, quick: bool, seed: int) -> Iterator[Row]:
    """One row a model; `quick` takes width 32 and 64 tokens."""
    width, length = (32, 64) if quick else (WIDTH, LENGTH)
    for name in MODELS:
        step, start, batch = parts(name, width, length, seed, window=length)
        program = compiled(step, start(), batch)
        run = functools.partial(program.run, start(), batch)
        taken = side_by_side({name: run}, budget=2.0 if quick else 10.0, least=3, most=20)[name]
        yield {
            "case": f"train {name}",
            "seconds": taken._asdict(),
            "compile_seconds": program.seconds,
            "peak_bytes": program.peak_bytes,
            "tokens_per_second": batch["tokens"].size / taken.median,
            "outside_products": outside_products(run, program.run.as_text()),
        }  # fmt: skip


def parts(
    name: str, width: int, length: int, seed: int, *, window: int
) -> tuple[Step, Callable[[], TrainState], dict[str, np.ndarray]]:
    """A model's training step, what makes the state before the first one, and a batch."""
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (BATCH, length), np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1)}
    batch |= {"start": np.arange(length)[None].repeat(BATCH, 0) == 0, "valid": np.ones((BATCH, length), bool)}
    config = dataclasses.replace(zoo.model(name, width, LAYERS, window=window), vocab_size=VOCABULARY)
    model = config.make(rngs=nnx.Rngs(seed))
    definition, arrays = params.split(model)
    optimizer = make_optimizer(TrainConfig(), params.labels(model))
    return make_step(definition, optimizer), functools.partial(init_state, arrays, optimizer, seed), batch


def outside_products(run: Callable[[], Any], program: str) -> float | None:
    """The part of the time that XLA's instructions take which is spent in those that multiply no matrices.

    On CPUs, where the profiler names instructions; None elsewhere. Instructions that run at the same time all count.
    """
    if jax.default_backend() != "cpu":
        return None
    taken = instructions(run)
    multiplying, known, containers = products(program), named(program), re.compile(r"while|call|conditional")
    parts = {name: ms for name, ms in taken.items() if name in known and not containers.match(name)}
    if not parts:
        return None
    return 1 - sum(ms for name, ms in parts.items() if name in multiplying) / sum(parts.values())


def instructions(run: Callable[[], Any]) -> Mapping[str, float]:
    """Milliseconds of every instruction by its name, as the profiler sees one run."""
    jax.block_until_ready(run())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    taken: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        (file,) = Path(folder).glob("**/*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    taken[event.name] += event.duration_ns / 1e6
    return taken


def named(program: str) -> set[str]:
    """Names of the instructions of a compiled program."""
    return set(re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = ", program, re.MULTILINE))


def products(program: str) -> set[str]:
    """Names of the instructions that are products of matrices, or fusions with one inside."""
    inside, found, computation = set(), set(), ""
    for line in program.splitlines():
        begin = re.match(r"%?([\w.-]+) [({].*\{$", line)
        if begin:
            computation = begin[1]
        elif re.search(r" (dot|convolution)\(", line):
            inside.add(computation)
            found.add(re.findall(r"%?([\w.-]+) = ", line)[0])
    for line in program.splitlines():
        fusion = re.search(r"%?([\w.-]+) = .* fusion\(.*calls=%?([\w.-]+)", line)
        if fusion and fusion[2] in inside:
            found.add(fusion[1])
    return found


def cells(row: Row) -> dict[str, str]:
    share = row["outside_products"]
    return {
        "case": row["case"],
        "ms": f"{1e3 * row['seconds']['median']:.0f}",
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "outside products": "" if share is None else f"{share:.0%}",
        "peak MB": f"{row['peak_bytes'] / 1e6:,.0f}" if row["peak_bytes"] else "",
        "compile s": f"{row['compile_seconds']:.1f}",
    }  # fmt: skip


def verdicts(found: list[Row]) -> Iterator[str]:
    for row in found:
        share = row["outside_products"]
        told = "" if share is None else f", {share:.0%} of the time outside products"
        yield f"{row['case']}: {row['tokens_per_second']:,.0f} tokens a second{told}"
