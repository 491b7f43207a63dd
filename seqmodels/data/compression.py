"""What a model of text has to beat: bits per byte of simple codes on held-out documents."""

from __future__ import annotations

import lzma
from collections.abc import Sequence

import numpy as np

from seqmodels.data.text import Document
from seqmodels.data.tokens import DOCUMENT, VOCAB_SIZE, encode

# Added to every count, so that what never occurred in training still has a code.
SMOOTHING = 0.1


def baselines(train_documents: Sequence[Document], heldout_documents: Sequence[Document]) -> dict[str, float]:
    """Bits per byte of the held-out documents under three codes: "unigram", "bigram" and "xz".

    Unigram and bigram are frequencies in the training documents, `SMOOTHING` added to each count:
    p(b) = (n(b) + s) / (n + 257 s) and p(b | a) = (n(a b) + s) / (n(a) + 257 s). As for a model, every document begins
    afresh with DOCUMENT before its first byte, its end is coded too, and all bits are divided by the bytes alone.
    xz packs each document apart at its strongest setting; its files carry their own end and a header.
    """
    if not train_documents or not any(document.bytes for document in heldout_documents):
        raise ValueError(
            f"baselines need training documents and held-out bytes, got {len(train_documents)} training and "
            f"{len(heldout_documents)} held-out documents"
        )
    pairs, heldout = _pair_counts(train_documents), _pair_counts(heldout_documents)
    size = sum(len(document.bytes) for document in heldout_documents)
    packed = sum(len(_xz(document.bytes)) for document in heldout_documents)
    return {
        "unigram": float((heldout.sum(0) * _code_lengths(pairs.sum(0))).sum() / size),
        "bigram": float((heldout * _code_lengths(pairs)).sum() / size),
        "xz": 8 * packed / size,
    }


def _pair_counts(documents: Sequence[Document]) -> np.ndarray:
    """How often each token follows each other one, `[previous, next]`, document boundaries included."""
    total = np.zeros(VOCAB_SIZE * VOCAB_SIZE, np.int64)
    for document in documents:
        tokens = np.concatenate([[DOCUMENT], encode(document.bytes), [DOCUMENT]])
        total += np.bincount(tokens[:-1] * VOCAB_SIZE + tokens[1:], minlength=len(total))
    return total.reshape(VOCAB_SIZE, VOCAB_SIZE)


def _code_lengths(counts: np.ndarray) -> np.ndarray:
    """Bits for each token along the last axis."""
    smoothed = counts + SMOOTHING
    return -np.log2(smoothed / smoothed.sum(-1, keepdims=True))


def _xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
