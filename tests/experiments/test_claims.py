"""What claims make of results that were never run: true of some, false of others, open where they have to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from experiments import cost, formal_languages, recall, word_problems
from experiments.harness import NotTested, Results, Scale, plots
from experiments.word_settings import BACK, BOTH, DEEP, DEPTHS, LEARNED, of_length, title
from tests.experiments.fabricated import fabricated
from tests.experiments.toy import TABLE as TOY

PARITY = formal_languages.PARITY


def parity(values: Mapping[str, float]) -> Results:
    scores = {(PARITY, name): {"scaled_accuracy": value} for name, value in values.items()}
    return fabricated(formal_languages.TABLE, Scale.CPU, scores)


def test_parity() -> None:
    good = dict.fromkeys(formal_languages.CPU_MODELS, 0.0) | {"sLSTM": 1.0, "DeltaNet [-1, 1]": 0.97}
    assert formal_languages.solve_parity(parity(good))
    assert formal_languages.fail_parity(parity(good))
    assert not formal_languages.solve_parity(parity({**good, "sLSTM": 0.9}))
    assert not formal_languages.fail_parity(parity({**good, "Mamba-2": 0.3}))
    for missing in ("sLSTM", "Mamba-2"):
        few = {name: value for name, value in good.items() if name != missing}
        claim = formal_languages.solve_parity if missing == "sLSTM" else formal_languages.fail_parity
        with pytest.raises(NotTested, match=f"no run of {missing} in parity"):
            claim(parity(few))


def test_the_order_in_modular_arithmetic() -> None:
    setting = formal_languages.ARITHMETIC
    claim = formal_languages.ordered("sLSTM", "mLSTM", setting=setting)
    of = lambda slstm, mlstm: fabricated(
        formal_languages.TABLE,
        Scale.GPU,
        {(setting, "sLSTM"): {"scaled_accuracy": slstm}, (setting, "mLSTM"): {"scaled_accuracy": mlstm}},
    )
    assert claim.test(of(0.8, 0.1))
    assert not claim.test(of(0.1, 0.8))


def words(longest: Mapping[str, float], within: Mapping[str, float] | None = None, scale: Scale = Scale.GPU) -> Results:
    """Token accuracy at the longest words of S5, and within the lengths of training (1 by default)."""
    of = lambda name: (title("S5"), name)
    curve = lambda name: {
        "position": {"position": [9, 18, 180], "accuracy": [(within or {}).get(name, 1.0)] * 2 + [0.0]}
    }
    values = {of(name): {"token_accuracy": value} for name, value in longest.items()}
    return fabricated(word_problems.TABLE, scale, values, {of(name): curve(name) for name in longest})


def test_words() -> None:
    failing = dict.fromkeys((LEARNED, "Transformer, NoPE", "Transformer, RoPE", "Mamba-2"), 0.2)
    for name in (BOTH, BACK):
        claim = word_problems.extrapolates(name)
        assert claim.test(words({name: 0.95}))
        assert not claim.test(words({name: 0.85}))
    assert word_problems.others_fail(words(failing))
    assert not word_problems.others_fail(words({**failing, "Mamba-2": 0.5}))
    # one that learned nothing says nothing, whatever it scores
    unlearned = dict.fromkeys(failing, 0.1)
    with pytest.raises(NotTested, match=r"none of them learned words of up to 18: .*Mamba-2, up to 18: 0\.100"):
        word_problems.others_fail(words(failing, unlearned))
    assert word_problems.others_fail(words({**failing, "Mamba-2": 0.9}, {**unlearned, LEARNED: 0.95}))
    signs = lambda signed, plain: words({"DeltaNet [-1, 1]": signed, "DeltaNet [0, 1]": plain})
    assert word_problems.signs_help(signs(0.8, 0.3))
    assert not word_problems.signs_help(signs(0.31, 0.3))
    with pytest.raises(NotTested, match="neither tracks the group"):
        word_problems.signs_help(signs(0.2, 0.02))
    products = {"DeltaProduct [-1, 1]": 0.9, "DeltaNet [-1, 1]": 0.6}
    assert word_problems.products_help(words(products))
    assert not word_problems.products_help(words({**products, "DeltaProduct [-1, 1]": 0.61}))


def depths(fewest: Mapping[tuple[str, int], int]) -> Results:
    """Whole words right from that many layers on, by model and length; 0: at none."""
    right = lambda n, least: {"sequence_accuracy": 0.95 if 0 < least <= n else 0.5}
    return fabricated(
        word_problems.TABLE,
        Scale.CPU,
        {
            (of_length(length), f"{name}, {n} layers"): right(n, least)
            for (name, length), least in fewest.items()
            for n in DEPTHS
        },
    )


def test_longer_words_need_more_layers() -> None:
    test = word_problems.longer_needs_more
    needs = lambda short, long: {(name, length): n for name in DEEP for length, n in ((5, short), (10, long))}
    assert test(depths(needs(1, 4)))
    assert not test(depths(needs(2, 2)))
    assert not test(depths({**needs(1, 4), (DEEP[1], 10): 1}))
    assert test(depths(needs(2, 0))), "the longer words need more layers than there were"
    with pytest.raises(NotTested, match="no depth gets 90% of the shortest words right"):
        test(depths(needs(0, 0)))


def recalled(values: Mapping[tuple[str, int], float]) -> Results:
    setting = "length 64, 8 pairs, width {}".format
    scores = {(setting(width), name): {"token_accuracy": value} for (name, width), value in values.items()}
    return fabricated(recall.TABLE, Scale.CPU, scores)


def test_recall() -> None:
    attention = {(recall.ATTENTION, 16): 0.5, (recall.ATTENTION, 64): 1.0}
    assert recall.attention_solves(recalled(attention)), "widths below the paper's do not count"
    assert not recall.attention_solves(recalled({**attention, (recall.ATTENTION, 64): 0.98}))
    gains = {("Mamba-2", 16): 0.2, ("Mamba-2", 64): 0.9, ("GLA", 16): 1.0, ("GLA", 64): 1.0}
    assert recall.width_helps(recalled(gains))
    assert not recall.width_helps(recalled({**gains, ("Mamba-2", 64): 0.21})), "within the margin"
    with pytest.raises(NotTested, match="none does better than a guess among the row's values: Mamba-2"):
        recall.width_helps(recalled({("Mamba-2", 16): 0.04, ("Mamba-2", 64): 0.2}))
    with pytest.raises(NotTested, match="no recurrence was run at two widths"):
        recall.width_helps(recalled(attention))
    chunks = lambda large, less: fabricated(
        recall.TABLE,
        Scale.PAPER,
        {
            (f"{recall.EVENLY}, width 128", name): {"token_accuracy": value}
            for name, value in ((recall.PSM_64, large), (recall.PSM_32, less))
        },
    )
    assert recall.chunks_matter(chunks(1.0, 0.8))
    assert not recall.chunks_matter(chunks(1.0, 1.0))


@pytest.mark.parametrize(
    ("claim", "setting", "good", "name", "bad"),
    [
        (cost.constant, cost.DECODE, {cost.PSM: 1.2, "Mamba-2": 1.0, "Griffin": 1.0}, cost.PSM, 1.6),
        (cost.logarithmic, cost.DECODE, {cost.PSM: 2.4}, cost.PSM, 2.6),  # 4 merges, then 10
        (cost.grows, cost.DECODE, {cost.TRANSFORMER: 8.0}, cost.TRANSFORMER, 3.0),
        (cost.linear, cost.TRAIN, {cost.PSM: 1.2, "Mamba-2": 1.0, "Griffin": 1.0}, "Griffin", 2.5),
    ],
)
def test_cost(claim: Any, setting: str, good: dict[str, float], name: str, bad: float) -> None:
    of = lambda values: fabricated(
        cost.TABLE, Scale.CPU, {(setting, model): {"growth": value} for model, value in values.items()}
    )
    assert claim(of(good))
    assert not claim(of({**good, name: bad}))


def test_a_model_has_one_colour_and_the_legend_names_all() -> None:
    from matplotlib.figure import Figure

    curve = {"loss": {"step": [0, 1], "loss": [1.0, 2.0]}}
    keys = (("first", "one"), ("first", "swept [-1, 1]"), ("second", "broken"))
    results = fabricated(TOY, Scale.CPU, {key: {"score": 1.0} for key in keys}, dict.fromkeys(keys, curve))
    figure = Figure(layout="constrained")
    plots.by_setting(results, figure, "loss", y="loss", x_title="step")
    colours = {line.get_label(): line.get_color() for axes in figure.axes for line in axes.get_lines()}
    assert len(set(colours.values())) == len(colours) == 3
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(colours)
