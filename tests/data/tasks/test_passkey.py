"""Passkey retrieval against rows worked by hand."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from seqmodels.data import decode
from seqmodels.data.tasks import Passkey
from seqmodels.data.tasks.passkey import FILLER, NEEDLE, QUESTION


def test_a_row_by_hand() -> None:
    row = Passkey(length=106).spell("01234", 0.5)
    text = decode(row.tokens).decode()
    assert len(text) == 106
    assert text == (
        "The grass is gThe pass key is 01234. Remember it. reen. The sky What is the pass key? The pass key is 0123"
    )
    assert text.endswith(QUESTION + "0123")
    assert decode(row.targets[row.scored]) == b"01234"
    assert np.flatnonzero(row.scored).tolist() == [101, 102, 103, 104, 105]
    assert text[:102].endswith(QUESTION), "the first digit is asked after the last byte of the question"


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.9, 1.0])
def test_the_needle_stands_at_its_depth_and_the_rest_is_filler(depth: float) -> None:
    task = Passkey(length=1000, depth=depth, digits=3)
    source = task.source(0, 20, "test")
    for index in range(20):
        row = source[index]
        assert row["valid"].all()
        match = re.fullmatch(
            rf"(.*)The pass key is (\d{{3}})\. Remember it\. (.*){re.escape(QUESTION)}(\d\d)",
            decode(row["tokens"]).decode(),
        )
        assert match is not None
        before, key, after, answer = match.groups()
        assert (FILLER * 12).startswith(before + after)
        assert len(before) == round(depth * len(before + after))
        assert decode(row["targets"][row["scored"]]).decode() == key
        assert key.startswith(answer)


def test_depths_and_keys_of_training_rows_are_spread() -> None:
    task = Passkey(length=178, digits=1)
    source = task.source(0, 400)
    texts = [decode(source[index]["tokens"]) for index in range(400)]
    places = [text.index(b"The pass key") for text in texts]
    filler = 179 - len(NEEDLE.format(key=0)) - len(QUESTION) - 1
    assert min(places) < 5
    assert max(places) > filler - 5
    assert abs(np.mean(places) - filler / 2) < 5
    digits = np.array([source[index]["targets"][source[index]["scored"]][0] for index in range(400)]) - ord("0")
    assert np.bincount(digits, minlength=10).min() > 20
    assert task.evaluation().depth == 0.5


def test_words_of_another_vocabulary_fill_the_row_exactly() -> None:
    class Words(Passkey):
        def encode(self, text: str) -> list[int]:
            return [len(word) for word in re.findall(r"\d\d?|[a-zA-Z]+", text)]

    task = Words(length=60, digits=5)
    for depth in (0.0, 0.3, 1.0):
        row = task.spell("12345", depth)
        assert len(row.tokens) == 60
        assert row.targets[row.scored].tolist() == [2, 2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 70}, r"length is 70; a key of 5 digits and its question take 78 positions"),
        ({"digits": 0}, "a key has at least one digit"),
        ({"depth": 1.5}, r"depth 1.5, .*between 0 \(the beginning\) and 1"),
        ({"test_depth": -0.1}, "test_depth -0.1"),
    ],
)
def test_settings_that_make_no_row(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Passkey(), **changes)
