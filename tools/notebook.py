"""Makes notebooks from pages of docs/, executes them, and puts the outputs into both.

    python tools/notebook.py [NAME]

A page is the source. A code block is a cell, marked `python` or, where it only shows something, `python aside`; a
`text` block or an image right after one is its output, which a run replaces.
"""

from __future__ import annotations

import base64
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEFT = ROOT / "runs" / "notebook"  # what a notebook keeps, so that a second run would find its work done

BLOCK = re.compile(r"^```python( aside)?\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"^\n(```text\n.*?^```\n|!\[[^\n]*\n)", re.MULTILINE | re.DOTALL)


class Source(NamedTuple):
    """A page, the notebook made from it, and its one plot."""

    page: Path
    notebook: Path
    plot: Path


def _source(page: str, name: str) -> Source:
    return Source(
        ROOT / "docs" / f"{page}.md", ROOT / "notebooks" / f"{name}.ipynb", ROOT / "docs/images" / f"{name}.png"
    )


NEW_OPERATOR = _source("adding_an_operator", "new_operator")
REPRODUCE = _source("reproduce_a_table", "reproduce_a_table")
SOURCES = (NEW_OPERATOR, REPRODUCE)


class Cell(NamedTuple):
    """`kind` is "prose", "code" (part of what a reader writes) or "aside" (code that shows something)."""

    kind: str
    text: str


def cells(page: str) -> list[Cell]:
    """The page as cells, its outputs left out."""
    found, position = [], 0
    for block in BLOCK.finditer(page):
        found.append(Cell("prose", page[position : block.start()].strip("\n")))
        found.append(Cell("aside" if block[1] else "code", block[2].rstrip("\n")))
        position = block.end()
        while output := OUTPUT.match(page, position):
            position = output.end()
    found.append(Cell("prose", page[position:].strip("\n")))
    return [cell for cell in found if cell.text]


def notebook(page: str) -> Any:
    """The page as a notebook that has not been run; links lead from where notebooks are."""
    import nbformat

    book = nbformat.v4.new_notebook()
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for number, (kind, text) in enumerate(cells(page)):
        if kind == "prose":
            text = re.sub(r"\]\(([\w-]+\.md)", r"](../docs/\1", text).replace("](../notebooks/", "](")
            cell = nbformat.v4.new_markdown_cell(text)
        else:
            cell = nbformat.v4.new_code_cell(text, metadata={"tags": ["aside"]} if kind == "aside" else {})
        cell["id"] = f"cell-{number}"
        book.cells.append(cell)
    return book


def execute(book: Any, timeout: int = 900) -> Any:
    """Runs the notebook from its own folder, with the project importable."""
    from nbclient import NotebookClient

    shutil.rmtree(LEFT, ignore_errors=True)
    NotebookClient(book, timeout=timeout, resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times of the run
    book.metadata["language_info"] = {"name": "python"}
    return book


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(cell: Any) -> list[bytes]:
    data = (output.get("data", {}) for output in cell.outputs)
    return [base64.b64decode(each["image/png"]) for each in data if "image/png" in each]


def with_outputs(page: str, book: Any, plot: Path) -> str:
    """The page with every cell's output after it."""
    outputs = iter([cell for cell in book.cells if cell.cell_type == "code"])
    parts, position = [], 0
    for block in BLOCK.finditer(page):
        parts.append(page[position : block.end()])
        position = block.end()
        while output := OUTPUT.match(page, position):
            position = output.end()
        cell = next(outputs)
        if printed(cell):
            parts.append(f"\n```text\n{printed(cell)}```\n")
        if pictures(cell):
            parts.append(f"\n![{plot.stem.replace('_', ' ')}](images/{plot.name})\n")
    return "".join(parts) + page[position:]


def main(names: Sequence[str]) -> None:
    """Writes the notebooks of these names; all of them where there is none."""
    known = {source.notebook.stem: source for source in SOURCES}
    unknown = set(names) - set(known)
    if unknown:
        raise SystemExit(f"error: no notebook is named {', '.join(unknown)}; there are {', '.join(known)}")
    for source in [known[name] for name in names or known]:
        write(source)


def write(source: Source) -> None:
    import nbformat

    page = source.page.read_text()
    book = execute(notebook(page))
    source.notebook.parent.mkdir(exist_ok=True)
    nbformat.write(book, source.notebook)
    (picture,) = [picture for cell in book.cells if cell.cell_type == "code" for picture in pictures(cell)]
    source.plot.parent.mkdir(exist_ok=True)
    source.plot.write_bytes(picture)
    source.page.write_text(with_outputs(page, book, source.plot))
    print("\n".join(f"written: {path.relative_to(ROOT)}" for path in source))


if __name__ == "__main__":
    main(sys.argv[1:])
