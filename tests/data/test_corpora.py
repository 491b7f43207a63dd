"""Named corpora: the one inside Python, and those found through SEQMODELS_DATA."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import pytest

from seqmodels.data import Document, counts, documents
from seqmodels.data.corpora import VARIABLE, cpython_documents, definitions, heldout_names
from seqmodels.data.text import name_hash

PASSAGE = 200


@pytest.fixture(scope="module")
def cpython() -> dict:
    return {split: documents("cpython", split) for split in ("train", "heldout")}


def test_cpython_is_split_completely_and_of_both_kinds(cpython: dict) -> None:
    train, heldout = cpython["train"], cpython["heldout"]
    whole = {document.name: document.bytes for document in cpython_documents()}
    files = [{document.name.split(":")[0] for document in side} for side in (train, heldout)]
    assert not files[0] & files[1], "a file's pieces stand on one side"
    joined: dict[str, bytes] = {}
    for document in train + heldout:
        file = document.name.split(":")[0]
        joined[file] = joined.get(file, b"") + document.bytes
    assert joined == whole
    assert len({document.name for document in train + heldout}) == len(train) + len(heldout)
    for side in (train, heldout):
        assert {document.name.split("/")[0] for document in side} == {"library", "reference"}
    assert 0.02 < len(heldout) / len(train + heldout) < 0.08
    assert counts(train).bytes > 5_000_000
    assert counts(heldout).bytes > 100_000
    assert documents("cpython", "heldout") == heldout


def test_sources_are_cut_at_top_level_and_lose_nothing() -> None:
    text = b"import os\n\n\ndef f():\n    a\n\n    b\n\n\nclass C:\n    c\n\nd = 1\n"
    pieces = definitions(Document("library/m.py", text), least=10)
    assert [(p.name, p.bytes[:5]) for p in pieces] == [
        ("library/m.py:1", b"impor"),
        ("library/m.py:4", b"def f"),
        ("library/m.py:10", b"class"),
        ("library/m.py:13", b"d = 1"),
    ]
    assert b"".join(p.bytes for p in pieces) == text
    assert definitions(Document("library/m.py", text), least=1000) == [Document("library/m.py:1", text)]


def test_no_heldout_passage_was_trained_on(cpython: dict) -> None:
    trained = b"\n\n".join(b" ".join(d.bytes.split()) for d in cpython["train"])
    for document in cpython["heldout"]:
        for passage in re.split(rb"\n\s*\n", document.bytes):
            if len(passage) >= PASSAGE:
                assert b" ".join(passage.split()) not in trained, f"{document.name} shares {passage[:80]!r}"


def test_a_document_that_repeats_a_passage_is_never_held_out() -> None:
    quoted = b"A passage that two documents share. " * 8
    texts = {f"reference/{i}": b"Own words.\n\n" + (quoted if i % 2 else b"") for i in range(200)}
    texts |= {f"library/{i}": b"x" for i in range(200)}
    heldout = heldout_names([Document(name, text) for name, text in texts.items()])
    assert {name.split("/")[0] for name in heldout} == {"library", "reference"}
    assert not any(quoted in texts[name] for name in heldout)
    lowest = min(("reference/0", "reference/2"), key=name_hash)
    few = heldout_names([Document(name, b"y") for name in ("reference/0", "reference/2", "library/0")])
    assert few == {lowest, "library/0"}


def test_cpython_leaves_out_tests_other_packages_and_the_reference_as_code(cpython: dict) -> None:
    names = [document.name for document in cpython["train"] + cpython["heldout"]]
    files = [name.split(":")[0] for name in names]
    for part in ("test", "site-packages", "idlelib", "pydoc_data", "encodings", "__pycache__"):
        assert not any(part in file.split("/") for file in files)
    assert not any("_sysconfigdata" in name or "sitecustomize" in name for name in files)
    assert {"library/json/decoder.py:1", "library/pickle.py:1", "reference/if"} <= set(names)


def test_an_unknown_source_or_split_is_answered_with_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"'cpythn'.*cpython, tiny_shakespeare, wikitext2, gutenberg_books"):
        documents("cpythn")
    with pytest.raises(ValueError, match="split is 'test'"):
        documents("cpython", "test")


def test_a_missing_data_set_says_where_it_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=rf"wikitext2.*{VARIABLE}.*not set"):
        documents("wikitext2")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"tiny_shakespeare.input\.txt\.gz"):
        documents("tiny_shakespeare")


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    for name in ("tiny_shakespeare", "wikitext2", "gutenberg_books"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_tiny_shakespeare_is_cut_at_nine_tenths(data: Path) -> None:
    text = bytes(range(97, 117)) * 5
    (data / "tiny_shakespeare" / "input.txt.gz").write_bytes(gzip.compress(text))
    assert documents("tiny_shakespeare")[0].bytes == text[:90]
    assert documents("tiny_shakespeare", "heldout")[0].bytes == text[90:]


def test_wikitext2_is_cut_into_articles_at_first_level_headings(data: Path) -> None:
    articles = [
        " \n = One = \n \n Text = with signs = \n \n = = Section = = \n \n Text . \n",
        " \n = Two = \n \n = not a heading = \n Text . \n",
    ]
    (data / "wikitext2" / "wiki.valid.tokens.gz").write_bytes(gzip.compress("".join(articles).encode()))
    assert [document.bytes.decode() for document in documents("wikitext2", "heldout")] == articles


def test_gutenberg_books_lose_header_and_footer(data: Path) -> None:
    names = ("145_middlemarch", "2600_war_and_peace", "2701_moby_dick", "1342_pride_and_prejudice")
    for name in names:
        lines = ["licence", "*** START OF THIS BOOK ***", "", name, "last", "", "*** END OF THIS BOOK ***", "licence"]
        text = "\r\n".join(lines)
        (data / "gutenberg_books" / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode()))
    sides = {split: documents("gutenberg_books", split) for split in ("train", "heldout")}
    assert [document.name for document in sides["train"] + sides["heldout"]] == list(names)
    assert [document.bytes for document in sides["heldout"]] == [b"1342_pride_and_prejudice\nlast\n"]
    (data / "gutenberg_books" / "145_middlemarch.txt.gz").write_bytes(gzip.compress(b"no marks"))
    with pytest.raises(ValueError, match=r"145_middlemarch lacks the lines \*\*\* START OF"):
        documents("gutenberg_books")


# Published sizes: (documents, bytes) of each side.
SIZES = {
    ("tiny_shakespeare", "train"): (1, 1_003_854),
    ("tiny_shakespeare", "heldout"): (1, 111_540),
    ("wikitext2", "train"): (600, 10_797_148),
    ("wikitext2", "heldout"): (60, 1_121_681),
    ("wikitext2", "test"): (60, 1_256_449),
}


@pytest.mark.parametrize(("name", "split"), SIZES)
def test_the_real_data_sets_have_their_published_sizes(name: str, split: str) -> None:
    root = os.environ.get(VARIABLE)
    if not root or not Path(root, name).is_dir():
        pytest.skip(f"needs {VARIABLE} with a folder {name}")
    assert counts(documents(name, split)) == SIZES[name, split]
