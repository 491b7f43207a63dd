"""The codes that a model has to beat, against numbers worked out by hand."""

from __future__ import annotations

import lzma
import math

import numpy as np
import pytest

from seqmodels.data import Document, baselines
from seqmodels.data.compression import SMOOTHING, _code_lengths, _pair_counts

# Sums of a few float64 logarithms.
ROUNDING = 1e-12


def test_unigram_and_bigram_by_hand() -> None:
    # Training transitions: D a, a b, b D. Held out: D a, a D over one byte.
    measured = baselines([Document("train", b"ab")], [Document("heldout", b"a")])
    seen, unseen = 1 + SMOOTHING, SMOOTHING
    unigram = -2 * math.log2(seen / (3 + 257 * SMOOTHING))
    bigram = -math.log2(seen / (1 + 257 * SMOOTHING)) - math.log2(unseen / (1 + 257 * SMOOTHING))
    assert measured["unigram"] == pytest.approx(unigram, abs=ROUNDING)
    assert measured["bigram"] == pytest.approx(bigram, abs=ROUNDING)


def test_bits_are_divided_by_all_heldout_bytes_and_documents_do_not_touch() -> None:
    train = [Document("train", b"abab")]
    apart = baselines(train, [Document("x", b"ab"), Document("y", b"ba")])
    singly = [baselines(train, [Document("x", text)]) for text in (b"ab", b"ba")]
    for name in ("unigram", "bigram", "xz"):
        assert apart[name] == pytest.approx(np.mean([each[name] for each in singly]), abs=ROUNDING)


def test_xz_is_each_heldout_document_apart() -> None:
    texts = [b"spam and eggs " * 30, b"spam and eggs " * 20]
    sizes = [len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) for text in texts]
    measured = baselines([Document("train", b"x")], [Document(str(i), text) for i, text in enumerate(texts)])
    assert measured["xz"] == pytest.approx(8 * sum(sizes) / sum(map(len, texts)), abs=ROUNDING)


def test_the_codes_are_distributions() -> None:
    counts = _pair_counts([Document("train", b"some text"), Document("empty", b"")])
    assert counts.sum() == len(b"some text") + 1 + 1
    np.testing.assert_allclose(np.exp2(-_code_lengths(counts)).sum(-1), 1, rtol=ROUNDING)


def test_there_must_be_something_to_measure() -> None:
    with pytest.raises(ValueError, match="0 training"):
        baselines([], [Document("x", b"x")])
    with pytest.raises(ValueError, match="held-out bytes"):
        baselines([Document("x", b"x")], [Document("x", b"")])
