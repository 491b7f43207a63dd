"""Real text as one long row of tokens, and batches of windows of it, for bytes and tokenizers alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from seqmodels.data import DOCUMENT, documents

Encode = Callable[[str], Sequence[int]]


class Text(NamedTuple):
    """The two sides of a corpus, the documents of each behind one another, the longest first."""

    train: np.ndarray
    heldout: np.ndarray


def read_text(corpus: str, encode: Encode | None = None) -> Text:
    """A corpus of `seqmodels.data.documents` in bytes, DOCUMENT before each document, or as a tokenizer has it.

    A held-out text that is longer than its longest document goes on with the next one, as if it were one document.
    """
    sides = []
    for split in ("train", "heldout"):
        found = sorted(documents(corpus, split), key=lambda one: (-len(one.bytes), one.name))
        if encode is None:
            whole = [np.frombuffer(one.bytes, np.uint8).astype(np.int32) for one in found]
            sides.append(np.concatenate([part for one in whole for part in ([DOCUMENT], one)]).astype(np.int32))
        else:
            sides.append(np.concatenate([np.asarray(encode(one.bytes.decode()), np.int32) for one in found]))
    return Text(*sides)


class Windows(Iterator[dict[str, np.ndarray]]):
    """Endless batches of rows of `length` tokens of a text, which is read as a ring; resumable.

    Rows begin anywhere, and each stands for itself; `consecutive`: row r goes on with row r of the batch before, from a
    place of its own. No gap between documents starts anew, so that rows are as the long ones of the evaluation.
    """

    def __init__(
        self, tokens: np.ndarray, *, batch_size: int, length: int, seed: int, consecutive: bool = False
    ) -> None:
        if len(tokens) <= length:
            raise ValueError(f"a text of {len(tokens)} tokens has no window of {length} and the next one")
        self._tokens, self._length, self._consecutive = tokens, length, consecutive
        self._origin = {"batch_size": batch_size, "seed": seed, "length": length, "tokens": len(tokens)}
        self._taken = 0

    def __next__(self) -> dict[str, np.ndarray]:
        drawn = 0 if self._consecutive else self._taken
        random = np.random.default_rng([self._origin["seed"], drawn])
        first = random.integers(0, len(self._tokens), self._origin["batch_size"])
        if self._consecutive:
            first = first + self._taken * self._length
        rows = self._tokens[(first[:, None] + np.arange(self._length + 1)) % len(self._tokens)]
        start = np.zeros((len(rows), self._length), bool)
        start[:, 0] = not self._consecutive or self._taken == 0
        self._taken += 1
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:], "start": start, "valid": np.ones_like(start)}

    def get_state(self) -> dict[str, Any]:
        return {"origin": self._origin, "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        if state.get("origin") != self._origin:
            raise ValueError(f"the state of other batches: saved {state.get('origin')}, here {self._origin}")
        self._taken = state["taken"]


def spread_rows(tokens: np.ndarray, *, rows: int, length: int) -> Int[np.ndarray, "B T"]:
    """`rows` rows of `length` tokens that begin at even distances; they overlap where the text is short."""
    if len(tokens) < length:
        raise ValueError(f"the held-out text has {len(tokens)} tokens, and rows of {length} were asked: ask for less")
    starts = np.linspace(0, len(tokens) - length, rows).astype(np.int64)
    return tokens[starts[:, None] + np.arange(length)]
