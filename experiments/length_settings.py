"""What experiments.length_generalization trains: sizes at each scale, bases, and its cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments import zoo
from experiments.harness import Cell, Published, Scale
from experiments.harness.lengths import LengthRun, Pretrained, Trained
from experiments.harness.passkeys import PasskeyRun
from experiments.harness.tasks import TaskRun
from seqmodels.data.tasks import Copying, Passkey
from seqmodels.mixers import GLAConfig, Mamba2Config, RGLRUConfig
from seqmodels.models.lm import ModelConfig
from seqmodels.train.config import InitialKind, InitialState, TrainConfig

PAPER = "2507.02782"
BASE, ZEROS, NOISE, FITTED = "base", "zeros", "noise", "fitted noise"
PASSING, BPTT = "state passing", "truncated BPTT"
KINDS = dict(zip((ZEROS, NOISE, FITTED, PASSING, BPTT), InitialKind, strict=True))
MAMBA, PSM = "Mamba-2", "PSM"
RECURRENT = (MAMBA, "GLA", "Griffin")
OFFICIAL = ("mamba2-370m", "mamba2-780m", "mamba2-1.3b")
COPYING, PASSKEY = "copying", "passkey"
PSM_LONGEST = 16_384  # a PSM reads a row at once


class Size(NamedTuple):
    width: int
    layers: int
    length: int
    rows: int  # of a batch
    steps: int  # of a base; then `post` more of each kind
    post: int
    rate: float
    longest: int
    letters: tuple[int, int]  # copied in training at most, and in testing
    copying_steps: int
    passkey: int  # length in training
    passkey_steps: int
    multiples: tuple[int, ...] = (1, 2, 4, 8, 16, 64)  # of that length, in testing
    heldout_rows: int = 32
    asked: int = 64  # test rows of a passkey, 8 times as many of copying
    dtype: str = "float32"


SIZES = {
    Scale.SMOKE: Size(16, 1, 16, 4, 10, 5, 3e-3, 256, (4, 14), 5, 96, 5, (1, 2), 2, 2),
    Scale.CPU: Size(64, 2, 32, 16, 2_000, 500, 3e-3, 262_144, (16, 50), 1_200, 128, 1_000),
    Scale.GPU: Size(256, 8, 128, 64, 6_000, 500, 1e-3, 262_144, (20, 70), 4_000, 256, 1_000),
    Scale.PAPER: Size(1024, 24, 2048, 256, 500_000, 500, 3e-4, 262_144, (50, 160), 20_000, 2048, 500, dtype="bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    checkpoint: str | None = None
    """A Hugging Face folder: its model is measured, and goes on from other states, as the bases are."""


def corpus(scale: Scale) -> str:
    return "cpython" if scale == Scale.SMOKE else "gutenberg_books"


def slowed(model: ModelConfig) -> ModelConfig:
    """The model with decays that are about a hundred times slower where it starts.

    With the published ones two layers of width 64 forget within a few bytes and have no state that could grow.
    """

    def slow(config: Any) -> Any:
        match config:
            case Mamba2Config():
                return dataclasses.replace(config, decay_range=(0.01, 0.16))
            case GLAConfig():
                return dataclasses.replace(config, temperature=1024.0)
            case RGLRUConfig():
                return dataclasses.replace(config, min_decay=0.999, max_decay=0.99999)
        return config

    groups = tuple((tuple(slow(config) for config in pattern), repeats) for pattern, repeats in model.layers)
    return dataclasses.replace(model, layers=groups)


def trained(name: str, scale: Scale) -> Trained:
    """The base of a model, at the scale's length (GLA's published one is 512)."""
    size = SIZES[scale]
    length = 512 if name == "GLA" and scale == Scale.PAPER else size.length
    if name == PSM:
        model = zoo.psm(size.width, chunk=length // 4, aggregator=size.layers // 2, inference=size.layers // 2)
    else:
        model = zoo.model(name, size.width, size.layers, window=length // 2)
    model = dataclasses.replace(model, vocab_size=257, dtype=size.dtype)
    if scale in (Scale.SMOKE, Scale.CPU):
        model = slowed(model)
    config = TrainConfig(
        steps=size.steps, batch_size=size.rows, length=length, learning_rate=size.rate, warmup=size.steps // 20
    )
    return Trained(model, config, corpus(scale))


def headings(scale: Scale, options: Options) -> dict[str, LengthRun]:
    """The base of every heading as it is."""
    size = SIZES[scale]
    names = {Scale.SMOKE: (MAMBA,)}.get(scale, (*RECURRENT, PSM))
    found = {}
    for name in names:
        one = trained(name, scale)
        longest = min(size.longest, PSM_LONGEST) if name == PSM else size.longest
        found[name] = LengthRun(one, one.train.length, longest, rows=size.heldout_rows)
    given = None if options.checkpoint is None else Path(options.checkpoint).expanduser().resolve()
    official = OFFICIAL if scale == Scale.PAPER else ()
    for name in dict.fromkeys([*official, *([] if given is None else [given.name])]):
        directory = str(given) if given is not None and given.name == name else ""
        length = size.length if scale == Scale.SMOKE else 2048
        found[name] = LengthRun(
            Pretrained(name, corpus(scale), directory), length, size.longest, rows=size.heldout_rows
        )
    return found


def post(scale: Scale, kind: InitialKind, *, length: int, steps: int) -> TrainConfig:
    """Steps after the base's, at a third of its rate."""
    size = SIZES[scale]
    initial = InitialState(kind)
    return TrainConfig(
        steps=steps, batch_size=size.rows, length=length, learning_rate=size.rate / 3, warmup=steps // 20,
        initial=initial,
    )  # fmt: skip


def cells(scale: Scale, options: Options) -> Iterator[Cell]:
    """Bases first: what goes on from them finds them trained."""
    size, found = SIZES[scale], headings(scale, options)
    for name, run in found.items():
        yield Cell(BASE, name, run, cost=4.0 if isinstance(run.base, Trained) else 1.0)
    for name, run in found.items():
        kinds = [ZEROS] if name == PSM else [FITTED] if scale == Scale.SMOKE else list(KINDS)
        for kind in kinds:
            config = post(scale, KINDS[kind], length=run.length, steps=size.post)
            yield Cell(kind, name, dataclasses.replace(run, post=config), run)
    yield from copying(scale)
    for name, run in found.items():
        if name == MAMBA or isinstance(run.base, Pretrained):
            yield from passkey(scale, PASSKEY if name == MAMBA else f"{PASSKEY}, {name}", run)


def copying(scale: Scale) -> Iterator[Cell]:
    size = SIZES[scale]
    short, long = size.letters
    task = Copying(min_length=min(short, 2), max_length=short, context=4 * (2 * short + 3))
    test = dataclasses.replace(task, min_length=long, max_length=long, packed=False, context=2 * long + 3)
    config = TrainConfig(
        steps=size.copying_steps, batch_size=64, learning_rate=size.rate, warmup=size.copying_steps // 20
    )
    run = TaskRun(trained(MAMBA, scale).model, config, task, test, test_size=8 * size.asked)
    passing = dataclasses.replace(config, initial=InitialState(InitialKind.STATE_PASSING))
    if scale != Scale.SMOKE:
        yield Cell(ZEROS, COPYING, run, cost=2.0)
    yield Cell(PASSING, COPYING, dataclasses.replace(run, train=passing), run, cost=2.0)


def passkey(scale: Scale, setting: str, run: LengthRun) -> Iterator[Cell]:
    size = SIZES[scale]
    task = Passkey(length=size.passkey)
    asked = PasskeyRun(run.base, task, size.multiples, None, size=size.asked)
    if isinstance(run.base, Pretrained):  # a base in bytes has never met a passkey
        yield Cell(BASE, setting, asked)
    for kind in [FITTED] if scale == Scale.SMOKE else [ZEROS, FITTED]:
        config = post(scale, KINDS[kind], length=task.length, steps=size.passkey_steps)
        yield Cell(kind, setting, dataclasses.replace(asked, train=config), asked, cost=3.0)


def published() -> Iterator[Published]:
    """The numbers of the authors' blog."""
    kinds = (BASE, NOISE, FITTED, PASSING, BPTT)
    perplexities = ((12.4, 8.75, 7.9, 7.75, 7.7), (None, None, 7.2, 6.87, 6.8), (None, None, 11.7, 6.35, 6.3))
    keys = ((0.04, 0.35, 0.64), (0.0, 0.0, 1.0))
    where = f"{PAPER}, authors' blog, "
    for name, values in zip(OFFICIAL, perplexities, strict=True):
        for kind, value in zip(kinds, values, strict=True):
            if value is not None:
                told = f"{where}perplexity at 32k on the Pile (ours: a novel)"
                yield Published(kind, name, value, told, "read off the figure, +-0.1", measure="perplexity_16x")
    for name, shares in zip(OFFICIAL, keys, strict=False):
        for kind, value in zip((BASE, ZEROS, FITTED), shares, strict=True):
            told = f"{where}passkey at 128k, mean of three depths"
            yield Published(kind, f"{PASSKEY}, {name}", value, told, "read off the figure", measure="passkey_64x")
    for kind, value in ((ZEROS, 0.27), (PASSING, 0.47)):
        told = f"{where}table of copying, +-0.03 without and +-0.11 with state passing"
        yield Published(kind, COPYING, value, told, "exactly, off the image of the table", measure="token_accuracy")
