"""Documents from files and folders, and the two sides that they are split into."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from seqmodels.data import Counts, Document, counts, decode, documents, encode
from seqmodels.data.text import HELDOUT_SHARE, cut, name_hash, read_path, split_by_name


def test_a_folder_gives_one_document_a_file_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "z.txt").write_bytes(b"one\r\ntwo")
    (tmp_path / "deep" / "er" / "a.md.gz").write_bytes(gzip.compress("wörds\n".encode()))
    (tmp_path / "deep" / "b").write_bytes(b"no suffix")
    (tmp_path / ".git" / "config").write_bytes(b"hidden")
    (tmp_path / ".hidden.txt").write_bytes(b"hidden")
    (tmp_path / "__pycache__" / "x.py").write_bytes(b"hidden")
    assert read_path(tmp_path) == [
        Document("deep/b", b"no suffix"),
        Document("deep/er/a.md.gz", "wörds\n".encode()),
        Document("z.txt", b"one\r\ntwo"),
    ]
    assert counts(read_path(tmp_path)) == Counts(3, 9 + 7 + 8)


def test_what_is_no_text_is_skipped_by_name_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_bytes(b"text")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "nul.bin").write_bytes(b"a\0b")
    (tmp_path / "broken.gz").write_bytes(b"not packed")
    (tmp_path / "short.gz").write_bytes(gzip.compress(b"cut off" * 100)[:-9])
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.warns(UserWarning, match="5 of 6 files") as warned:
        assert read_path(tmp_path) == [Document("good.txt", b"text")]
    message = str(warned[0].message)
    for name, reason in (
        ("latin.txt", "not UTF-8"),
        ("nul.bin", "binary"),
        ("broken.gz", "unreadable"),
        ("short.gz", "unreadable"),
        ("empty.txt", "empty"),
    ):
        assert f"{name} ({reason}" in message


def test_a_place_without_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="looked for files of UTF-8 text") as raised:
        read_path(tmp_path)
    assert str(tmp_path) in str(raised.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_path(tmp_path / "nowhere")


@pytest.mark.parametrize("number", [2, 3, 10, 200])
def test_both_sides_are_disjoint_complete_and_not_empty(number: int) -> None:
    everything = [Document(f"file{i}", b"x") for i in range(number)]
    train, heldout = split_by_name(everything, "train"), split_by_name(everything, "heldout")
    assert train
    assert heldout
    assert sorted(train + heldout) == sorted(everything)
    if number == 200:
        assert 0.5 * HELDOUT_SHARE < len(heldout) / number < 2 * HELDOUT_SHARE


def test_the_side_of_a_document_depends_on_its_name_alone() -> None:
    everything = [Document(f"file{i}", b"x") for i in range(200)]
    heldout = {document.name for document in split_by_name(everything, "heldout")}
    again = split_by_name([Document(document.name, b"other") for document in everything[::-1][:150]], "heldout")
    assert {document.name for document in again} == heldout & {f"file{i}" for i in range(50, 200)}
    # Held fixed: another hash would move documents between the sides of every recorded result.
    assert name_hash("library/pickle.py") == pytest.approx(PICKLE_HASH, abs=1e-12)


PICKLE_HASH = 0.049067529492


@pytest.mark.parametrize("text", ["a line\n" * 40, "no line ends, only words " * 40, "é" * 205, "twelve bytes"])
def test_a_single_document_is_cut_without_loss(text: str) -> None:
    document = Document("one", text.encode())
    (train,), (heldout,) = cut(document, 0.10, "train"), cut(document, 0.10, "heldout")
    assert train.bytes + heldout.bytes == document.bytes
    assert train.name != heldout.name
    train.bytes.decode()
    heldout.bytes.decode()
    assert 0.05 <= len(heldout.bytes) / len(document.bytes) <= 0.15
    if "\n" in text:
        assert train.bytes.endswith(b"\n")


def test_what_is_too_short_to_cut_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"one\.txt has 1 bytes"):
        documents(tmp_path / "one.txt", "heldout")
    with pytest.raises(ValueError, match="split is 'test'"):
        documents(tmp_path / "one.txt", "test")


def test_bytes_come_back_from_tokens() -> None:
    data = bytes(range(256))
    assert decode(encode(data)) == data
    assert decode([256, *encode("é"), 256]) == "é".encode()
    assert encode(b"").shape == (0,)
    with pytest.raises(ValueError, match=r"\[0, 257\]"):
        decode([0, 257])
