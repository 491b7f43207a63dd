"""A training process to be killed: `python -m tests.train.runner WORKDIR STEPS`."""

from __future__ import annotations

from experiments.command import guarded
from seqmodels.train import train
from tests.train.tiny import loader, tiny_config, tiny_model


def main(arguments: list[str]) -> None:
    workdir, steps = arguments
    # a checkpoint at every seventh step: many kills fall into a save
    train(tiny_model(), loader(), tiny_config(steps=int(steps), checkpoint_every=7), workdir=workdir, quiet=True)


if __name__ == "__main__":
    guarded(main)
