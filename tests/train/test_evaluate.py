"""Held-out bits per byte against every document scored on its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import params
from seqmodels.data import DOCUMENT
from seqmodels.train import make_evaluator
from tests.train.tiny import FULL, LENGTH, LOCAL, RECURRENT, texts, tiny_model

# float32 sums of a few hundred logarithms in other orders
TOLERANCE = 1e-5
LONGEST = 64


def bits(score, text: bytes, length: int) -> float:
    """Of one document, in pieces of `length` targets that know nothing of each other."""
    tokens = np.array([DOCUMENT, *text, DOCUMENT])
    total = 0.0
    for at in range(0, len(text) + 1, length):
        piece = tokens[at : at + length + 1]
        # what follows a piece cannot reach it; one shape compiles once
        logs = np.asarray(score(jnp.asarray(np.pad(piece[:-1], (0, LONGEST - len(piece) + 1)))), np.float64)
        total -= logs[np.arange(len(piece) - 1), piece[1:]].sum() / np.log(2)
    return total


@pytest.mark.parametrize("mixers", [(LOCAL, RECURRENT), (FULL,)], ids=["constant_state", "full_attention"])
def test_each_document_starts_afresh(mixers):
    model, documents = tiny_model(*mixers), texts(6)
    definition, arrays = params.split(model)
    found = make_evaluator(definition, documents, batch_size=3, length=LENGTH)(arrays)
    # a model of constant state sees documents whole, full attention the length it was trained on
    length = LENGTH if mixers == (FULL,) else 10**6
    score = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens[None])[0][0]))
    total = sum(bits(score, document.bytes, length) for document in documents)
    size = sum(len(document.bytes) for document in documents)
    assert found["bits_per_byte"] == pytest.approx(total / size, rel=TOLERANCE)
    assert found["loss"] == pytest.approx(total * np.log(2) / (size + len(documents)), rel=TOLERANCE)
