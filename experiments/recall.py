"""Multi-query associative recall: how much can a model look up, and what does it carry for it?

"Zoology" (2312.04927), Figure 2: accuracy against width, the same sweep of learning rates for every model; and the task
as "Prefix-Scannable Models" (2506.10918), Figure 4, has it: queries spread evenly among random fillers. Claims:
attention solves all of it at width 64, recurrences need a state that grows with the pairs; a PSM with chunks of 64
equals attention within its training lengths, one of 32 falls behind at 512.

Power and filler: in the settings of Zoology queries follow the pairs closely (power 0.01) and all else is token 0; in
those of 2506.10918, and at cpu, queries are spread evenly (power 1), at cpu among zeros. State bytes (one sequence,
float32) stand beside accuracy: the plot is their trade-off.

Cost: smoke, seconds. cpu: vocabulary 512, length 64, 8 pairs, widths 16, 32 and 64, six models, two rates, one seed,
600 steps of 64 rows, the first 300 on 4 pairs in 16 tokens and 8 in 32: about COST minutes on 2 cores. There a layer of
attention over two tokens stands before one layer of each mixer, as the short convolutions of Zoology's later grid
(2402.18668) do, no MLP follows, and attention knows no positions. gpu: Zoology's lengths 64 to 256, 4,000 steps of 256
rows, nine models; aimed at 30 minutes on one H100. paper: 100,000 rows for 64 epochs, four rates, and both tasks.
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
MODELS = (ATTENTION, "sliding attention", "PSM, chunk 32", "Mamba-2", "GLA", "Gated DeltaNet")
MORE = ("PSM, chunk 64", "mLSTM", "Griffin")
ZOO = {ATTENTION: "Transformer", "Gated DeltaNet": "Gated DeltaNet [0, 1]"}  # names there, where they differ
RECURRENT = ("Mamba-2", "GLA", "Gated DeltaNet", "mLSTM", "Griffin")
RATES = (1e-4, 4.64e-4, 2.15e-3, 1e-2)  # logspace(-4, -2, 4)
SHORTER = {Scale.SMOKE: (20, 8, 16), Scale.CPU: (600, 64, 1_000), Scale.GPU: (4_000, 256, 1_000)}  # steps, rows, tests
SMALL = MQAR(64, 8, vocab_size=512, power_a=1.0)
CURRICULUM = tuple((150, dataclasses.replace(SMALL, length=n, pairs=n // 4)) for n in (16, 32))
TRAINING = TrainConfig(batch_size=512, weight_decay=0.1, betas=(0.9, 0.999), final_fraction=0.0)


def build(name: str, width: int, length: int, window: int) -> ModelConfig:
    """Two layers, as in Zoology; attention with one head and learned positions, without them it cannot tell places."""
    if name.startswith("PSM"):
        return zoo.psm(width, chunk=int(name.split()[-1]), aggregator=2, inference=2, heads=1)
    positions = {"learned_positions": length} if "attention" in name else {}
    return zoo.model(ZOO.get(name, name), width, 2, heads=1 if "attention" in name else 2, window=window, **positions)


def small(name: str, width: int) -> ModelConfig:
    """One layer of the mixer behind one of attention over two tokens."""
    if name.startswith("PSM"):
        return zoo.after_pairs(zoo.psm(width, chunk=int(name.split()[-1]), heads=1))
    mixer = "Transformer, NoPE" if name == ATTENTION else ZOO.get(name, name)
    return zoo.after_pairs(zoo.model(mixer, width, 1, heads=1 if "attention" in name else 2, channel=None))


def parent(task: MQAR, width: int, rate: float) -> TaskRun:
    """The published training of attention on a task: 64 epochs of 100,000 rows."""
    rows = {64: 512, 128: 512, 256: 256, 512: 128}[task.length]
    steps = 64 * 100_000 // rows
    training = dataclasses.replace(TRAINING, batch_size=rows, steps=steps, warmup=steps // 10, learning_rate=rate)
    model = build(ATTENTION, width, task.length, task.length // 4)
    return TaskRun(model, training, task, task, examples=100_000, test_size=3_000)


def grid(scale: Scale) -> list[tuple[str, MQAR, tuple[int, ...], tuple[float, ...], tuple[str, ...]]]:
    """`(name, task, widths, learning rates, models)` of a scale."""
    zoology = [(f"length {n}, {TASKS[f'mqar_{n}'].pairs} pairs", TASKS[f"mqar_{n}"]) for n in (64, 128, 256, 512)]
    spread = [("length 512, 8 pairs, spread evenly", TASKS["mqar_512_uniform"])]
    match scale:
        case Scale.SMOKE:
            return [("length 64, 8 pairs", SMALL, (16,), RATES[2:3], (ATTENTION, "Mamba-2"))]
        case Scale.CPU:
            return [("length 64, 8 pairs", SMALL, (16, 32, 64), RATES[2:], MODELS)]
        case Scale.GPU:
            return [(name, task, (64, 128), RATES[2:], MODELS + MORE) for name, task in zoology[:3]]
    return [(name, task, (64, 128, 256, 512), RATES, MODELS + MORE) for name, task in (*zoology, *spread)]


def cells(scale: Scale) -> list[Cell]:
    found = []
    for title, task, widths, rates, names in grid(scale):
        for width in widths:
            for name in names:
                for rate in rates:
                    base = parent(task, width, rate)
                    run = dataclasses.replace(base, model=build(name, width, task.length, task.length // 4))
                    if scale in SHORTER:
                        run = run.shorter(**dict(zip(("steps", "rows", "test_size"), SHORTER[scale], strict=True)))
                    if scale == Scale.CPU:
                        run = dataclasses.replace(run, model=small(name, width), curriculum=CURRICULUM)
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
