"""Corpora by name: what ships inside every CPython, and local data sets found through `SEQMODELS_DATA`."""

from __future__ import annotations

import functools
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from seqmodels.data.text import (
    HELDOUT_SHARE,
    Document,
    Split,
    name_hash,
    read_file,
    read_path,
    require_two_sides,
    split_by_name,
)

VARIABLE = "SEQMODELS_DATA"

# Not the library's own prose and code: other packages, tests, tables of characters, what some installations lack, and
# pydoc_data, whose text is the reference part of the corpus.
_LEFT_OUT = frozenset(
    (
        *("__hello__.py", "__phello__", "__pycache__", "dist-packages", "distutils", "encodings", "ensurepip"),
        *("idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo"),
    )
)
# Written for one installation.
_LOCAL = re.compile(r"config-.*|_sysconfigdata.*|_sysconfig_vars.*|sitecustomize\.py|usercustomize\.py")
# Some topics of the reference quote whole sections of others; a held-out document shares no passage of this length.
_PASSAGE = 200
# Sources are cut into documents of at least this many bytes: what a small model sees of one at a time.
_DEFINITION = 1000
_TOP_LEVEL = re.compile(rb"\n\n(?=[^\s#)\]}])")


def documents(source: str | Path = "cpython", split: Split = "train") -> list[Document]:
    """The training or held-out documents of `source`, in a fixed order.

    `source`: "cpython", the English language reference and the library sources inside the running Python; the name of
    a data set below the folder that `SEQMODELS_DATA` names ("tiny_shakespeare", "wikitext2", "gutenberg_books"); or a
    file or folder of text (`read_path`, `split_by_name`). Only wikitext2 has a third split, "test".
    """
    name = str(source)
    if name == "cpython":
        return _cpython(split)
    if name in _DATA_SETS:
        return _DATA_SETS[name](_folder(name), split)
    if not Path(name).expanduser().exists():
        known = ", ".join(["cpython", *_DATA_SETS])
        raise FileNotFoundError(f"no text source {name!r}: it is neither a file or folder nor one of {known}")
    return split_by_name(read_path(name), split)


def cpython_documents() -> list[Document]:
    """Every document of the "cpython" corpus, `reference/TOPIC` and `library/PATH`, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for file in root.rglob("*.py"):
        path = file.relative_to(root)
        if _LEFT_OUT.intersection(path.parts) or any(_LOCAL.fullmatch(part) for part in path.parts):
            continue
        try:
            found.append(Document(f"library/{path.as_posix()}", read_file(file)))
        except ValueError:
            continue  # the few empty package files, and sources in other encodings
    topics = _reference()
    if not found or not topics:
        raise FileNotFoundError(
            f"this Python carries no {'library sources in ' + str(root) if not found else 'pydoc_data.topics'}: "
            "name a file or folder of text as the source"
        )
    found += [Document(f"reference/{topic}", text.encode()) for topic, text in topics.items() if text]
    return sorted(found)


def _reference() -> dict[str, str]:
    """The topics of `help()`, which are sections of the language reference."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return topics


def _passages(document: Document) -> set[bytes]:
    return {b" ".join(p.split()) for p in re.split(rb"\n\s*\n", document.bytes) if len(p) >= _PASSAGE}


def heldout_names(found: Sequence[Document]) -> frozenset[str]:
    """Names of the held-out documents: by their hash, some of either kind, none that repeats another's passage."""
    passages = {document.name: _passages(document) for document in found}
    times = Counter(passage for each in passages.values() for passage in each)
    unique = {name for name, each in passages.items() if all(times[passage] == 1 for passage in each)}
    heldout = {name for name in unique if name_hash(name) < HELDOUT_SHARE}
    for kind in ("reference/", "library/"):
        if not any(name.startswith(kind) for name in heldout):
            heldout.add(min((name for name in unique if name.startswith(kind)), key=name_hash))
    return frozenset(heldout)


@functools.cache
def _cpython_sides() -> tuple[tuple[Document, ...], frozenset[str]]:
    found = tuple(cpython_documents())
    return found, heldout_names(found)


def definitions(document: Document, least: int = _DEFINITION) -> list[Document]:
    """A library source cut at top level, after blank lines, into pieces of at least `least` bytes: `NAME:LINE`.

    In order, and together the whole source; the last piece may be shorter.
    """
    cuts, line = {0: 1}, 1
    begin = 0
    for match in _TOP_LEVEL.finditer(document.bytes):
        line += document.bytes.count(b"\n", begin, match.end())
        begin = match.end()
        if begin - max(cuts) >= least:
            cuts[begin] = line
    ends = [*list(cuts)[1:], len(document.bytes)]
    return [Document(f"{document.name}:{cuts[i]}", document.bytes[i:j]) for i, j in zip(cuts, ends, strict=True)]


def _cpython(split: Split) -> list[Document]:
    """Files go to one side whole; a document is a topic of the reference, or definitions of a library source."""
    require_two_sides(split)
    found, heldout = _cpython_sides()
    side = [document for document in found if (document.name in heldout) == (split == "heldout")]
    return [d for file in side for d in (definitions(file) if file.name.startswith("library/") else [file])]


def _folder(name: str) -> Path:
    root = os.environ.get(VARIABLE)
    if not root:
        raise FileNotFoundError(
            f"the data set {name} is looked for below the folder that {VARIABLE} names, which is not set: "
            f"export {VARIABLE}=FOLDER with a folder {name} inside it"
        )
    return Path(root).expanduser() / name


def _read(folder: Path, file: str) -> bytes:
    path = folder / file
    if not path.is_file():
        raise FileNotFoundError(
            f"the data set {folder.name} lacks {path}: put the file there, "
            f"or let {VARIABLE} (now {folder.parent}) name the folder above {folder.name}"
        )
    return read_file(path)


def _tiny_shakespeare(folder: Path, split: Split) -> list[Document]:
    """The customary split: the first 90 % of the one text train, the rest is held out."""
    require_two_sides(split)
    data = _read(folder, "input.txt.gz")
    middle = len(data) * 9 // 10
    return [Document("train", data[:middle]) if split == "train" else Document("heldout", data[middle:])]


def _wikitext2(folder: Path, split: Split) -> list[Document]:
    """The official splits, word-level files as bytes, one document an article; "heldout" is the validation file."""
    files = {"train": "train", "heldout": "valid", "test": "test"}
    if split not in files:
        raise ValueError(f"split is {split!r}; wikitext2 has {', '.join(files)}")
    data = _read(folder, f"wiki.{files[split]}.tokens.gz")
    # An article begins at a heading of one "=" between two empty lines; sections have more.
    starts = [match.start() for match in re.finditer(rb"(?:\A|(?<=\n)) \n = [^=\n]+ = \n(?= \n)", data)]
    ends = [*starts[1:], len(data)]
    spans = [(0, ends[0]), *zip(starts[1:], ends[1:], strict=True)]
    return [Document(f"{files[split]}/{index:04}", data[start:end]) for index, (start, end) in enumerate(spans)]


_GUTENBERG = ("145_middlemarch", "2600_war_and_peace", "2701_moby_dick", "1342_pride_and_prejudice")


def _gutenberg_books(folder: Path, split: Split) -> list[Document]:
    """Four novels without the archive's header and footer, their line ends made alike; the last one is held out."""
    require_two_sides(split)
    names = _GUTENBERG[:-1] if split == "train" else _GUTENBERG[-1:]
    return [Document(name, _novel(_read(folder, f"{name}.txt.gz"), name)) for name in names]


def _novel(data: bytes, name: str) -> bytes:
    data = data.replace(b"\r\n", b"\n")
    match = re.search(rb"\*\*\* ?START OF[^\n]*\n(.*)\n\*\*\* ?END OF", data, re.DOTALL)
    if match is None:
        raise ValueError(f"{name} lacks the lines *** START OF and *** END OF of a Project Gutenberg text")
    return match[1].strip(b"\n") + b"\n"


_DATA_SETS: dict[str, Callable[[Path, Split], list[Document]]] = {
    "tiny_shakespeare": _tiny_shakespeare,
    "wikitext2": _wikitext2,
    "gutenberg_books": _gutenberg_books,
}
