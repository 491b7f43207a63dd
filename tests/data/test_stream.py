"""Rows that go on from batch to batch: whole documents, every one once an epoch, and a stream that can be saved."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import chex
import numpy as np
import pytest

from seqmodels.data import DOCUMENT, Document, make_loader, make_stream_loader, token_rows
from tests.data.test_loader import LENGTH, corpus, take

BATCH = 3


def rows_of(batches: list[dict]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([batch[name] for batch in batches], axis=1) for name in batches[0]}


def texts_of(rows: dict[str, np.ndarray]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """(where it ends, inputs, targets) of every document that a row finished."""
    found = []
    for row in range(len(rows["tokens"])):
        assert rows["start"][row, 0]
        for begin, end in itertools.pairwise(np.flatnonzero(rows["start"][row])):
            inputs, targets = (tuple(rows[name][row, begin:end].tolist()) for name in ("tokens", "targets"))
            found.append((int(end), inputs, targets))
    return found


def test_rows_read_whole_documents_in_every_epoch_once() -> None:
    documents = corpus()
    rows = rows_of(take(make_stream_loader(documents, batch_size=BATCH, length=LENGTH, seed=0), 60))
    assert rows["valid"].all()
    expected = {((DOCUMENT, *d.bytes), (*d.bytes, DOCUMENT)) for d in documents}
    found = Counter((inputs, targets) for _, inputs, targets in texts_of(rows))
    assert set(found) == expected
    # Documents of equal text count together; what is still being read, or was dealt ahead of the others, differs by 1.
    copies = Counter(d.bytes for d in documents)
    times = [count / copies[bytes(targets[:-1])] for (_, targets), count in found.items()]
    assert max(times) - min(times) <= 2 < min(times)


def test_a_batch_is_what_it_says_and_one_row_reads_a_shuffled_epoch() -> None:
    documents = corpus()
    total = sum(len(document.bytes) + 1 for document in documents)
    batches = take(make_stream_loader(documents, batch_size=1, length=LENGTH, seed=3), -(-2 * total // LENGTH))
    for batch in batches:
        assert set(batch) == {"tokens", "targets", "start", "valid"}
        for name, array in batch.items():
            chex.assert_shape(array, (1, LENGTH))
            assert array.dtype == (np.int32 if name in ("tokens", "targets") else bool)
    order = [inputs[1:] for _, inputs, _ in texts_of(rows_of(batches))]
    first, second = order[: len(documents)], order[len(documents) : 2 * len(documents)]
    assert sorted(first) == sorted(tuple(document.bytes) for document in documents)
    assert first != [tuple(document.bytes) for document in documents]
    assert first[: len(second)] != second
    assert any(not batch["start"][0, 0] for batch in batches)


def test_a_saved_state_continues_with_the_same_batches() -> None:
    make = lambda: make_stream_loader(corpus(), batch_size=BATCH, length=LENGTH, seed=5)
    straight = take(make(), 40)
    for stop in (0, 1, 9, 27):
        first = make()
        take(first, stop)
        state = json.loads(json.dumps(first.get_state()))
        take(first, 3)
        fresh, ahead = make(), make()
        take(ahead, 35)
        for iterator in (fresh, ahead, first):
            iterator.set_state(state)
            assert iterator.get_state() == state
            chex.assert_trees_all_equal(take(iterator, 10), straight[stop : stop + 10])


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"batch_size": 2}, {"length": 8}, {"documents": corpus(seed=1)}],
    ids=["seed", "batch_size", "length", "content"],
)
def test_the_state_of_another_stream_is_refused(other: dict) -> None:
    arguments = {"documents": corpus(), "batch_size": BATCH, "length": LENGTH, "seed": 0}
    make = lambda make, documents, **rest: make(documents, **rest)
    state = make(make_stream_loader, **arguments).get_state()
    with pytest.raises(ValueError, match="other documents or arguments"):
        make(make_stream_loader, **{**arguments, **other}).set_state(state)
    with pytest.raises(ValueError, match="other documents or arguments"):
        make(make_loader, **arguments).set_state(state)
    with pytest.raises(ValueError, match="other documents or arguments"):
        make(make_stream_loader, **arguments).set_state(make(make_loader, **arguments).get_state())


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="no documents"):
        make_stream_loader([], batch_size=1, length=1, seed=0)
    with pytest.raises(ValueError, match="batch_size 0"):
        make_stream_loader(corpus(), batch_size=0, length=1, seed=0)


def test_rows_of_tokens_are_the_longest_texts() -> None:
    documents = [Document(str(size), bytes(range(size))) for size in (3, 9, 5)]
    np.testing.assert_array_equal(token_rows(documents, rows=2, length=4), [[DOCUMENT, 0, 1, 2], [DOCUMENT, 0, 1, 2]])
    assert token_rows(documents, rows=1, length=10).shape == (1, 10)
    for rows, length in ((2, 7), (1, 11), (4, 2), (0, 2)):
        with pytest.raises(ValueError, match=f"{rows} rows of {length} tokens"):
            token_rows(documents, rows=rows, length=length)
