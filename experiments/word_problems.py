"""Word problems of the groups A5 and S5: after every element, the product of all so far.

"Prefix-Scannable Models" (2506.10918), Figure 3: a Transformer-PSM of chunk 1, trained on words of 4 to 18 elements,
errs little at ten times that length, where Transformers and Mamba fail. Its aggregator looks both ways in the paper and
back only in the authors' code; both are run, and are one function where it has one layer and chunks are 1, as then only
its last token is read. "The Illusion of State" (2404.08819), Figure 3: the fewest layers that reach 90 % of whole words
right grow with the length for Transformers and state-space models, not for a recurrence with a full transition.
"Unlocking State-Tracking" (2411.12537): DeltaNet in [-1, 1] tracks what DeltaNet in [0, 1] cannot. "DeltaProduct"
(2502.10297): with several steps of the delta rule a token it does so further beyond the lengths of training.

The Transformer with learned positions has never trained those past 18: its failure there is built in, as published.

Cost: smoke, seconds. cpu: words of 4 to 18 swaps of S3, nine models of width 64, two rates, 2,500 steps of 16 rows,
short words first; and the fewest layers of two models for words of A5 of 5 and 10, 4,000 steps of 128 rows; 50 minutes
on 2 busy cores. S3 by swaps has 24 products to learn, A5 3,600, of which the cpu scale learns those of two elements.
gpu: A5 and S5, width 128, 20,000 steps of 128 rows, and lengths to 20; aimed at 30 minutes on one H100. paper: 10,000
words of a group for 20 epochs at width 768; a million words of A5 for the layers.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import TYPE_CHECKING, Any

from experiments import word_settings as words
from experiments.harness import Claim, Measure, NotTested, Results, Scale, Table, main, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL = "S5 there, S3 by swaps at cpu"
FIGURE = f"2506.10918, Figure 3, as others tell it; {SMALL}"
LENGTHS = (5, 10, 15, 20)
ENOUGH, MARGIN, GROUPS = 0.9, 0.02, ("S5", "A5", words.SWAPS)


def asked(results: Results) -> str:
    """The paper's S5 where it is run, else A5, else S3 by swaps."""
    return next((words.title(group) for group in GROUPS if words.title(group) in results.settings()), words.title("S5"))


def trained(results: Results, name: str) -> float:
    """Token accuracy at the lengths of training, in the test of the longest words."""
    found = [curves[0] for entry, curves in results.curves("position", asked(results)) if entry.model == name]
    if not found:
        raise NotTested(f"no run of {name} in {asked(results)}")
    within = [a for p, a in zip(found[0]["position"], found[0]["accuracy"], strict=True) if p <= words.TRAINED]
    results.read.append(f"{name}, up to {words.TRAINED}: {sum(within) / len(within):.3f}")
    return sum(within) / len(within)


def extrapolates(name: str) -> Claim:
    """The claim that a model errs little at up to ten times its training length."""
    test = lambda results: results.value(name, asked(results)) >= ENOUGH
    return Claim(f"{name}: at least {ENOUGH:.0%} of tokens right in words of {words.LONGEST}", FIGURE, test)


def others_fail(results: Results) -> bool:
    """Of those that learned the lengths of training."""
    names = [name for name in words.MODELS[2:6] if trained(results, name) >= ENOUGH]
    if not names:
        raise NotTested(f"none of them learned words of up to {words.TRAINED}: {'; '.join(results.said())}")
    return max([results.value(name, asked(results)) for name in names]) < ENOUGH / 2


def tracks_more(better: str, worse: str, results: Results) -> bool:
    more, less = (results.value(name, asked(results)) for name in (better, worse))
    if max(more, less) < 0.25:  # guessing is 1/6 in S3, less in the others
        raise NotTested(f"neither tracks the group: {'; '.join(results.said())}")
    return more > less + MARGIN


signs_help = functools.partial(tracks_more, "DeltaNet [-1, 1]", "DeltaNet [0, 1]")
products_help = functools.partial(tracks_more, "DeltaProduct [-1, 1]", "DeltaNet [-1, 1]")


def longer_needs_more(results: Results) -> bool:
    """Both models get the longest words right with more layers than those of 5 only, or with none of the depths."""
    found: dict[tuple[str, int], float] = {}
    lengths = [length for length in LENGTHS if words.of_length(length) in results.settings()]
    for name, length in itertools.product(words.DEEP, lengths):
        right = [
            results.value(f"{name}, {n} layers", words.of_length(length), "sequence_accuracy") for n in words.DEPTHS
        ]
        fewest = min([n for n, share in zip(words.DEPTHS, right, strict=True) if share >= ENOUGH], default=math.inf)
        found[name, length] = fewest
    if not lengths or math.inf in [found[name, lengths[0]] for name in words.DEEP]:
        raise NotTested(f"no depth gets {ENOUGH:.0%} of the shortest words right: {'; '.join(results.said())}")
    rising = all(found[name, a] <= found[name, b] for name in words.DEEP for a, b in itertools.pairwise(lengths))
    return rising and all(found[name, lengths[-1]] > found[name, lengths[0]] for name in words.DEEP)


def over_layers(results: Results) -> dict[str, list[tuple[int, float]]]:
    """Whole words right for each depth, by model and length; nothing where no depth gets any right."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for entry, name, n in itertools.product(results.entries, words.DEEP, words.DEPTHS):
        if entry.model == f"{name}, {n} layers" and entry.rows:
            label = f"{name}, {entry.setting.split()[-1]}"
            lines.setdefault(label, []).append((n, entry.values("sequence_accuracy")[0]))
    return lines if any(share > 0 for line in lines.values() for _, share in line) else {}


def plot(results: Results, figure: Figure) -> None:
    """Accuracy over words that are longer than in training; beside it whole words right over layers."""
    lines = over_layers(results)
    figure.set_size_inches(14 if lines else 9, 4.5)
    left, *right = figure.subfigures(1, 2, width_ratios=(3, 2)) if lines else [figure]
    titles = [words.title(group) for group in GROUPS]
    shown: dict[str, Any] = {"x_title": "elements", "y_title": "token accuracy", "only": titles}
    shown["guess"] = 1 / 6 if words.title(words.SWAPS) in results.settings() else None
    plots.by_setting(results, left, "position", y="accuracy", trained=words.TRAINED, **shown)
    for axes in [part.subplots() for part in right]:
        for label, line in lines.items():
            axes.plot(*zip(*line, strict=True), "o-" if label.startswith(words.DEEP[0]) else "s--", label=label)
        axes.axhline(ENOUGH, color="0.6", linestyle=":", linewidth=1)
        axes.set(xlabel="layers", ylabel="whole words right", title="A5, words of one length")
        axes.legend(fontsize=8)


TABLE = Table(
    name="word_problems",
    title="Word problems of S5 and A5",
    paper="2506.10918, Figure 3; 2404.08819, Figure 3; 2411.12537, Figure 4",
    cells=words.cells,
    measures=(
        Measure("token_accuracy", "token accuracy"),
        Measure("sequence_accuracy", "whole words"),
        Measure("state_bytes", "bytes of state", "{:,.0f}", "lower"),
        Measure("parameters", "parameters", "{:,.0f}", "lower"),
    ),
    seeds={Scale.SMOKE: 1, Scale.CPU: 1, Scale.GPU: 1, Scale.PAPER: 3},
    claims=(
        extrapolates(words.BOTH),
        extrapolates(words.BACK),
        Claim("Transformers and Mamba-2 that learned words of training do not come near", FIGURE, others_fail),
        Claim("DeltaNet in [-1, 1] tracks more than in [0, 1]", f"2411.12537, Figure 4; {SMALL}", signs_help),
        Claim("DeltaProduct tracks more than DeltaNet, both in [-1, 1]", f"2502.10297; {SMALL}", products_help),
        Claim("longer words need more layers of a Transformer and Mamba-2", "2404.08819, Figure 3", longer_needs_more),
    ),
    plot=plot,
)

if __name__ == "__main__":
    main(TABLE)
