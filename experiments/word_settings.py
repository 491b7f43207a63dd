"""What experiments.word_problems trains: models, sizes at each scale, and its cells."""

from __future__ import annotations

import dataclasses

from experiments import zoo
from experiments.harness import Cell, Scale
from experiments.harness.tasks import TaskRun
from seqmodels.data.tasks import WordProblem
from seqmodels.models.lm import ModelConfig
from seqmodels.train.config import TrainConfig

TRAINED, LONGEST = 18, 180
BOTH, BACK = "PSM, aggregator both ways", "PSM, aggregator back only"
LEARNED = "Transformer, learned positions"
MODELS = (
    *(BOTH, BACK, LEARNED, "Transformer, NoPE", "Transformer, RoPE", "Mamba-2"),
    *("DeltaNet [0, 1]", "DeltaNet [-1, 1]", "DeltaProduct [-1, 1]", "Gated DeltaNet [-1, 1]"),
)
DEEP, DEPTHS = ("Transformer, RoPE", "Mamba-2"), (1, 2, 4)
RATE = 2e-3
RATES = {Scale.SMOKE: (RATE,), Scale.CPU: (RATE, 1e-2), Scale.GPU: (RATE,)}
WIDTH = {Scale.SMOKE: 16, Scale.CPU: 64, Scale.GPU: 128}
SWAPS = "S3 by swaps"
GROUPS = {Scale.SMOKE: (SWAPS,), Scale.CPU: (SWAPS,)}  # of which words are made; A5 and S5 otherwise
SHORTER = {Scale.SMOKE: (10, 8, 8), Scale.CPU: (2_500, 16, 256), Scale.GPU: (20_000, 128, 1024)}  # steps, rows, tests
DEEPER = {Scale.SMOKE: (10, 16, 8), Scale.CPU: (4_000, 128, 256), Scale.GPU: (20_000, 256, 1024)}  # for the layers
PUBLISHED = TrainConfig(steps=6_000, batch_size=32, learning_rate=1e-4, warmup=0, weight_decay=0.01, betas=(0.9, 0.999))


def build(name: str, width: int, layers: int) -> ModelConfig:
    if name in (BOTH, BACK):
        return zoo.psm(width, chunk=1, causal_aggregator=name == BACK)
    if name == LEARNED:
        return zoo.model("Transformer, NoPE", width, layers, learned_positions=LONGEST)
    return zoo.model(name.removesuffix(", RoPE"), width, layers)


def title(group: str) -> str:
    return f"{group}, words of 4 to 18"


def extrapolation(name: str, group: str, scale: Scale, rate: float | None) -> Cell:
    """Training on 4 to 18 elements, one test of 180, whose every position is a length. No rate: the published one."""
    moved = 2 if group == SWAPS else None
    task = WordProblem(group.split()[0], TRAINED, min_length=4, moved=moved, test_length=LONGEST)
    base = TaskRun(build(name, 768, 6), PUBLISHED, task, task.evaluation(), examples=10_000, test_size=1024)
    if rate is None:
        return Cell(name, title(group), base, base)
    steps, rows, tested = SHORTER[scale]
    run = dataclasses.replace(base, model=build(name, WIDTH[scale], 2), packed=True)
    run = run.shorter(steps=steps, rows=rows, test_size=tested, learning_rate=rate, lengths=(4, 8, 12))
    return Cell(name, title(group), run, base, f"rate {rate:g}" if len(RATES[scale]) > 1 else "")


def fewest_layers(name: str, layers: int, length: int, scale: Scale) -> Cell:
    """Training on words of A5 of one length, and all of two elements: which depth gets them right?"""
    task = WordProblem("A5", length, first_token=True, pairs=True, test_share=0.2)
    published = dataclasses.replace(PUBLISHED, steps=100_000, batch_size=512)
    base = TaskRun(build(name, 512, layers), published, task, task, examples=1_000_000, test_size=4096)
    run = base
    if scale in SHORTER:
        steps, rows, tested = DEEPER[scale]
        run = dataclasses.replace(base, model=build(name, WIDTH[scale], layers))
        run = run.shorter(steps=steps, rows=rows, test_size=tested, learning_rate=RATE)
    return Cell(f"{name}, {layers} layers", of_length(length), run, base, cost=layers / 2)


def of_length(length: int) -> str:
    return f"A5, words of {length}"


def cells(scale: Scale) -> list[Cell]:
    groups = GROUPS.get(scale, ("A5", "S5"))
    names = {Scale.SMOKE: (BOTH, "Mamba-2"), Scale.CPU: MODELS[:-1]}.get(scale, MODELS)
    lengths = {Scale.SMOKE: (5,), Scale.CPU: (5, 10)}.get(scale, (5, 10, 15, 20))
    depths = DEPTHS[:1] if scale == Scale.SMOKE else DEPTHS
    rates = RATES.get(scale, (None,))
    found = [extrapolation(name, group, scale, rate) for group in groups for name in names for rate in rates]
    found += [fewest_layers(name, n, length, scale) for length in lengths for name in DEEP for n in depths]
    return found
