"""Batches whose rows go on from one to the next: whole documents one after another, for a carried state."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from seqmodels.data.loader import Batch, check_arguments, digest, sizes, span
from seqmodels.data.text import Document
from seqmodels.data.tokens import DOCUMENT


def make_stream_loader(documents: Sequence[Document], *, batch_size: int, length: int, seed: int) -> StreamLoader:
    """An endless iterator of batches in which row r goes on with row r of the batch before.

    Each row reads whole documents, one after another; a row that is through with one takes the next of an order that
    `seed` shuffles anew in every epoch, so that all rows together read every document once an epoch. `start` stands at
    each document's first token and nowhere else: `start[:, 0]` is False where a row continues. There is no padding. The
    iterator's state is a small JSON-able dict; `set_state` raises ValueError for that of other documents or arguments.
    """
    return StreamLoader(documents, batch_size=batch_size, length=length, seed=seed)


class StreamLoader(Iterator[Batch]):
    """See `make_stream_loader`."""

    def __init__(self, documents: Sequence[Document], *, batch_size: int, length: int, seed: int) -> None:
        check_arguments(documents, batch_size=batch_size, length=length)
        self._documents, self._length, self._seed = documents, length, seed
        self._targets = sizes(documents) + 1
        arguments = {"batch_size": batch_size, "length": length, "seed": seed}
        self._origin = {"documents": len(documents), "sha256": digest(documents), **arguments}
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        self._dealt = 0
        self._rows = [self._next_document() for _ in range(batch_size)]

    def _next_document(self) -> tuple[int, int]:
        """The document that is dealt next, and that nothing of it was read."""
        epoch, place = divmod(self._dealt, len(self._documents))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._documents))
        self._dealt += 1
        return int(self._order[1][place]), 0

    def __next__(self) -> Batch:
        shape = (len(self._rows), self._length)
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets")}
        batch |= {"start": np.zeros(shape, bool), "valid": np.ones(shape, bool)}
        for row in range(len(self._rows)):
            at = 0
            while at < self._length:
                number, read = self._rows[row]
                if read == self._targets[number]:
                    number, read = self._next_document()
                end = min(int(self._targets[number]), read + self._length - at)
                for name, values in span(self._documents[number], read, end).items():
                    batch[name][row, at : at + end - read] = values
                batch["start"][row, at] = read == 0
                at += end - read
                self._rows[row] = number, end
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"origin": self._origin, "dealt": self._dealt, "rows": [list(row) for row in self._rows]}

    def set_state(self, state: dict[str, Any]) -> None:
        saved = state.get("origin")
        if saved != self._origin:
            raise ValueError(
                "this iterator state was saved by a loader of other documents or arguments: saved "
                f"{json.dumps(saved)}, here {json.dumps(self._origin)}; go on with the same ones or start a new run"
            )
        self._dealt, self._rows = state["dealt"], [(number, read) for number, read in state["rows"]]


def token_rows(documents: Sequence[Document], *, rows: int, length: int) -> Int[np.ndarray, "N T"]:
    """`rows` texts of `length` tokens, each the beginning of one of the longest documents, DOCUMENT first.

    Raises ValueError where there are not so many documents of that length.
    """
    found = sizes(documents)
    chosen = np.argsort(-found, kind="stable")[:rows]
    if rows < 1 or length < 1 or len(chosen) < rows or found[chosen[-1]] + 1 < length:
        longest = found[chosen[-1]] + 1 if len(chosen) else 0
        raise ValueError(
            f"{rows} rows of {length} tokens need as many documents of {length - 1} bytes, and there are "
            f"{len(documents)}, number {len(chosen)} by size with {longest} tokens: ask for fewer or shorter ones"
        )
    texts = (np.frombuffer(documents[number].bytes, np.uint8)[: length - 1] for number in chosen)
    return np.stack([np.concatenate([[DOCUMENT], text]).astype(np.int32) for text in texts])
