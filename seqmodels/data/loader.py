"""Packed batches of byte-level text: an endless, resumable stream for training, finite ones for evaluation.

A document b_0 .. b_{n-1} gives n + 1 inputs DOCUMENT, b_0 .. b_{n-1} and n + 1 targets b_0 .. b_{n-1}, DOCUMENT. Every
batch is a dict of int32 `tokens` and `targets` and Bool `start` and `valid`, all `[batch_size, length]`; where `valid`
is False, tokens and targets are 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from seqmodels.data.text import Document
from seqmodels.data.tokens import DOCUMENT

Batch = dict[str, np.ndarray]

# Rows that grain fills side by side are this many batches: more of them pad less, fewer mix epochs less.
_BATCHES_OPEN = 4


class Pieces:
    """Documents cut into pieces of at most `length` targets, by number: what grain shuffles and packs.

    Each piece stands for itself. The first input of a later piece is the byte before it, so that every byte, and the
    end of every document, is a target exactly once.
    """

    def __init__(self, documents: Sequence[Document], length: int):
        # not copied: documents of a prepared data set are read from disk one at a time
        self.documents, self.length = documents, length
        self._ends = np.cumsum(-(-(sizes(documents) + 1) // length))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Batch:
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        start = (index - first) * self.length
        return span(self.documents[number], start, start + self.length)


def sizes(documents: Sequence[Document]) -> Int[np.ndarray, "N"]:
    """Number of bytes of each document; a sequence that knows them says so in `sizes`."""
    known = getattr(documents, "sizes", None)
    return np.array([len(document.bytes) for document in documents]) if known is None else np.asarray(known)


def span(document: Document, start: int, end: int) -> Batch:
    """Inputs and targets number `start` up to `end` (or the last one) of a document."""
    data = np.frombuffer(document.bytes, np.uint8)
    end = min(end, len(data) + 1)
    window = np.full(end - start + 1, DOCUMENT, np.int32)
    inside = data[max(start - 1, 0) : end]
    offset = 1 if start == 0 else 0
    window[offset : offset + len(inside)] = inside
    return {"tokens": window[:-1], "targets": window[1:]}


def make_loader(
    documents: Sequence[Document], *, batch_size: int, length: int, seed: int, epochs: int | None = None, align: int = 1
) -> grain.DatasetIterator:
    """An iterator of batches, endless unless `epochs` is given, whose state is a small JSON-able dict.

    Pieces of documents (`Pieces`) are shuffled anew in every epoch, as `seed` and the epoch's number say, and packed
    first-fit into rows that stand for themselves: a piece begins with `start`, padding stands at row ends. With
    `align` pieces begin at multiples of it, and padding stands before them too. A loader made from the same arguments
    continues after `set_state(get_state())` with the very batches that this one would have given; `set_state` raises
    ValueError for a state that belongs to other documents or arguments.
    """
    check_arguments(documents, batch_size=batch_size, length=length, align=align)
    pieces = grain.MapDataset.source(Pieces(documents, length)).seed(seed).shuffle().repeat(epochs)
    packed = _pack(pieces, batch_size=batch_size, length=length, align=align, seed=seed)
    batches = packed.batch(batch_size, batch_fn=partial(_stack, batch_size=batch_size))
    arguments = {"batch_size": batch_size, "length": length, "seed": seed, "epochs": epochs, "align": align}
    return iter(Resumable(batches, {"documents": len(documents), "sha256": digest(documents), **arguments}))


def evaluation_batches(
    documents: Sequence[Document], *, batch_size: int, length: int, align: int = 1
) -> Iterator[Batch]:
    """Every document exactly once, packed as `make_loader` does but unshuffled; rows stand for themselves.

    The last batch is filled up with rows of padding, so that all have one shape. A document longer than `length` is
    seen in pieces without what came before them: `evaluation_streams` carries it on.
    """
    check_arguments(documents, batch_size=batch_size, length=length, align=align)
    packed = _pack(
        grain.MapDataset.source(Pieces(documents, length)), batch_size=batch_size, length=length, align=align, seed=None
    )
    return iter(packed.batch(batch_size, batch_fn=partial(_stack, batch_size=batch_size)))


def evaluation_streams(documents: Sequence[Document], *, batch_size: int, length: int) -> Iterator[Batch]:
    """Every document exactly once and whole: row r of a batch goes on with row r of the batch before it.

    The caller carries the model's state from batch to batch. `start` stands at the first token of each document and
    nowhere else, so each starts afresh, and `start[:, 0]` is False where a row continues. Longest documents are dealt
    first, each to the shortest row; padding stands at the end of rows that are through, in the last batches alone.
    """
    check_arguments(documents, batch_size=batch_size, length=length)
    rows: list[list[Document]] = [[] for _ in range(batch_size)]
    load = np.zeros(batch_size, np.int64)
    for document in sorted(documents, key=lambda document: (-len(document.bytes), document.name)):
        row = int(np.argmin(load))
        rows[row].append(document)
        load[row] += len(document.bytes) + 1
    steps = -(-int(load.max()) // length)
    streams = [_stream(row, steps * length) for row in rows]
    whole = {name: np.stack([stream[name] for stream in streams]) for name in streams[0]}
    for step in range(steps):
        yield {name: array[:, step * length : (step + 1) * length] for name, array in whole.items()}


def _stream(documents: Sequence[Document], length: int) -> Batch:
    """Documents one after another in a row of `length`."""
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets")}
    row |= {name: np.zeros(length, bool) for name in ("start", "valid")}
    offset = 0
    for document in documents:
        end = offset + len(document.bytes) + 1
        for name, values in span(document, 0, end - offset).items():
            row[name][offset:end] = values
        row["start"][offset] = True
        row["valid"][offset:end] = True
        offset = end
    return row


def _pack(pieces: grain.MapDataset, *, batch_size: int, length: int, align: int, seed: int | None) -> grain.IterDataset:
    # Pieces are made from memory in microseconds: grain's reading threads would cost more than they bring.
    stream = pieces.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    packed = grain.experimental.FirstFitPackIterDataset(
        stream,
        length_struct={"tokens": length, "targets": length},
        pack_alignment_struct={"tokens": align, "targets": align},
        num_packing_bins=_BATCHES_OPEN * batch_size,
        shuffle_bins=seed is not None,
        seed=seed or 0,
    )
    return packed.map(_flags)


def _flags(row: dict[str, np.ndarray]) -> Batch:
    """grain's segment numbers (0 is padding) and positions as `start` and `valid`."""
    valid = row["tokens_segment_ids"] > 0
    return {
        "tokens": row["tokens"],
        "targets": row["targets"],
        "start": valid & (row["tokens_positions"] == 0),
        "valid": valid,
    }


def _stack(rows: Sequence[Batch], *, batch_size: int) -> Batch:
    """Rows as a batch, filled up to `batch_size` with padding."""
    empty = {name: np.zeros_like(array) for name, array in rows[0].items()}
    rows = [*rows, *[empty] * (batch_size - len(rows))]
    return {name: np.stack([row[name] for row in rows]) for name in empty}


def check_arguments(documents: Sequence[Document], *, batch_size: int, length: int, align: int = 1) -> None:
    """Raises ValueError where there is no text, or a number below 1."""
    if not documents:
        raise ValueError("no documents: a loader needs at least one")
    if not sizes(documents).any():
        raise ValueError(
            f"there is no text in any of the {len(documents)} documents: give at least one that holds some"
        )
    if batch_size < 1 or length < 1 or align < 1:
        raise ValueError(f"batch_size {batch_size}, length {length} and align {align} must all be at least 1")


def digest(documents: Sequence[Document]) -> str:
    """A hash of names and contents; a sequence that knows its own says so in `digest`."""
    if known := getattr(documents, "digest", None):
        return known
    hashed = hashlib.sha256()
    for document in documents:
        hashed.update(f"{len(document.bytes)} {document.name}\n".encode())
        hashed.update(document.bytes)
    return hashed.hexdigest()[:16]


class Resumable(grain.IterDataset):
    """Puts what the batches depend on into the iterator's state, so that a wrong state cannot pass for a right one."""

    def __init__(self, parent: grain.IterDataset, origin: dict[str, Any]):
        super().__init__(parent)
        self._origin = origin

    def __iter__(self) -> grain.DatasetIterator:
        return _ResumableIterator(iter(self._parent), self._origin)


class _ResumableIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, origin: dict[str, Any]):
        super().__init__(parent)
        self._origin = origin

    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return {"origin": self._origin, "parent": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        saved = state.get("origin")
        if saved != self._origin:
            raise ValueError(
                "this iterator state was saved by a loader of other documents or arguments: saved "
                f"{json.dumps(saved)}, here {json.dumps(self._origin)}; go on with the same ones or start a new run"
            )
        self._parent.set_state(state["parent"])
