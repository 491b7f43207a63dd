"""The slow tier: lengths around a chunk, against one token at a time; some are compiled in full."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from seqmodels.typing import Segments
from tests.mixers.properties import (
    ATTENTION,
    BATCH,
    CONFIGS,
    FLOAT32,
    FLOAT32_GRADIENT,
    Gradients,
    Result,
    Subject,
    Weights,
    assert_close,
    assert_valid_close,
    draw,
    tokens,
)

pytestmark = pytest.mark.slow

# A document's first read is (q.k) v, and the norm per head divides by it: where q.k happens to be small, even single
# steps are 4e-5 from float64 (5e-7 in the same rows without starts).
AMPLIFIED = {"gla": 5}
# The kinds of state: a cache, a tree, a vector, a matrix, one with products of k k^T, a stabilised one. The slow tier
# takes these through every length, and `test_matrix` through every method and chunk at several lengths, types and
# scales; the others, whose operators have tests of their own, through one length.
FAMILIES = {"attention", "psm", "rg_lru", "gla", "kda", "mlstm"}
OPTIMISED = {"rg_lru", "gla", "mlstm"}  # a vector, a matrix, a stabilised one; trees and delta rules compile long
ODD = 65  # the length of the others: no chunk but the first divides it
LENGTHS = (64, ODD)  # pieces of one token are below
LONGEST = max(LENGTHS)
PIECES = (65, 1, 7, 1, 54)


@functools.cache
def subject(name: str) -> Subject:
    return Subject(CONFIGS[name], caches=name in ATTENTION, capacity=sum(PIECES) + 32)


def token_by_token(s: Subject, x: np.ndarray, segments: Segments, weights: Weights) -> Result:
    """The oracle: spans of one token, the rest of the longest row being padding, so that one program serves all."""
    length = x.shape[1]
    fill = lambda a: np.pad(a, [(0, 0), (0, LONGEST - length)] + [(0, 0)] * (a.ndim - 2))
    longer = Segments(*map(fill, segments))
    result = s.run(fill(x), s.warm, longer, weights=Weights(fill(weights.y), weights.after), steps=True)
    gradients = result.gradients._replace(x=result.gradients.x[:, :length])
    return result._replace(y=result.y[:, :length], gradients=gradients)


@pytest.mark.parametrize(
    ("name", "length"),
    [
        pytest.param(name, length, marks=[pytest.mark.optimised] if name in OPTIMISED else [])
        for name in CONFIGS
        for length in LENGTHS
        if length == ODD or name in FAMILIES
    ],
)
def test_every_length_equals_token_by_token(name: str, length: int) -> None:
    """Outputs, state and gradients of random layouts, from a state that has seen tokens."""
    s, random = subject(name), np.random.default_rng(length)
    x = tokens(length, BATCH, length)
    unbroken = Segments(np.zeros((BATCH, length), bool), np.ones((BATCH, length), bool))
    for segments in (unbroken, draw(random, BATCH, length), draw(random, BATCH, length)):
        weights = s.weights(segments.valid)
        expected = token_by_token(s, x, segments, weights)
        result = s.run(x, s.warm, segments, weights=weights)
        assert_valid_close(result.y, expected.y, segments.valid)
        assert_close(result.after, expected.after, FLOAT32)
        for ours, theirs, part in zip(result.gradients, expected.gradients, Gradients._fields, strict=True):
            try:
                assert_close(ours, theirs, AMPLIFIED.get(name, 1) * FLOAT32_GRADIENT)
            except AssertionError as error:
                raise AssertionError(f"gradient to {part} at length {length}: {error}") from error


@pytest.mark.parametrize("name", [name for name in CONFIGS if name in FAMILIES])
def test_long_pieces_equal_the_whole(name: str) -> None:
    """Unpadded pieces around a chunk's length, documents starting anywhere."""
    s, x = subject(name), tokens(3, BATCH, sum(PIECES))
    start = np.random.default_rng(4).random(x.shape[:2]) < 0.04
    segments = Segments(start, np.ones_like(start))
    whole, after = s.forward(s.params, x, s.warm, segments)
    carry, outputs = s.warm, []
    for begin, end in zip(np.cumsum((0, *PIECES[:-1])), np.cumsum(PIECES), strict=True):
        piece = Segments(segments.start[:, begin:end], segments.valid[:, begin:end])
        y, carry = s.forward(s.params, x[:, begin:end], carry, piece)
        outputs.append(y)
    assert_close(np.concatenate(outputs, axis=1), whole, FLOAT32)
    assert_close(s.after(carry), s.after(after), FLOAT32)
