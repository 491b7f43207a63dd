"""docs/adding_an_operator.md: the code runs, and gives what the page says."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tools.notebook import NEW_OPERATOR, cells, execute, notebook, printed

PAGE = NEW_OPERATOR.page

LINES = 60  # of the reader's own code
# What the page says of the two models on the second half of the long games. Runs differ: four of the compass lay
# between 0.90 and 1.00, and guessing is 1/3.
COMPASS_FINDS, BASELINE_FINDS = 0.75, 0.40


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text()


def test_the_reader_writes_few_lines(page: str) -> None:
    """Imports and blocks that only show something apart, as the page says."""
    imports, *own = [cell.text for cell in cells(page) if cell.kind == "code"]
    assert all(line.startswith(("import ", "from ")) for line in imports.splitlines() if line)
    lines = [line for text in own for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(lines) < LINES
    assert max(map(len, lines)) <= 120
    assert f"it is {len(lines)} lines" in (PAGE.parent.parent / "README.md").read_text()


@pytest.fixture(scope="module")
def code(page: str) -> Iterator[dict[str, Any]]:
    """The names of the page after every block ran once, in order; three steps of training, and of one model only."""
    for text, instead in (("steps=400", "steps=3"), (', "RG-LRU": trained(RGLRUConfig(blocks=4))', "")):
        assert page.count(text) == 1
        page = page.replace(text, instead)
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    module = types.ModuleType("page")
    sys.modules["page"] = module  # dataclasses look their module up
    try:
        for kind, text in cells(page):
            if kind != "prose":
                exec(compile(text, str(PAGE), "exec"), module.__dict__)
        yield module.__dict__
    finally:
        plt.close("all")
        del sys.modules["page"]


@pytest.mark.slow
def test_the_code_of_the_page_runs(code: dict[str, Any]) -> None:
    """Its own assertions hold, training starts near guessing, and the plot has what was measured."""
    (run,) = code["runs"].values()
    assert run.step == 3
    assert 0.9 < run.rows[-1]["loss"] < 2.5  # log 3 is 1.1
    (line,) = code["right"].get_lines()
    assert np.isclose(line.get_ydata().mean(), code["found"]["compass"].mean())


@pytest.mark.slow
def test_the_game_is_the_one_that_the_page_describes(code: dict[str, Any]) -> None:
    """Against cups that are swapped by hand."""
    batch = code["games"](np.random.default_rng(5), batch=6, length=50, mean=7)
    for tokens, targets, start in zip(batch["tokens"], batch["targets"], batch["start"], strict=True):
        assert start[0]
        for token, target, fresh in zip(tokens, targets, start, strict=True):
            cups = ["ball", "", ""] if fresh else cups  # noqa: F821  (the first is fresh)
            a, b = {0, 1, 2} - {token}
            cups[a], cups[b] = cups[b], cups[a]
            assert cups[target] == "ball"
    assert batch["start"].sum() > 20


def test_the_mixer_of_the_page_keeps_the_properties_of_the_library_s_own(code: dict[str, Any]) -> None:
    """Packed documents and NaN padding against one token at a time: outputs, state, gradients; documents apart."""
    from tests.mixers import properties as P

    subject = P.Subject(code["CompassConfig"](heads=4), caches=False)
    x = np.where(P.MIXED.valid[..., None], P.tokens(3), np.nan).astype(np.float32)
    result = subject.run(x, subject.warm, P.MIXED)
    expected = subject.run(np.nan_to_num(x), subject.warm, P.MIXED, steps=True)
    P.assert_valid_close(result.y, expected.y, P.MIXED.valid)
    P.assert_close(result.after, expected.after, P.FLOAT32)
    P.assert_close(result.gradients.params, expected.gradients.params, P.FLOAT32_GRADIENT)
    P.assert_close(result.gradients.x, expected.gradients.x, P.FLOAT32_GRADIENT)
    P.assert_close(result.gradients.state, expected.gradients.state, P.FLOAT32_GRADIENT)

    newest = (P.MIXED.ids == P.MIXED.ids[:, -1:]) & P.MIXED.valid
    fresh = P.MIXED.start.any(axis=1)  # rows whose last document starts here, from nothing that came before
    other = subject.run(np.where(newest[..., None], x, P.tokens(4)), subject.fresh, P.MIXED)
    P.assert_close(P.row_of(other.after, fresh), P.row_of(result.after, fresh), P.FLOAT32)
    P.assert_valid_close(other.y, result.y, newest & fresh[:, None])


@pytest.mark.slow
@pytest.mark.optimised  # it trains
def test_the_notebook_runs_and_gives_what_the_page_says(page: str) -> None:
    pytest.importorskip("ipykernel")
    book = execute(notebook(page))
    (table,) = [printed(cell) for cell in book.cells if cell.cell_type == "code" and "guessing" in printed(cell)]
    found = {name: float(values[-1].rstrip("%")) / 100 for name, *values in map(str.split, table.splitlines()[1:])}
    assert found["compass"] > COMPASS_FINDS
    assert found["RG-LRU"] < BASELINE_FINDS
