"""Losses by position, remembrance and sizes of states, against forward passes over everything at once."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from seqmodels.mixers import PrefixScan
from seqmodels.train import effective_remembrance, length, loss_by_position, state_statistics
from seqmodels.train.length import doubling
from tests.train.starting import MAMBA, hybrid, memory
from tests.train.tiny import FULL, LOCAL, RECURRENT, tiny_model

# float32 sums of a few hundred terms in another order
TOLERANCE = 2e-5
ROWS, LENGTH = 2, 24
PSM = PrefixScan(aggregator=(((FULL,), 1),), inference=(((FULL,), 1),), chunk=4)


def tokens(length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 257, (ROWS, length))


@functools.cache
def whole(model):
    """Logits and the state of one forward pass; a program for every length."""
    return jax.jit(lambda tokens: model(tokens))


def losses(model, row: np.ndarray) -> np.ndarray:
    logs = np.asarray(jax.nn.log_softmax(whole(model)(row[:, :-1])[0]), np.float64)
    return -np.take_along_axis(logs, row[:, 1:, None], -1)[..., 0]


@pytest.mark.parametrize("mixers", [(RECURRENT, MAMBA, LOCAL), (FULL,)], ids=["constant_state", "full_attention"])
def test_losses_by_position_are_those_of_one_forward_pass(mixers) -> None:
    model, row = tiny_model(*mixers), tokens(LENGTH + 1)
    expected = losses(model, row).mean(axis=0)
    curve = loss_by_position(model, row, chunk=7, edges=[0, 1, 5, 20, 23])
    assert curve.edges.tolist() == [0, 1, 5, 20, 23]
    np.testing.assert_allclose(
        curve.loss, [expected[a:b].mean() for a, b in ((0, 1), (1, 5), (5, 20), (20, 23))], rtol=TOLERANCE
    )
    at_once = loss_by_position(model, row)
    assert at_once.edges.tolist() == [0, LENGTH]
    np.testing.assert_allclose(at_once.loss, [expected.mean()], rtol=TOLERANCE)


def test_another_model_of_the_same_definition_compiles_nothing() -> None:
    compiled = []
    for seed in (0, 1):
        loss_by_position(tiny_model(LOCAL, seed=seed), tokens(LENGTH + 1), chunk=8)
        compiled.append(length._score._cache_size())
    assert compiled[0] == compiled[1]


def test_edges_double() -> None:
    assert doubling(500) == [0, 64, 128, 256, 500]
    assert doubling(256, first=16) == [0, 16, 32, 64, 128, 256]
    assert doubling(1) == [0, 1]


@pytest.mark.parametrize("mixers", [(RECURRENT, MAMBA, LOCAL), (PSM,)], ids=["recurrent", "psm"])
def test_remembrance_is_the_distance_of_two_forward_passes(mixers) -> None:
    model, row, starts = tiny_model(*mixers), tokens(), [0, 20]
    found = effective_remembrance(model, row, starts)
    next_token = lambda row: np.asarray(jax.nn.softmax(whole(model)(row)[0][:, -1]), np.float64)
    expected = [0.5 * np.abs(next_token(row) - next_token(row[:, t:])).sum(-1) for t in starts]
    np.testing.assert_allclose(found, np.stack(expected, axis=1), atol=TOLERANCE)
    assert (found[:, 0] == 0).all()
    assert (found[:, 1:] > 100 * TOLERANCE).all()


def test_sizes_of_memories_are_those_of_whole_prefixes() -> None:
    model, row, positions = hybrid(), tokens(), [4, 11, 24]
    found = state_statistics(model, row, positions, chunk=6)
    assert set(found) == {"layers.0.0.hidden", "layers.0.2.ssm"}
    for index, position in enumerate(positions):
        state = memory(whole(model)(row[:, :position])[1])
        for name, measured in found.items():
            assert measured.std.shape == measured.mean_abs.shape == (len(positions), 1)
            np.testing.assert_allclose(measured.std[index], [state[name].std()], rtol=TOLERANCE)
            np.testing.assert_allclose(measured.mean_abs[index], [np.abs(state[name]).mean()], rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss_by_position(tiny_model(FULL), tokens(1)), r"at least 2 in a row, not int64 \(2, 1\)"),
        (lambda: loss_by_position(tiny_model(FULL), tokens(), edges=[0, 24]), "at most the 23 predictions"),
        (lambda: loss_by_position(tiny_model(FULL), tokens(), edges=[4, 4]), "have to rise"),
        (lambda: effective_remembrance(tiny_model(FULL), tokens(), [24]), "positions from 0 to 23"),
        (lambda: effective_remembrance(tiny_model(PSM), tokens(), [3]), "multiples of the model's alignment, 4"),
        (lambda: state_statistics(tiny_model(RECURRENT), tokens(), [25]), "at most 24 tokens"),
        (lambda: state_statistics(tiny_model(FULL), tokens(), [4]), "no layer .* recurrent memory"),
    ],
)
def test_what_cannot_be_measured(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
