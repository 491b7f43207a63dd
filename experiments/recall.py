"""Multi-query associative recall: how much can a model look up, and what does it carry for it?

"Zoology" (2312.04927), Figure 2: accuracy against width, the same sweep of learning rates for every model; and the task
as "Prefix-Scannable Models" (2506.10918), Figure 4, has it: queries spread evenly among random fillers. Claims:
attention solves all of it from width 64 on, recurrences recall more the wider they are; a PSM with chunks of 64
equals attention within its training lengths, one of 32 falls behind at 512 (of two chunks, none is aggregated).

Power and filler: in the settings of Zoology queries follow the pairs closely (power 0.01) and all else is token 0; in
those of 2506.10918, and at cpu, queries are spread evenly (power 1), at cpu among zeros. State: one sequence, float32.

Recurrences begin with a short convolution (GLA too, as in Zoology's later grid, 2402.18668).

Cost: smoke, seconds. cpu: vocabulary 512, length 64, 8 pairs, three widths, six models, two rates, one seed, 1,600
steps of 16 rows: 1,000 of rows of four examples with 4 pairs in 16 tokens, 300 of two with 8 in 32, then the task; 26
minutes on 2 busy cores. One layer there, no MLPs, no positions, a PSM with chunks of 8; before what has no convolution
stands a layer of attention over two tokens. gpu: Zoology's lengths 64 to 256, 4,000 steps of 256 rows, nine models;
aimed at 30 minutes on one H100. paper: 100,000 rows for 64 epochs, four rates, and both tasks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from experiments import zoo
from experiments.harness import Cell, Claim, Measure, NotTested, Published, Results, Scale, Table, main, plots
from experiments.harness.tasks import TaskRun
from seqmodels.data.tasks import MQAR, TASKS
from seqmodels.models.lm import ModelConfig
from seqmodels.train.config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATTENTION, FIGURE, SOLVED, MARGIN = "attention", "2312.04927, Figure 2", 0.99, 0.02
CPU_MODELS = (ATTENTION, "sliding attention", "PSM, chunk 8", "Mamba-2", "GLA", "Gated DeltaNet")
PSM_32, PSM_64, EVENLY = "PSM, chunk 32", "PSM, chunk 64", "length 512, 8 pairs, spread evenly"
MODELS = (*CPU_MODELS[:2], PSM_32, PSM_64, *CPU_MODELS[3:], "mLSTM", "Griffin")
width_of = lambda setting: int(setting.split("width ")[1])
ZOO = {ATTENTION: "Transformer, NoPE", "GLA": "GLA, convolution", "Gated DeltaNet": "Gated DeltaNet [0, 1]"}
RECURRENT = ("Mamba-2", "GLA", "Gated DeltaNet", "mLSTM", "Griffin")
RATES = (1e-4, 4.64e-4, 2.15e-3, 1e-2)  # logspace(-4, -2, 4)
SHORTER = {Scale.SMOKE: (20, 8, 16), Scale.CPU: (1_600, 16, 1_000), Scale.GPU: (4_000, 256, 1_000)}
SMALL = MQAR(64, 8, vocab_size=512, power_a=1.0)
CURRICULUM = tuple((steps, dataclasses.replace(SMALL, length=n, pairs=n // 4)) for n, steps in ((16, 1_000), (32, 300)))
TRAINING = TrainConfig(batch_size=512, weight_decay=0.1, betas=(0.9, 0.999), final_fraction=0.0)


def build(name: str, width: int, length: int, small: bool = False) -> ModelConfig:
    """Two layers, as in Zoology; `small`: one, and one of attention over two tokens before what has no convolution."""
    layers = 1 if small else 2
    if name.startswith("PSM"):
        sizes = {"aggregator": layers, "inference": layers, "heads": 1}
        model = zoo.psm(width, chunk=int(name.split()[-1]), bare=small, **sizes)
    else:
        options = {"channel": None} if small else {"learned_positions": length} if name == ATTENTION else {}
        heads = 1 if "attention" in name else 2
        model = zoo.model(ZOO.get(name, name), width, layers, heads=heads, window=length // 4, **options)
    return zoo.after_pairs(model) if small and name not in RECURRENT else model


def parent(task: MQAR, width: int, rate: float) -> TaskRun:
    """The published training of attention on a task: 64 epochs of 100,000 rows."""
    rows = {64: 512, 128: 512, 256: 256, 512: 128}[task.length]
    steps = 64 * 100_000 // rows
    training = dataclasses.replace(TRAINING, batch_size=rows, steps=steps, warmup=steps // 10, learning_rate=rate)
    return TaskRun(build(ATTENTION, width, task.length), training, task, task, examples=100_000, test_size=3_000)


def grid(scale: Scale) -> list[tuple[str, MQAR, tuple[int, ...], tuple[float, ...], tuple[str, ...]]]:
    """Titles, tasks, widths, learning rates, models."""
    spread = (EVENLY, TASKS["mqar_512_uniform"])
    zoology = [(f"length {n}, {TASKS[f'mqar_{n}'].pairs} pairs", TASKS[f"mqar_{n}"]) for n in (64, 128, 256, 512)]
    if scale == Scale.SMOKE:
        return [("length 64, 8 pairs", SMALL, (16,), RATES[2:3], (ATTENTION, "Mamba-2"))]
    if scale == Scale.CPU:
        return [("length 64, 8 pairs", SMALL, (16, 32, 64), RATES[2:], CPU_MODELS)]
    if scale == Scale.GPU:
        return [(name, task, (64, 128), RATES[2:], MODELS) for name, task in zoology[:3]]
    return [(name, task, (64, 128, 256, 512), RATES, MODELS) for name, task in (*zoology, spread)]


def cells(scale: Scale) -> Iterator[Cell]:
    for title, task, widths, rates, names in grid(scale):
        for width, name, rate in itertools.product(widths, names, rates):
            base = parent(task, width, rate)
            run = dataclasses.replace(base, model=build(name, width, task.length, small=scale == Scale.CPU))
            if scale in SHORTER:
                run = run.shorter(**dict(zip(("steps", "rows", "test_size"), SHORTER[scale], strict=True)))
                run = dataclasses.replace(run, curriculum=CURRICULUM if scale == Scale.CPU else (), packed=True)
            yield Cell(name, f"{title}, width {width}", run, base, f"rate {rate:g}" if len(rates) > 1 else "")


def attention_solves(results: Results) -> bool:
    settings = [name for name in results.settings() if width_of(name) >= 64 and EVENLY not in name]
    if not settings:
        raise NotTested("no width of 64 or more is run at this scale")
    return min([results.value(ATTENTION, name) for name in settings]) >= SOLVED


def width_helps(results: Results) -> bool:
    """From the least to the greatest width of the first task every recurrence gains, or is there already."""
    task = results.settings()[0].split(", width")[0]
    first, *_, last = [setting for setting in results.settings() if setting.startswith(task)] * 2
    names = [name for name in RECURRENT if name in results.models(first)]
    if first == last or not names:
        raise NotTested("no recurrence was run at two widths")
    ends = [(results.value(name, first), results.value(name, last)) for name in names]
    if max(end for _, end in ends) < 2 / int(task.split(" pairs")[0].split()[-1]):
        raise NotTested(f"none does better than a guess among the row's values: {'; '.join(results.said())}")
    return all(end > min(start + MARGIN, SOLVED) for start, end in ends)


def chunks_matter(results: Results) -> bool:
    return results.value(PSM_64, f"{EVENLY}, width 128") >= SOLVED > results.value(PSM_32, f"{EVENLY}, width 128")


def plot(results: Results, figure: Figure) -> None:
    columns = {"width": lambda entry: width_of(entry.setting), "bytes of state": "state_bytes"}
    plots.by_task(results, figure, "token_accuracy", columns, mark=", width")


TABLE = Table(
    name="recall",
    title="Multi-query associative recall",
    paper="2312.04927 (Zoology), Figure 2, and 2506.10918, Figure 4",
    cells=cells,
    measures=(
        Measure("token_accuracy", "accuracy"),
        Measure("state_bytes", "bytes of state", "{:,.0f}", "lower"),
        Measure("parameters", "parameters", "{:,.0f}", "lower"),
    ),
    seeds=dict.fromkeys(Scale, 1),
    published=tuple(
        Published(ATTENTION, f"length {n}, {pairs} pairs, width {width}", 1.0, FIGURE, "read off the figure")
        for (n, pairs), width in itertools.product(((64, 4), (128, 8), (256, 16), (512, 64)), (64, 128, 256, 512))
    ),
    claims=(
        Claim("attention solves the task from width 64 on", FIGURE, attention_solves),
        Claim("a wider recurrence recalls more", f"{FIGURE}, of other recurrences", width_helps),
        Claim(f"{PSM_64} solves length 512, {PSM_32} does not", "2506.10918, Figure 4", chunks_matter),
    ),
    plot=plot,
)

if __name__ == "__main__":
    main(TABLE)
