"""Notebooks and the pages that they are made from: both show what a run gave, and are fit to publish."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from experiments.formal_languages import SIGNED
from tools.notebook import REPRODUCE, SOURCES, Source, cells, notebook, pictures, with_outputs

nbformat = pytest.importorskip("nbformat")

MEBIBYTE = 2**20
PLACES = ("/home/", "/tmp/", "/usr/", "\\Users\\", "http://", "site-packages")
each = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.notebook.stem)


def read(source: Source) -> Any:
    return nbformat.read(source.notebook, as_version=4)


@each
def test_the_notebook_is_the_page(source: Source) -> None:
    sources = lambda book: [(cell.cell_type, cell.source) for cell in book.cells]
    page, book = source.page.read_text(), read(source)
    assert sources(book) == sources(notebook(page)), "run python tools/notebook.py"
    assert with_outputs(page, book, source.plot) == page, "the outputs in the page are not those of the notebook"
    (picture,) = [picture for cell in book.cells if cell.cell_type == "code" for picture in pictures(cell)]
    assert source.plot.read_bytes() == picture


@each
def test_the_notebook_was_run_and_is_fit_to_publish(source: Source) -> None:
    assert source.notebook.stat().st_size < MEBIBYTE
    code = [cell for cell in read(source).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        kinds = {output.get("name", output.output_type) for output in cell.outputs}
        assert kinds <= {"stdout", "display_data", "execute_result"}, f"{kinds} after {cell.source}"
    text = source.notebook.read_text()
    assert not [place for place in PLACES if place in text]


@pytest.mark.slow
def test_the_table_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the scale smoke; what it gives at cpu stands in the notebook."""
    page = REPRODUCE.page.read_text()
    smaller = (
        ("Scale.CPU", "Scale.SMOKE"),
        ("/rate 0.01", "/rate 0.003"),
        ("parity/sLSTM", f"parity/{SIGNED}"),
        ('("sLSTM"', f'("{SIGNED}"'),
    )
    for text, instead in smaller:
        assert text in page
        page = page.replace(text, instead)
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    for kind, text in cells(page):
        if kind != "prose":
            exec(compile(text, str(REPRODUCE.page), "exec"), module.__dict__)
    lines = module.__dict__["axes"].get_lines()
    assert {SIGNED, "Transformer", "LSTM, here"} <= {line.get_label() for line in lines}
    plt.close("all")
