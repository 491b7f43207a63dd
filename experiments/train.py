"""Trains a preset: `python -m experiments.train PRESET [FLAGS]`; the same command goes on with an unfinished run."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.command import guarded, parse_train
from experiments.presets import DataConfig, Experiment

if TYPE_CHECKING:
    from seqmodels.data import Document


def heldout_part(documents: Sequence[Document], config: DataConfig) -> list[Document]:
    """Whole documents in the order of their names' hashes, as many as fit into `config.heldout_bytes`; at least one."""
    from seqmodels.data.text import name_hash

    if config.heldout_bytes is None:
        return list(documents)
    chosen: list[Document] = []
    size = 0
    for document in sorted(documents, key=lambda document: name_hash(document.name)):
        if not chosen or size + len(document.bytes) <= config.heldout_bytes:
            chosen.append(document)
            size += len(document.bytes)
    return chosen


def build_model(experiment: Experiment) -> Any:
    """The model with the initial parameters of the run's seed."""
    from flax import nnx

    return experiment.model.make(rngs=nnx.Rngs(experiment.train.seed))


def main(arguments: Sequence[str]) -> None:
    began = time.perf_counter()
    run, workdir = parse_train(arguments)
    experiment, config = run.experiment, run.experiment.train

    from seqmodels import params
    from seqmodels.data import VOCAB_SIZE, baselines, counts, documents, make_loader, make_stream_loader
    from seqmodels.train import InitialKind, make_evaluator, train
    from seqmodels.train.files import replace_file

    if experiment.model.vocab_size < VOCAB_SIZE:
        raise ValueError(f"model.vocab_size is {experiment.model.vocab_size}; byte-level text needs {VOCAB_SIZE}")
    training = documents(experiment.data.source, "train")
    heldout = heldout_part(documents(experiment.data.source, "heldout"), experiment.data)
    model = build_model(experiment)
    size = params.count(model)
    print(f"{run.preset}: {size:,} parameters, run folder {workdir}")
    for name, part in (("training", training), ("held out", heldout)):
        print(f"{name}: {counts(part).documents:,} documents, {counts(part).bytes:,} bytes of {experiment.data.source}")
    print("compiling the training step", flush=True)

    make = functools.partial(make_loader, align=experiment.model.alignment)
    if config.initial.kind == InitialKind.TRUNCATED_BPTT:
        make = make_stream_loader
    loader = make(training, batch_size=config.batch_size, length=config.length, seed=config.seed)
    evaluate = make_evaluator(params.split(model)[0], heldout, batch_size=config.batch_size, length=config.length)
    result = train(
        model, loader, config, workdir=workdir, record=run.record, evaluate=evaluate, tensorboard=run.tensorboard
    )

    scores = {"model": evaluate(result.arrays)["bits_per_byte"], **baselines(training, heldout)}
    summary = {
        "bits_per_byte": scores,
        "parameters": size,
        "steps": result.step,
        "tokens_per_second": result.tokens_per_second,
        "seconds": round(time.perf_counter() - began, 1),
    }
    path = workdir / "result.json"
    if result.tokens_per_second is None and path.exists():  # nothing was left to train: speed and time are the run's
        with contextlib.suppress(ValueError, KeyError):  # but not those of a damaged file
            earlier = json.loads(path.read_text())
            summary |= {name: earlier[name] for name in ("tokens_per_second", "seconds")}
    replace_file(path, json.dumps(summary, indent=1) + "\n")
    show(summary, workdir)


def show(summary: Mapping[str, Any], workdir: Path) -> None:
    """The closing table."""
    from rich.console import Console
    from rich.table import Table

    from seqmodels.train.progress import duration

    meaning = {
        "model": "this model, each document from a fresh state",
        "unigram": "byte frequencies of the training text",
        "bigram": "byte pair frequencies of the training text",
        "xz": "xz -9e, each held-out document apart",
    }
    table = Table(title="held-out bits per byte")
    table.add_column("code")
    table.add_column("bits per byte", justify="right")
    table.add_column("what it is")
    for name, value in summary["bits_per_byte"].items():
        table.add_row(name, f"{value:.3f}", meaning.get(name, ""), style="bold" if name == "model" else None)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
    console.print(table)
    speed = summary["tokens_per_second"]
    print(
        f"{summary['parameters']:,} parameters, {summary['steps']:,} steps, "
        + (f"{speed:,.0f} tokens/s, " if speed else "")
        + f"{duration(summary['seconds'])} in all\n"
        f"loss curve: {workdir / 'curve.png'}, {workdir / 'curve.csv'}; record: {workdir / 'metrics.jsonl'}"
    )


if __name__ == "__main__":
    guarded(main)
