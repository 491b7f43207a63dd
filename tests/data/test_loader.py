"""Packed batches: nothing lost, nothing twice, nothing mixed, and a stream that continues where it was saved."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import chex
import numpy as np
import pytest

from seqmodels.data import DOCUMENT, Document, evaluation_batches, evaluation_streams, make_loader

LENGTH = 16
# Every way in which a document can sit in rows of 16: empty, one byte, just fitting with its end, one more, and long.
SIZES = (0, 1, 14, 15, 16, 17, 31, 32, 33, 100, 0, 5, 7)


def corpus(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> list[Document]:
    generator = np.random.default_rng(seed)
    return [Document(f"d{i}", generator.bytes(size)) for i, size in enumerate(sizes)]


def expected_pieces(documents: list[Document], length: int) -> Counter:
    """(inputs, targets) of every piece, in plain Python from the definition."""
    pieces: Counter = Counter()
    for document in documents:
        inputs, targets = [DOCUMENT, *document.bytes], [*document.bytes, DOCUMENT]
        for start in range(0, len(inputs), length):
            pieces[tuple(inputs[start : start + length]), tuple(targets[start : start + length])] += 1
    return pieces


def pieces_of(batches: list[dict]) -> Counter:
    """(inputs, targets) of every piece in packed batches: from each start up to the next one, or to padding."""
    pieces: Counter = Counter()
    for batch in batches:
        for row in range(len(batch["tokens"])):
            start, valid = batch["start"][row], batch["valid"][row]
            assert not (start & ~valid).any()
            bounds = [*np.flatnonzero(start), len(start)]
            assert not valid[: bounds[0]].any(), "valid tokens before the first start of an independent row"
            for begin, end in itertools.pairwise(bounds):
                size = int(valid[begin:end].sum())
                assert valid[begin : begin + size].all(), "padding inside a piece"
                piece = (batch[name][row, begin : begin + size].tolist() for name in ("tokens", "targets"))
                pieces[tuple(map(tuple, piece))] += 1
    return pieces


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("align", [1, 4])
def test_an_epoch_is_every_piece_of_every_document_once(batch_size: int, epochs: int, align: int) -> None:
    documents = corpus()
    batches = list(make_loader(documents, batch_size=batch_size, length=LENGTH, seed=3, epochs=epochs, align=align))
    once = expected_pieces(documents, LENGTH)
    assert pieces_of(batches) == Counter({piece: epochs * times for piece, times in once.items()})
    targets = Counter(int(t) for batch in batches for t in batch["targets"][batch["valid"]])
    assert targets == Counter(
        {t: epochs * n for t, n in Counter([b for d in documents for b in [*d.bytes, DOCUMENT]]).items()}
    )


def test_a_batch_is_what_it_says() -> None:
    for batch in make_loader(corpus(), batch_size=3, length=LENGTH, seed=0, epochs=2):
        assert set(batch) == {"tokens", "targets", "start", "valid"}
        for name, array in batch.items():
            chex.assert_shape(array, (3, LENGTH))
            assert array.dtype == (np.int32 if name in ("tokens", "targets") else bool)
        assert not batch["tokens"][~batch["valid"]].any()
        assert not batch["targets"][~batch["valid"]].any()


@pytest.mark.parametrize("align", [1, 4])
def test_padding_stands_at_row_ends_or_before_an_aligned_start(align: int) -> None:
    for batch in make_loader(corpus(), batch_size=3, length=LENGTH, seed=0, epochs=2, align=align):
        assert not (np.flatnonzero(batch["start"].any(0)) % align).any()
        falls = batch["valid"][:, :-1] & ~batch["valid"][:, 1:]
        assert align > 1 or falls.sum(1).max() <= 1


def take(iterator, number: int) -> list[dict]:
    return [next(iterator) for _ in range(number)]


def test_a_saved_state_continues_with_the_same_batches() -> None:
    def make():
        return make_loader(corpus(), batch_size=2, length=LENGTH, seed=5)

    straight = take(make(), 60)
    generator = np.random.default_rng(1)
    for stop in [0, 1, 7, 8, 9, *generator.integers(2, 50, 5).tolist()]:
        first = make()
        take(first, stop)
        state = json.loads(json.dumps(first.get_state()))
        take(first, 3)
        fresh, advanced = make(), make()
        take(advanced, 11)
        for iterator in (fresh, advanced, first):
            iterator.set_state(state)
            assert iterator.get_state() == state
            chex.assert_trees_all_equal(take(iterator, 10), straight[stop : stop + 10])


def test_many_restarts_neither_repeat_nor_skip() -> None:
    documents, batches, state = corpus(), [], None
    while True:
        iterator = make_loader(documents, batch_size=2, length=LENGTH, seed=9, epochs=4)
        if state is not None:
            iterator.set_state(state)
        batch = next(iterator, None)
        if batch is None:
            break
        batches.append(batch)
        state = iterator.get_state()
    once = expected_pieces(documents, LENGTH)
    assert pieces_of(batches) == Counter({piece: 4 * times for piece, times in once.items()})


def test_order_depends_on_seed_and_epoch_alone() -> None:
    documents = corpus(sizes=(15,) * 24)

    def order(seed: int, epochs: int) -> list[bytes]:
        loader = make_loader(documents, batch_size=2, length=LENGTH, seed=seed, epochs=epochs)
        return [row.tobytes() for batch in loader for row in batch["targets"]]

    twice = order(0, 2)
    assert twice == order(0, 2)
    assert twice != order(1, 2)
    assert sorted(twice[:24]) == sorted(twice[24:])
    assert twice[:24] != twice[24:]
    # Documents themselves are shuffled, not only the rows that are packed side by side.
    (given,) = evaluation_batches(documents[:8], batch_size=8, length=LENGTH)
    assert set(twice[:8]) != {row.tobytes() for row in given["targets"]}
    endless = make_loader(documents, batch_size=2, length=LENGTH, seed=0)
    assert [row.tobytes() for batch in take(endless, 12) for row in batch["targets"]] == twice[:24]


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"batch_size": 3}, {"length": 8}, {"documents": corpus(seed=1)}, {"documents": corpus()[::-1]}],
    ids=["seed", "batch_size", "length", "content", "order"],
)
def test_the_state_of_another_stream_is_refused(other: dict) -> None:
    arguments = {"documents": corpus(), "batch_size": 2, "length": LENGTH, "seed": 0}
    state = make_loader(arguments.pop("documents"), **arguments).get_state()
    arguments = {"documents": corpus(), **arguments, **other}
    with pytest.raises(ValueError, match="other documents or arguments"):
        make_loader(arguments.pop("documents"), **arguments).set_state(state)


@pytest.mark.parametrize("batch_size", [1, 4, 40])
def test_evaluation_sees_every_piece_once_in_batches_of_one_shape(batch_size: int) -> None:
    documents = corpus()
    batches = list(evaluation_batches(documents, batch_size=batch_size, length=LENGTH))
    assert pieces_of(batches) == expected_pieces(documents, LENGTH)
    for batch in batches:
        chex.assert_shape(list(batch.values()), (batch_size, LENGTH))
        assert batch["valid"].any()
    chex.assert_trees_all_equal(batches, list(evaluation_batches(documents, batch_size=batch_size, length=LENGTH)))


@pytest.mark.parametrize("batch_size", [1, 4, 40])
def test_streams_carry_every_document_whole_in_one_row(batch_size: int) -> None:
    documents = corpus()
    batches = list(evaluation_streams(documents, batch_size=batch_size, length=LENGTH))
    rows = {name: np.concatenate([batch[name] for batch in batches], axis=1) for name in batches[0]}
    chex.assert_shape(list(rows.values()), (batch_size, len(batches) * LENGTH))
    assert pieces_of([rows]) == expected_pieces(documents, length=10**6)
    # Padding only behind the last document of a row, and no batch without a token.
    assert (np.diff(rows["valid"].astype(int), axis=1) <= 0).all()
    assert all(batch["valid"].any() for batch in batches)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="no documents"):
        make_loader([], batch_size=1, length=1, seed=0)
    with pytest.raises(ValueError, match="length 0"):
        make_loader(corpus(), batch_size=1, length=0, seed=0)
    with pytest.raises(ValueError, match="batch_size 0"):
        next(evaluation_streams(corpus(), batch_size=0, length=1))


def test_one_token_rows_are_possible() -> None:
    documents = corpus(sizes=(0, 1, 3))
    batches = list(make_loader(documents, batch_size=2, length=1, seed=0, epochs=1))
    assert pieces_of(batches) == expected_pieces(documents, 1)
