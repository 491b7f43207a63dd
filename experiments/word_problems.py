"""Word problems of the groups A5 and S5: after every element, the product of all so far.

"Prefix-Scannable Models" (2506.10918), Figure 3: a Transformer-PSM of chunk 1, trained on words of 4 to 18 elements,
errs little at ten times that length, where Transformers and Mamba fail. Its aggregator looks both ways in the paper and
back only in the authors' code, so both are run. "The Illusion of State" (2404.08819), Figure 3: the fewest layers that
reach 90 % of whole words right grow with the length for Transformers and state-space models, not for a recurrence with
a full transition; "Unlocking State-Tracking" (2411.12537): DeltaNet in [-1, 1] tracks what DeltaNet in [0, 1] cannot.

The Transformer with learned positions has never trained those past 18: its failure there is built in, as published.

Cost: smoke, seconds. cpu: words of A5 of 4 to 18 elements, nine models of width 64, 4,000 steps of 64 rows; and the
fewest layers of two models at lengths 5 and 10. gpu: S5 as well, width 128, 20,000 steps of 128 rows, lengths to 20;
aimed at 30 minutes on one H100. paper: 10,000 words of S5 a length for 20 epochs at width 768; a million words of A5.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from experiments import zoo
from experiments.harness import Cell, Claim, Measure, Results, Scale, Table, main, plots
from experiments.harness.tasks import TaskRun
from seqmodels.data.tasks import WordProblem
from seqmodels.models.lm import ModelConfig
from seqmodels.train.config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST = 180
BOTH, BACK = "PSM, aggregator both ways", "PSM, aggregator back only"
LEARNED = "Transformer, learned positions"
MODELS = (
    *(BOTH, BACK, LEARNED, "Transformer, NoPE", "Transformer, RoPE", "Mamba-2"),
    *("DeltaNet [0, 1]", "DeltaNet [-1, 1]", "DeltaProduct [-1, 1]", "Gated DeltaNet [-1, 1]"),
)
DEEP, DEPTHS, ENOUGH = ("Transformer, RoPE", "Mamba-2"), (1, 2, 4), 0.9
RATE = 2e-3
WIDTH = {Scale.SMOKE: 16, Scale.CPU: 64, Scale.GPU: 128}
SHORTER = {Scale.SMOKE: (10, 8, 8), Scale.CPU: (4_000, 64, 256), Scale.GPU: (20_000, 128, 1024)}  # steps, rows, tests
PUBLISHED = TrainConfig(steps=6_000, batch_size=32, learning_rate=1e-4, warmup=0, weight_decay=0.01, betas=(0.9, 0.999))


def build(name: str, width: int, layers: int) -> ModelConfig:
    if name in (BOTH, BACK):
        return zoo.psm(width, chunk=1, causal_aggregator=name == BACK)
    if name == LEARNED:
        return zoo.model("Transformer, NoPE", width, layers, learned_positions=LONGEST)
    return zoo.model(name.removesuffix(", RoPE"), width, layers)


def title(group: str) -> str:
    return f"{group}, words of 4 to 18"


def extrapolation(name: str, group: str, scale: Scale) -> Cell:
    """Training on 4 to 18 elements, one test of 180, whose every position is a length."""
    task = WordProblem(group, 18, min_length=4, test_length=LONGEST)
    base = TaskRun(build(name, 768, 6), PUBLISHED, task, task.evaluation(), examples=10_000, test_size=1024)
    run = base
    if scale in SHORTER:
        width, (steps, rows, tested) = WIDTH[scale], SHORTER[scale]
        run = dataclasses.replace(base, model=build(name, width, 2))
        run = run.shorter(steps=steps, rows=rows, test_size=tested, learning_rate=RATE, lengths=(4, 8, 12))
    return Cell(name, title(group), run, base)


def fewest_layers(name: str, layers: int, length: int, scale: Scale) -> Cell:
    """Words of A5 of one length, and all of two elements: which depth gets them right?"""
    task = WordProblem("A5", length, first_token=True, pairs=True, test_share=0.2)
    published = dataclasses.replace(PUBLISHED, steps=100_000, batch_size=512)
    base = TaskRun(build(name, 512, layers), published, task, task, examples=1_000_000, test_size=4096)
    run = base
    if scale in SHORTER:
        width, (steps, rows, tested) = WIDTH[scale], SHORTER[scale]
        run = dataclasses.replace(base, model=build(name, width, layers))
        run = run.shorter(steps=steps, rows=2 * rows, test_size=tested, learning_rate=RATE)
    return Cell(f"{name}, {layers} layers", f"A5, words of {length}", run, base, cost=layers / 2)


def cells(scale: Scale) -> list[Cell]:
    groups = ("A5",) if scale in (Scale.SMOKE, Scale.CPU) else ("A5", "S5")
    names = {Scale.SMOKE: (BOTH, "Mamba-2"), Scale.CPU: MODELS[:-1]}.get(scale, MODELS)
    lengths = {Scale.SMOKE: (5,), Scale.CPU: (5, 10)}.get(scale, (5, 10, 15, 20))
    depths = DEPTHS[:1] if scale == Scale.SMOKE else DEPTHS
    found = [extrapolation(name, group, scale) for group in groups for name in names]
    found += [fewest_layers(name, n, length, scale) for length in lengths for name in DEEP for n in depths]
    return found


def extrapolates(name: str) -> Claim:
    """The claim that a model errs little at up to nine times its training length."""

    def test(results: Results) -> bool:
        return results.value(name, title("A5")) >= ENOUGH

    return Claim(f"{name}: at least {ENOUGH:.0%} of tokens right in words of {LONGEST}", "2506.10918, Figure 3", test)


def others_fail(results: Results) -> bool:
    return max([results.value(name, title("A5")) for name in MODELS[2:6]]) < ENOUGH / 2


def signs_help(results: Results) -> bool:
    return results.value("DeltaNet [-1, 1]", title("A5")) > results.value("DeltaNet [0, 1]", title("A5"))


def fewest(results: Results, name: str, length: int) -> float:
    """The fewest layers that get words of that length right; infinitely many where none does."""
    right = [results.value(f"{name}, {n} layers", f"A5, words of {length}", "sequence_accuracy") for n in DEPTHS]
    return min([n for n, share in zip(DEPTHS, right, strict=True) if share >= ENOUGH], default=float("inf"))


def longer_needs_more(results: Results) -> bool:
    return all(fewest(results, name, 10) > fewest(results, name, 5) for name in DEEP)


def plot(results: Results, figure: Figure) -> None:
    plots.by_setting(
        results, figure, "position", y="accuracy", x_title="elements", y_title="token accuracy", trained=18
    )


TABLE = Table(
    name="word_problems",
    title="Word problems of S5 and A5",
    paper="2506.10918, Figure 3; 2404.08819, Figure 3; 2411.12537, Figure 4",
    cells=cells,
    measures=(
        Measure("token_accuracy", "token accuracy"),
        Measure("sequence_accuracy", "whole words"),
        Measure("state_bytes", "bytes of state", "{:,.0f}", "lower"),
        Measure("parameters", "parameters", "{:,.0f}", "lower"),
    ),
    seeds={Scale.SMOKE: 1, Scale.CPU: 1, Scale.GPU: 1, Scale.PAPER: 3},
    claims=(
        extrapolates(BOTH),
        extrapolates(BACK),
        Claim("Transformers and Mamba-2 do not come near", "2506.10918, Figure 3", others_fail),
        Claim("DeltaNet in [-1, 1] tracks more than in [0, 1]", "2411.12537, Figure 4", signs_help),
        Claim(
            "longer words need more layers of a Transformer and of Mamba-2", "2404.08819, Figure 3", longer_needs_more
        ),
    ),
    plot=plot,
)

if __name__ == "__main__":
    main(TABLE)
