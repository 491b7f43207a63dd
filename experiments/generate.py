"""Continues a text with a trained run: `python -m experiments.generate RUN_DIR --prompt TEXT`."""

from __future__ import annotations

import codecs
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from experiments.command import guarded, load_run


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Prints the prompt and its continuation, byte by byte as they are sampled."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Folder of a run of experiments.train."""
    prompt: str = ""
    """Text to continue, from the beginning of a document."""
    steps: int = 400
    """Bytes to generate at most; the end of the document stops earlier."""
    temperature: float = 0.7
    """0 takes the likeliest byte each time."""
    top_k: int | None = None
    """Sample from the k likeliest bytes."""
    top_p: float | None = None
    """Sample from the likeliest bytes that together have this probability."""
    seed: int = 0
    """Of the sampling."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(GenerateOptions, prog="python -m experiments.generate", args=list(arguments))
    run = load_run(options.run_dir)

    import jax
    from flax import nnx

    from experiments.train import build_model
    from seqmodels import params
    from seqmodels.data import DOCUMENT, encode
    from seqmodels.generate import stream
    from seqmodels.train.checkpoint import load_params
    from seqmodels.train.initial import make_starts
    from seqmodels.train.optimizer import make_optimizer
    from seqmodels.train.step import init_state

    model = nnx.eval_shape(lambda: build_model(run.experiment))  # shapes will do: the values are in the checkpoint
    definition, arrays = params.split(model)
    config = run.experiment.train
    optimizer = make_optimizer(config, params.labels(model))
    starts = make_starts(model, config.initial)
    first = lambda: {} if starts is None else starts.first(model, config.batch_size)
    template = jax.eval_shape(lambda arrays: init_state(arrays, optimizer, 0, initial=first()), arrays)
    arrays, step = load_params(options.run_dir, template)
    print(f"{options.run_dir}, step {step}", file=sys.stderr)

    tokens = stream(
        params.merge(definition, arrays),
        [[DOCUMENT, *encode(options.prompt).tolist()]],
        options.steps,
        key=jax.random.key(options.seed),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=DOCUMENT,
    )
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span several tokens
    sys.stdout.write(options.prompt)
    count, began = 0, time.perf_counter()
    for (token,) in tokens:
        count += 1
        if token != DOCUMENT:
            sys.stdout.write(decoder.decode(bytes([token])))
            sys.stdout.flush()
        if count == 1:
            began = time.perf_counter()  # the first step compiles
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
    if count > 1:
        print(f"{count} tokens, {(count - 1) / (time.perf_counter() - began):,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    guarded(main)
