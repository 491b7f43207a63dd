"""What a model does beyond the length that it was trained at, and what 500 steps from other initial states change.

"Understanding and Improving Length Generalization in Recurrent Models" (2507.02782), its figures and its table of
copying. A base is trained at a short length on novels in bytes, rows from zeros; the rows of its heading go on from it:
from zeros still, from noise (std 1; the paper's is not known), from noise fitted to final states by layer and head,
from the final state of another row (state passing), or of the same text (truncated BPTT). Noise goes to the vector and
matrix states of recurrences alone; a PSM has none, and cannot go on from a state in parallel: base and zeros are all it
has. Claims: the base diverges where it was trained long at a short length (where none does, the rest is not testable at
this scale); state passing, truncated BPTT and fitted noise mend that, noise less.

Loss by position: 32 rows of a held-out novel to 64 times the training length, one to 256k tokens (a PSM: 16k).
`--checkpoint DIR` adds a heading for the model of a Hugging Face folder, of which the report shows something with the
same option only; at paper, folders named as its headings fill these. Data: gutenberg_books below SEQMODELS_DATA; smoke
joins files of cpython.

As texts differ, `rise` is the loss at the end above that of the same model given the training length of the same text.

Cost: smoke, a minute or two, nearly all of it compilation. cpu: two layers of width 64, length 32, about 30 minutes on
2 cores; decays start about a hundred times slower than published, as models of this size else forget within a few
bytes, and none diverges. gpu: 8 layers of width 256, length 128; aimed at 30 minutes on one H100. paper: official
Mamba-2 at length 2048, and bases of that size (GLA at 512), for which the training is not known.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments import length_settings as runs
from experiments.harness import Claim, Measure, NotTested, Results, Scale, Table, main, plots
from experiments.harness.passkeys import DEPTHS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER, OURS, EFFECTIVE = runs.PAPER, f"not in {runs.PAPER}", "remembrance"
SLOWED = " (at cpu: with decays that start 100 times slower)"
MARGIN = 0.1  # nats above the loss of the training length: diverged; and what one share is above another
NOTHING, LEARNED = 0.01, 0.1  # a difference that is none; characters right beyond guessing (1/26)
GRIFFIN = "Griffin"  # not in the paper: judged by itself


def diverged(results: Results, griffin: bool = False) -> list[str]:
    """The headings whose base ends above its loss of the training length. Raises NotTested where none does."""
    bases = [entry.setting for entry in results.entries if entry.model == runs.BASE and entry.rows]
    names = [name for name in bases if name != runs.PSM and not name.startswith(runs.PASSKEY)]
    names = [name for name in names if (name == GRIFFIN) == griffin]
    found = [name for name in names if results.value(runs.BASE, name, "rise", endless=math.inf) > MARGIN]
    if not found:
        told = f"the base of {', '.join(names)} does not diverge" if names else "no base was run"
        raise NotTested(f"not testable at this scale: {told}")
    return found


def below(kind: str, *others: str, metric: str = "loss_last", griffin: bool = False) -> Callable[[Results], bool]:
    """Whether a metric of `kind` is below that of each of `others`, at every heading whose base diverges."""

    def test(results: Results) -> bool:
        value = lambda name, of: results.value(of, name, metric, endless=math.inf)
        rows = [[value(n, of) for of in (kind, *others)] for n in diverged(results, griffin)]
        return all(own < min(rest) - NOTHING for own, *rest in rows)

    return test


def flat(results: Results, griffin: bool = False) -> bool:
    """No more than the margin above their own loss of the training length, where the base diverges."""
    pairs = [(name, kind) for name in diverged(results, griffin) for kind in (runs.PASSING, runs.BPTT)]
    return max([results.value(kind, name, "rise", endless=math.inf) for name, kind in pairs]) <= MARGIN


def copies(results: Results) -> bool:
    passing, zeros = (results.value(k, runs.COPYING, "token_accuracy") for k in (runs.PASSING, runs.ZEROS))
    if max(passing, zeros) < LEARNED:
        raise NotTested(f"neither copies more than guessing does: {'; '.join(results.said())}")
    return passing > zeros + MARGIN


def reaches(results: Results) -> bool:
    fitted, zeros = (results.value(k, runs.PASSKEY, "reach") for k in (runs.FITTED, runs.ZEROS))
    if max(fitted, zeros) == 0:
        raise NotTested(f"no passkey is found at any length: {'; '.join(results.said())}")
    return fitted > zeros


def plot(results: Results, figure: Figure) -> None:
    figure.set_size_inches(15, 14)
    *parts, keys = figure.subfigures(4, 1)
    shown = ("loss", "loss", "tokens"), ("remembrance", "remembrance", "tokens back from the end")
    for part, (curve, column, title) in zip(parts, (*shown, ("state", "std", "tokens")), strict=True):
        trained = runs.SIZES[results.scale].length if title == "tokens" else None
        plots.by_setting(results, part, curve, y=column, x_title=title, logarithmic=True, trained=trained)
    for part, depth in zip(keys.subfigures(1, len(DEPTHS)), DEPTHS, strict=True):
        plots.by_setting(results, part, "passkey", y=f"depth {depth:g}", x_title="tokens", logarithmic=True)


LOWER = (
    ("loss_1x", "loss at the training length"), ("loss_8x", "at 8x"), ("loss_64x", "at 64x"),
    ("loss_last", "at the end"), ("loss_afresh", "there, of the training length"), ("rise", "rise"),
    ("remembrance", "remembrance beyond 4x"), ("std_1x", "std of the state"), ("std_8x", "std at 8x"),
)  # fmt: skip
TABLE = Table(
    name="length_generalization",
    title="Length generalisation",
    paper="2507.02782, figures, and the table of copying",
    cells=runs.cells,
    measures=(
        Measure("perplexity_16x", "perplexity at 16x", "{:.2f}", "lower"),
        Measure("token_accuracy", "character accuracy"),
        Measure("passkey_64x", "passkey at 64x"),
        *(Measure(name, title, "{:.3f}", "lower") for name, title in LOWER),
        *(Measure(f"passkey_{k}x", f"at {k}x") for k in (1, 2, 4, 8, 16)),
        Measure("reach", "longest with half of the keys", "{:,.0f}"),
        Measure("last", "tokens", "{:,.0f}"),
    ),
    seeds=dict.fromkeys(Scale, 1),
    published=tuple(runs.published()),
    claims=(
        Claim(f"at least one base diverges beyond its training length{SLOWED}", PAPER, lambda of: bool(diverged(of))),
        Claim("state passing and truncated BPTT keep the loss flat to the end", PAPER, flat),
        Claim(
            "Griffin, too: state passing and truncated BPTT keep it flat", OURS, functools.partial(flat, griffin=True)
        ),
        Claim("fitted noise helps", PAPER, below(runs.FITTED, runs.BASE, runs.ZEROS)),
        Claim("fitted noise helps more than noise of std 1", PAPER, below(runs.FITTED, runs.NOISE)),
        Claim("Griffin, too: fitted noise helps", OURS, below(runs.FITTED, runs.BASE, runs.ZEROS, griffin=True)),
        Claim("state passing lowers remembrance", PAPER, below(runs.PASSING, runs.BASE, runs.ZEROS, metric=EFFECTIVE)),
        Claim("state passing helps to copy what is 3 times longer and more", PAPER, copies),
        Claim("with fitted noise passkeys are found further away", PAPER, reaches),
    ),
    plot=plot,
    options=runs.Options(),
)

if __name__ == "__main__":
    main(TABLE)
