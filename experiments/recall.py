"""Multi-query associative recall: how much can a model look up, and what does it carry for it?

"Zoology" (2312.04927), Figure 2: accuracy against width, the same sweep of learning rates for every model; and the task
as "Prefix-Scannable Models" (2506.10918), Figure 4, has it: queries spread evenly among random fillers. Claims:
attention solves all of it at width 64, recurrences need a state that grows with the pairs; a PSM with chunks of 64
equals attention within its training lengths, one of 32 falls behind at 512.

Power and filler: in the settings of Zoology queries follow the pairs closely (power 0.01) and all else is token 0; in
those of 2506.10918, and at cpu, queries are spread evenly (power 1), at cpu among zeros. State bytes (one sequence,
float32) stand beside accuracy: the plot is their trade-off.

Cost: smoke, seconds. cpu: vocabulary 512, length 64, 8 pairs, widths 16, 32 and 64, six models, two rates, one seed.
gpu: Zoology's lengths 64 to 256, 4,000 steps of 256 rows, two rates, nine models; aimed at 30 minutes on one H100.
paper: 100,000 rows for 64 epochs, four rates, lengths 64 to 512, and both tasks.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from experiments import zoo
from experiments.harness import Cell, Claim, Measure, NotTested, Published, Results, Scale, Table, main, plots
from experiments.harness.tasks import TaskRun
from seqmodels.data.tasks import MQAR, TASKS
from seqmodels.models.lm import ModelConfig
from seqmodels.train.config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATTENTION, FIGURE, SOLVED = "attention", "2312.04927, Figure 2", 0.99
NAMES = {
    ATTENTION: "Transformer",
    "sliding attention": "sliding attention",
    "PSM, chunk 32": "",
    "Mamba-2": "Mamba-2",
    "GLA": "GLA",
    "Gated DeltaNet": "Gated DeltaNet [0, 1]",
    "PSM, chunk 64": "",
    "mLSTM": "mLSTM",
    "Griffin": "Griffin",
}
RECURRENT = ("Mamba-2", "GLA", "Gated DeltaNet", "mLSTM", "Griffin")
RATES = (1e-4, 4.64e-4, 2.15e-3, 1e-2)  # logspace(-4, -2, 4)
SHORTER = {
    Scale.SMOKE: {"steps": 20, "rows": 8, "test_size": 16},
    Scale.CPU: {"steps": 1_000, "rows": 64, "test_size": 512},
    Scale.GPU: {"steps": 4_000, "rows": 256, "test_size": 1_000},
}
TRAINING = TrainConfig(batch_size=512, weight_decay=0.1, betas=(0.9, 0.999), final_fraction=0.0)


def build(name: str, width: int, length: int, window: int) -> ModelConfig:
    """Two layers, as in Zoology; attention with one head and learned positions, without them it cannot tell places."""
    if name.startswith("PSM"):
        return zoo.psm(width, chunk=int(name.split()[-1]), aggregator=2, inference=2, heads=1)
    positions = {"learned_positions": length} if "attention" in name else {}
    return zoo.model(NAMES[name], width, 2, heads=1 if "attention" in name else 2, window=window, **positions)


def parent(task: MQAR, width: int, rate: float) -> TaskRun:
    """The published training of attention on a task: 64 epochs of 100,000 rows."""
    rows = {64: 512, 128: 512, 256: 256, 512: 128}[task.length]
    steps = 64 * 100_000 // rows
    training = dataclasses.replace(TRAINING, batch_size=rows, steps=steps, warmup=steps // 10, learning_rate=rate)
    model = build(ATTENTION, width, task.length, task.length // 4)
    return TaskRun(model, training, task, task, examples=100_000, test_size=3_000)


def grid(scale: Scale) -> list[tuple[str, MQAR, tuple[int, ...], tuple[float, ...], tuple[str, ...]]]:
    """`(name, task, widths, learning rates, models)` of a scale."""
    names = tuple(NAMES)
    small = MQAR(64, 8, vocab_size=512, power_a=1.0)
    zoology = [(f"length {n}, {TASKS[f'mqar_{n}'].pairs} pairs", TASKS[f"mqar_{n}"]) for n in (64, 128, 256, 512)]
    spread = [("length 512, 8 pairs, spread evenly", TASKS["mqar_512_uniform"])]
    match scale:
        case Scale.SMOKE:
            return [("length 64, 8 pairs", small, (16,), RATES[2:3], (ATTENTION, "Mamba-2"))]
        case Scale.CPU:
            return [("length 64, 8 pairs", small, (16, 32, 64), RATES[2:], names[:6])]
        case Scale.GPU:
            return [(name, task, (64, 128), RATES[2:], names) for name, task in zoology[:3]]
    return [(name, task, (64, 128, 256, 512), RATES, names) for name, task in (*zoology, *spread)]


def cells(scale: Scale) -> list[Cell]:
    found = []
    for title, task, widths, rates, names in grid(scale):
        for width in widths:
            for name in names:
                for rate in rates:
                    base = parent(task, width, rate)
                    run = dataclasses.replace(base, model=build(name, width, task.length, task.length // 4))
                    if scale != Scale.PAPER:
                        run = run.shorter(**SHORTER[scale])
                    variant = f"rate {rate:g}" if len(rates) > 1 else ""
                    found.append(Cell(name, f"{title}, width {width}", run, base, variant))
    return found


def attention_solves(results: Results) -> bool:
    return min([results.value(ATTENTION, setting) for setting in results.settings()]) >= SOLVED


def width_helps(results: Results) -> bool:
    """From the least to the greatest width of the first task every recurrence gains, or is there already."""
    task = results.settings()[0].split(", width")[0]
    first, *_, last = [setting for setting in results.settings() if setting.startswith(task)] * 2
    names = [name for name in RECURRENT if name in results.models(first)]
    if first == last or not names:
        raise NotTested("no recurrence was run at two widths")
    return all(results.value(name, last) > min(results.value(name, first), SOLVED) for name in names)


def chunks_matter(results: Results) -> bool:
    setting = "length 512, 8 pairs, spread evenly, width 128"
    return results.value("PSM, chunk 64", setting) >= SOLVED > results.value("PSM, chunk 32", setting)


def plot(results: Results, figure: Figure) -> None:
    plots.trade_off(results, figure, "state_bytes", "token_accuracy", x_title="bytes of state for one sequence")


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
    seeds={Scale.SMOKE: 1, Scale.CPU: 1, Scale.GPU: 1, Scale.PAPER: 1},
    published=tuple(
        Published(ATTENTION, f"length {n}, {pairs} pairs, width {width}", 1.0, FIGURE, "read off the figure")
        for n, pairs in ((64, 4), (128, 8), (256, 16), (512, 64))
        for width in (64, 128, 256, 512)
    ),
    claims=(
        Claim("attention solves the task at every width", FIGURE, attention_solves),
        Claim("a wider recurrence recalls more", FIGURE, width_helps),
        Claim("at length 512 a PSM of chunk 64 solves it, one of 32 does not", "2506.10918, Figure 4", chunks_matter),
    ),
    plot=plot,
)

if __name__ == "__main__":
    main(TABLE)
