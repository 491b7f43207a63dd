"""Cuts, packing, padding and causality: where a document is cut, packed or padded changes nothing.

All tests of a mixer share its compiled `Subject.run`; the full range of lengths is in `test_lengths.py` (slow).
"""

from __future__ import annotations

import chex
import jax
import numpy as np
import pytest

from seqmodels.typing import Segments
from tests.mixers.properties import (
    BATCH,
    CONFIGS,
    FLOAT32,
    FLOAT32_GRADIENT,
    LENGTH,
    MIXED,
    UNBROKEN,
    Weights,
    assert_close,
    assert_valid_close,
    choose_rows,
    documents,
    layout,
    right_padded,
    row_of,
    subject,
    tokens,
)

every_mixer = pytest.mark.parametrize("name", CONFIGS)


@every_mixer
def test_a_cut_anywhere_changes_nothing(name: str) -> None:
    """f(x1 ++ x2) == f(x2, state after x1), each row cut elsewhere, pieces of one token included."""
    s, x = subject(name), tokens(0)
    whole = s.run(x, s.warm, UNBROKEN)
    for cuts in ([1, LENGTH - 1, 5, 8], np.random.default_rng(2).integers(1, LENGTH, BATCH)):
        cuts = np.asarray(cuts)
        first = s.run(
            np.where(np.arange(LENGTH)[:, None] < cuts[:, None, None], x, 0), s.warm, right_padded(cuts, start=False)
        )
        rest = np.stack([np.roll(row, -cut, axis=0) for row, cut in zip(x, cuts, strict=True)])
        second = s.run(rest, first.carry, right_padded(LENGTH - cuts, start=False))
        for row, cut in enumerate(cuts):
            y = np.concatenate([first.y[row, :cut], second.y[row, : LENGTH - cut]])
            assert_close(y, whole.y[row], FLOAT32)
        assert_close(second.after, whole.after, FLOAT32)


@every_mixer
@pytest.mark.parametrize("pieces", [(1,) * LENGTH, (7, 1, 7, 1)], ids=["decode", "prefill"])
def test_pieces_equal_the_whole(name: str, pieces: tuple[int, ...]) -> None:
    """Unpadded pieces, and a token at a time, with documents starting in between: outputs and final state."""
    s, x = subject(name), tokens(0)
    segments = layout("----------------", "-------+--------", "++--------------", "--------+----+--")
    whole = s.run(x, s.warm, segments)
    carry, outputs, begin = s.warm, [], 0
    for size in pieces:
        part = slice(begin, begin + size)
        y, carry = s.forward(s.params, x[:, part], carry, Segments(*(mask[:, part] for mask in segments)))
        outputs.append(y)
        begin += size
    assert_close(np.concatenate(outputs, axis=1), whole.y, FLOAT32)
    assert_close(s.after(carry), whole.after, FLOAT32)
    chex.assert_trees_all_equal_shapes_and_dtypes(carry, whole.carry)


@every_mixer
def test_packed_equals_separate(name: str) -> None:
    """Documents packed into rows equal each one alone: outputs, what follows the last one, and every gradient."""
    s, x = subject(name), tokens(0)
    weights = s.weights(MIXED.valid)
    packed = s.run(x, s.warm, MIXED, weights=weights)
    rows = [documents(*row) for row in zip(*MIXED, strict=True)]
    in_params = jax.tree.map(np.zeros_like, s.params)
    for k in range(max(map(len, rows))):  # the k-th document of every row, alone in its row
        alone = [row[k] if k < len(row) else None for row in rows]
        batch, weighted = np.zeros_like(x), jax.tree.map(np.zeros_like, weights)
        for r, d in enumerate(alone):
            if d is not None:
                batch[r, : d.end - d.begin] = x[r, d.begin : d.end]
                weighted.y[r, : d.end - d.begin] = weights.y[r, d.begin : d.end]
                for ours, given in zip(weighted.after, weights.after, strict=True):
                    ours[r] = given[r] * (k == len(rows[r]) - 1)
        carried = np.array([d is not None and d.carried for d in alone])
        lengths = [0 if d is None else d.end - d.begin for d in alone]
        result = s.run(
            batch, choose_rows(carried, s.warm, s.fresh), right_padded(lengths, start=False), weights=weighted
        )
        in_params = jax.tree.map(np.add, in_params, result.gradients.params)
        for r, d in enumerate(alone):
            if d is None:
                continue
            inside, span = slice(0, d.end - d.begin), slice(d.begin, d.end)
            assert_close(result.y[r, inside], packed.y[r, span], FLOAT32)
            assert_close(result.gradients.x[r, inside], packed.gradients.x[r, span], FLOAT32_GRADIENT)
            if d.carried:
                ours, theirs = ([g[r] for g in which.gradients.state] for which in (result, packed))
                assert_close(ours, theirs, FLOAT32_GRADIENT)
            if k == len(rows[r]) - 1:
                assert_close(row_of(result.after, r), row_of(packed.after, r), FLOAT32)
                assert result.carry.position[r] == packed.carry.position[r]
    assert_close(in_params, packed.gradients.params, FLOAT32_GRADIENT)
    forgotten = [r for r, row in enumerate(rows) if len(row) > 1]
    only_last = s.run(x, s.warm, MIXED, weights=Weights(0 * weights.y, weights.after))
    assert all(not np.any(g[np.array(forgotten)]) for g in only_last.gradients.state), "a gradient passed a reset"


@every_mixer
def test_padding_changes_nothing(name: str) -> None:
    """NaN in the padding, padding on the left or on the right: outputs, gradients and final state are the same."""
    s, x = subject(name), tokens(0)
    clean = s.run(np.where(MIXED.valid[..., None], x, 0), s.warm, MIXED)
    poisoned = s.run(np.where(MIXED.valid[..., None], x, np.nan), s.warm, MIXED)
    assert_valid_close(poisoned.y, clean.y, MIXED.valid)
    assert_close(poisoned.after, clean.after, FLOAT32)
    assert_close(poisoned.gradients, clean.gradients, FLOAT32_GRADIENT)
    assert not np.any(np.asarray(poisoned.gradients.x)[~MIXED.valid]), "padding has a gradient"


@every_mixer
def test_padded_equals_unpadded(name: str) -> None:
    """Seven tokens alone, padded on the right, padded on the left; a row of nothing but padding keeps its state."""
    s, x, n = subject(name), tokens(0), 7
    y, carry = s.forward(s.params, x[:, :n], s.fresh, layout(*["+------"] * BATCH))
    for drawing in ("+------.........", ".........+------", "...+------......"):
        segments, begin = layout(*[drawing] * BATCH), drawing.index("+")
        spread = np.full_like(x, np.nan)
        spread[:, begin : begin + n] = x[:, :n]
        result = s.run(spread, s.warm, segments)
        assert_close(result.y[:, begin : begin + n], y, FLOAT32)
        assert_close(result.after, s.after(carry), FLOAT32)
        np.testing.assert_array_equal(result.carry.position, carry.position)
    nothing = s.run(np.full_like(x, np.nan), s.warm, layout(*["." * LENGTH] * BATCH))
    assert_close(nothing.carry, s.warm, FLOAT32)


@every_mixer
def test_the_future_has_no_gradient(name: str) -> None:
    """The gradient of y_t with respect to later tokens and other rows is exactly 0, to earlier ones it is not."""
    s, x = subject(name), tokens(0)
    for times in ([0, 5, 9, LENGTH - 2], [1, 7, 8, LENGTH - 1]):
        at = np.arange(LENGTH) == np.asarray(times)[:, None]
        for row in range(BATCH):
            keep = at & (np.arange(BATCH) == row)[:, None]
            gradient = np.asarray(s.run(x, s.warm, UNBROKEN, weights=s.weights(keep, after=False)).gradients.x)
            reached = np.any(gradient != 0, axis=-1)
            t = times[row]
            assert not reached[np.arange(BATCH) != row].any(), f"y of row {row} depends on another row"
            assert not reached[row, t + 1 :].any(), f"y_{t} depends on x_{t + 1 + np.argmax(reached[row, t + 1 :])}"
            assert reached[row, max(0, t - 3) : t + 1].all(), f"y_{t} does not depend on the tokens right before it"
