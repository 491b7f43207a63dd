"""Time and memory against length: decoding, and training steps.

"Prefix-Scannable Models" (2506.10918), Figure 6, has the time of a decoded token against the context, up to 40,000
tokens: GPT-2 rises from 2 to 40 ms, a Transformer-PSM stays below about 8 ms, Mamba takes about 6 ms. The authors'
script never feeds the tokens of the chunk at hand to the model (it tests `num_full > chunks_processed - 1`, which
always holds), so what it times is no decoder; this one is checked token by token against the parallel form. Times are
medians over runs of the 64 tokens after each context, with the slowest single token beside them: where a PSM's chunk
ends, aggregates merge, up to log2 of the chunks so far, which is after a context of a power of two, as all are here.

Training: one step (forward, backward, AdamW) of one row, recomputing nothing; memory is what its program needs.

Cost: smoke, seconds. cpu: two layers of width 64, float32, to 64k tokens, the Transformer's step to 16k; about 15
minutes on 2 cores. gpu: 4 layers of width 256 in bfloat16. paper: the size of the authors' script (4 layers of 256).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from experiments import zoo
from experiments.harness import Cell, Claim, Measure, Outcome, Published, Results, Scale, Table, Work, main, plots
from seqmodels.models.lm import ModelConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHUNK, VOCABULARY = 64, 257
DECODE, TRAIN, FIGURE = "decoding", "training step", "2506.10918, Figure 6"
TRANSFORMER, PSM = "Transformer", f"PSM, chunk {CHUNK}"
MODELS = (TRANSFORMER, PSM, "Mamba-2", "Griffin")
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # through thousands of steps, relative to the largest logit


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Time of a token after each context, and bytes of the state."""

    model: ModelConfig
    contexts: tuple[int, ...]
    tokens: int = 64

    def run(self, work: Work) -> Outcome:
        from experiments.bench.lengths import decoding

        tolerance = TOLERANCE[self.model.dtype]
        rows = decoding(self.model, self.contexts, self.tokens, seed=work.seed, tolerance=tolerance, report=work.report)
        first, last = rows[0], rows[-1]
        metrics = {"ms": last["ms"], "growth": last["ms"] / first["ms"], "longest": last["context"]}
        metrics |= {name: last[name] for name in ("worst_ms", "bytes", "error")}
        return Outcome(metrics, {"length": {name: [row[name] for row in rows] for name in first}})


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """Time and memory of a training step on one row of each length."""

    model: ModelConfig
    lengths: tuple[int, ...]

    def run(self, work: Work) -> Outcome:
        from experiments.bench.lengths import training

        rows = training(self.model, self.lengths, seed=work.seed, report=work.report)
        first, last = rows[0], rows[-1]
        growth = last["ms"] / first["ms"] / (last["length"] / first["length"])
        metrics = {"ms": last["ms"], "growth": growth, "bytes": last["bytes"], "longest": last["length"]}
        metrics |= {f"ms_{row['length']:.0f}": row["ms"] for row in rows}
        return Outcome(metrics, {"length": {name: [row[name] for row in rows] for name in first}})


def build(name: str, scale: Scale) -> ModelConfig:
    width, layers, dtype = {
        Scale.SMOKE: (16, 2, "float32"),
        Scale.CPU: (64, 2, "float32"),
        Scale.GPU: (256, 4, "bfloat16"),
        Scale.PAPER: (256, 4, "float32"),
    }[scale]
    if name == PSM:
        model = zoo.psm(width, chunk=CHUNK, aggregator=layers // 2, inference=layers // 2)
    else:
        model = zoo.model(name, width, layers, window=1024 if scale != Scale.SMOKE else 16)
    return dataclasses.replace(model, vocab_size=VOCABULARY, dtype=dtype)


def cells(scale: Scale) -> list[Cell]:
    lengths = (64, 128) if scale == Scale.SMOKE else (1_024, 4_096, 16_384, 40_960 if scale == Scale.PAPER else 65_536)
    names = MODELS[1:3] if scale == Scale.SMOKE else MODELS
    found = [Cell(name, DECODE, Decoding(build(name, scale), lengths)) for name in names]
    for name in names:
        most = 16_384 if name == TRANSFORMER else 65_536
        spans = tuple(length for length in lengths if length <= most)
        found.append(Cell(name, TRAIN, TrainingStep(build(name, scale), spans), cost=3.0))
    return found


growths = lambda results, setting, names: [results.value(name, setting, "growth") for name in names]
constant = lambda results: max(growths(results, DECODE, MODELS[1:])) <= 1.5
grows = lambda results: growths(results, DECODE, (TRANSFORMER,))[0] >= 4
linear = lambda results: max(growths(results, TRAIN, MODELS[1:])) <= 2  # of the time per token


def logarithmic(results: Results) -> bool:
    """In proportion to the most merges that a chunk's end can take: log2 of the chunks so far."""
    contexts = next(cell.config.contexts for cell in results.cells if (cell.model, cell.setting) == (PSM, DECODE))
    first, last = (math.log2(contexts[end] / CHUNK) for end in (0, -1))
    return growths(results, DECODE, (PSM,))[0] <= last / max(first, 1)


def plot(results: Results, figure: Figure) -> None:
    plots.pairs(results, figure, "length", ("ms", "bytes"), ("milliseconds", "bytes"), x_title="tokens")


TABLE = Table(
    name="cost",
    title="Cost against length",
    paper=FIGURE,
    cells=cells,
    measures=(
        Measure("ms", "ms at the longest", "{:.3f}", "lower"),
        Measure("longest", "longest", "{:,.0f}"),
        Measure("ms_16384", "ms at 16,384", "{:,.0f}", "lower"),
        Measure("growth", "growth from the shortest, a token", "{:.2f}", "lower"),
        Measure("worst_ms", "slowest token, ms", "{:.3f}", "lower"),
        Measure("bytes", "bytes at the longest", "{:,.0f}", "lower"),
        Measure("error", "error against the parallel form", "{:.0e}", "lower"),
    ),
    seeds=dict.fromkeys(Scale, 1),
    published=tuple(
        Published(name, DECODE, value, f"{FIGURE}, {told}", "third-party summary of a figure, on their GPU")
        for name, value, told in (
            (TRANSFORMER, 40.0, "at 40,000 tokens"),
            (PSM, 8.0, "an upper bound up to 40,000 tokens"),
            ("Mamba-2", 6.0, "Mamba's mean over 40,000 tokens"),
        )
    ),
    claims=(
        Claim("a decoded token costs the same at any context for PSM, Mamba-2 and Griffin", FIGURE, constant),
        Claim("a PSM's grows no more than its merges, log2 of the chunks", "our bound, of the algorithm", logarithmic),
        Claim("that of a Transformer grows with the context", FIGURE, grows),
        Claim("a training step is linear in the length for all but the Transformer", "2506.10918, section 3", linear),
    ),
    plot=plot,
    alone=True,
)

if __name__ == "__main__":
    main(TABLE)
