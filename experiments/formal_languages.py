"""Parity and modular arithmetic, tested at more than six times the training length: which recurrences track a state?

"Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues" (2411.12537), Table 3, whose languages are those
of xLSTM (2405.04517). Trained on 3 to 40 symbols, tested on 40 to 256; scaled accuracy is 0 at chance and 1 where all
is right. Claims: who solves parity and who does not; the ordering of models in modular arithmetic.

Cost: smoke, seconds. cpu: parity alone, six models of width 32, two seeds, two learning rates, 1,000 steps of 32 rows
with a curriculum over lengths (published: 20,000 of 256 at width 128 without one), 53 minutes on one core. gpu:
all three languages, ten models, 4,000 steps of 256 rows with the curriculum; aimed at 30 minutes on one H100. paper:
the published settings, 3 seeds. The sLSTM has one head, as in its authors' parity: memories mix inside a head alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments import zoo
from experiments.harness import Cell, Claim, Measure, Published, Results, Scale, Table, main, plots
from experiments.harness.tasks import TaskRun
from seqmodels.data.tasks import TASKS
from seqmodels.train.config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARITY, ARITHMETIC, BRACKETS = "parity", "modular arithmetic", "modular arithmetic with brackets"
TASK = {PARITY: "parity", ARITHMETIC: "modular_arithmetic", BRACKETS: "modular_arithmetic_brackets"}
CPU_MODELS = ("Transformer", "sLSTM", "mLSTM", "Mamba-2", "DeltaNet [0, 1]", "DeltaNet [-1, 1]")
SOLVERS = ("LSTM", "sLSTM", "DeltaNet [-1, 1]", "Gated DeltaNet [-1, 1]")
MODELS = (*CPU_MODELS, "LSTM", "Gated DeltaNet [0, 1]", "Gated DeltaNet [-1, 1]", "Griffin")
*_, SIGNED, GATED = SOLVERS
SOLVED, FAILED = 0.95, 0.2  # scaled accuracy
RATES, CURRICULUM = (3e-3, 1e-2), (5, 10, 20)  # symbols at most, before the 40 of the task

PUBLISHED_TRAINING = TrainConfig(
    steps=20_000, batch_size=256, learning_rate=1e-3, warmup=2_000, final_fraction=1e-3, weight_decay=0.0
)


def parent(setting: str) -> TaskRun:
    """The published setting of a language, with two layers of the Transformer."""
    training, width = PUBLISHED_TRAINING, 128
    if setting != PARITY:
        training = dataclasses.replace(training, steps=100_000, learning_rate=1e-2, warmup=10_000, weight_decay=0.1)
        width = 512
    task = TASKS[TASK[setting]]
    model = zoo.model("Transformer", width, 2, dtype="bfloat16")
    return TaskRun(model, training, task, task.evaluation(), test_size=8192)


def cells(scale: Scale) -> list[Cell]:
    settings = (PARITY,) if scale in (Scale.SMOKE, Scale.CPU) else (PARITY, ARITHMETIC, BRACKETS)
    names = {Scale.SMOKE: ("Transformer", SIGNED), Scale.CPU: CPU_MODELS}.get(scale, MODELS)
    return [cell for setting in settings for name in names for cell in runs(scale, setting, name)]


def runs(scale: Scale, setting: str, name: str) -> list[Cell]:
    """A model's cells, one a learning rate where they are swept."""
    base = parent(setting)
    heads = 1 if name == "sLSTM" else 2 if scale in (Scale.SMOKE, Scale.CPU) else 4
    cost = 2.0 if name in ("LSTM", "sLSTM") else 1.0
    if scale == Scale.PAPER:
        model = zoo.model(name, base.model.width, 2, heads=heads, dtype=base.model.dtype)
        return [Cell(name, setting, dataclasses.replace(base, model=model), base, cost=cost)]
    width, dtype = (128, "bfloat16") if scale == Scale.GPU else (32 if scale == Scale.CPU else 16, "float32")
    steps, rows, tested = {Scale.SMOKE: (20, 8, 16), Scale.CPU: (1_000, 32, 1024)}.get(scale, (4_000, 256, 2048))
    run = dataclasses.replace(base, model=zoo.model(name, width, 2, heads=heads, dtype=dtype))
    options = {"steps": steps, "rows": rows, "test_size": tested, "lengths": CURRICULUM, "final_fraction": 0.1}
    swept = [(run.shorter(learning_rate=rate, **options), f"rate {rate:g}") for rate in RATES]
    found = [Cell(name, setting, short, base, variant, cost) for short, variant in swept]
    return found[:1] if scale == Scale.SMOKE else found


def _published() -> tuple[Published, ...]:
    grazzi = {
        "Transformer": (0.022, 0.031, 0.067),
        "mLSTM": (0.087, 0.040, 0.114),
        "sLSTM": (1.000, 0.787, 0.178),
        "DeltaNet [0, 1]": (0.017, 0.314, 0.194),
        SIGNED: (1.000, 0.971, 0.260),
    }
    mamba3 = {"Mamba-2": (0.009, 0.478, 0.009), GATED: (1.000, 0.993, 0.935)}
    sources = (
        (grazzi, "2411.12537, Table 3, best of 3 seeds", "read in the paper; brackets differ between its versions"),
        (mamba3, "2603.15569 (Mamba-3), best of 8 rates, trained on up to 160", "read in the paper"),
    )
    return tuple(
        Published(name, setting, value, where, verified, over="best")
        for numbers, where, verified in sources
        for name, values in numbers.items()
        for setting, value in zip((PARITY, ARITHMETIC, BRACKETS), values, strict=True)
    )


def parity(results: Results, names: Sequence[str]) -> list[float]:
    """Of all that the scale has; raises NotTested where one of them was not run."""
    known = [entry.model for entry in results.entries if entry.setting == PARITY]
    return [results.value(name, PARITY, over="best") for name in names if name in known]


solve_parity = lambda results: min(parity(results, SOLVERS)) >= SOLVED
fail_parity = lambda results: max(parity(results, [name for name in MODELS if name not in SOLVERS])) <= FAILED


def ordered(*names: str, setting: str, where: str = "2411.12537, Table 3") -> Claim:
    """The claim that `names` stand in this order, the best first."""

    def test(results: Results) -> bool:
        values = [results.value(name, setting, over="best") for name in names]
        return values == sorted(values, reverse=True)

    return Claim(f"{setting}: {' above '.join(names)}", where, test)


def plot(results: Results, figure: Figure) -> None:
    plots.by_setting(results, figure, "position", y="accuracy", x_title="position of the answer", trained=40)


TABLE = Table(
    name="formal_languages",
    title="State tracking and formal languages",
    paper="2411.12537, Table 3, and 2405.04517 (xLSTM)",
    cells=cells,
    measures=(
        Measure("scaled_accuracy", "scaled accuracy"),
        Measure("final_loss", "training loss at the end", "{:.3f}", "lower"),
        Measure("parameters", "parameters", "{:,.0f}", "lower"),
    ),
    seeds={Scale.SMOKE: 1, Scale.CPU: 2, Scale.GPU: 1, Scale.PAPER: 3},
    published=_published(),
    claims=(
        Claim("LSTMs and DeltaNets with eigenvalues in [-1, 1] solve parity", "2411.12537, Table 3", solve_parity),
        Claim(
            "attention and recurrences with eigenvalues in [0, 1] do not, trained alike",
            "2411.12537, Table 3",
            fail_parity,
        ),
        ordered(SIGNED, "sLSTM", "DeltaNet [0, 1]", "mLSTM", "Transformer", setting=ARITHMETIC),
        ordered(SIGNED, "DeltaNet [0, 1]", "sLSTM", "mLSTM", "Transformer", setting=BRACKETS),
        *(ordered(GATED, "Mamba-2", setting=name, where="2603.15569 (Mamba-3)") for name in (ARITHMETIC, BRACKETS)),
    ),
    plot=plot,
)

if __name__ == "__main__":
    main(TABLE)
