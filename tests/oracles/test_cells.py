"""Classical cells against their oracles in float64: outputs, gradients, and states that are carried on."""

from __future__ import annotations

import functools
from typing import Any

import chex
import numpy as np
import pytest

from seqmodels.mixers import GatedRNNConfig, GRUConfig, LSTMConfig, MinGRUConfig, MinLSTMConfig, SLSTMConfig
from seqmodels.typing import MixerConfig
from tests.oracles.cells import gated_rnn, gru, lstm, mingru, minlstm
from tests.oracles.test_mixers import EXACT, STARTS, Case, assert_cells
from tests.oracles.xlstm import slstm_block

pytestmark = pytest.mark.usefixtures("x64")

ELEMENTWISE: dict[str, tuple[MixerConfig, Any]] = {
    "mingru": (MinGRUConfig(), functools.partial(mingru, positive=True)),
    "mingru-plain": (MinGRUConfig(positive=False, expansion=1.5), functools.partial(mingru, positive=False)),
    "minlstm": (MinLSTMConfig(), functools.partial(minlstm, positive=True)),
    "minlstm-plain": (
        MinLSTMConfig(positive=False, expansion=0.5, forget_bias=2.0),
        functools.partial(minlstm, positive=False),
    ),
    "gated-rnn": (GatedRNNConfig(), gated_rnn),
    "gated-rnn-input-gate": (GatedRNNConfig(input_gate=True, expansion=2.0, forget_bias=-1.0), gated_rnn),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_cells(name: str) -> None:
    case = Case(*ELEMENTWISE[name])
    after, expected = case.check(STARTS)
    chex.assert_trees_all_close(after.hidden[0], expected, rtol=EXACT, atol=EXACT)
    case.check({5}, after, expected)


methods = pytest.mark.parametrize("method", ["sequential", "newton"])


@methods
@pytest.mark.parametrize(("heads", "forget_bias"), [(1, 1.0), (4, -0.5)])
def test_lstm(heads: int, forget_bias: float, method: str) -> None:
    case = Case(LSTMConfig(heads=heads, forget_bias=forget_bias, method=method), lstm)
    after, expected = case.check(STARTS)
    assert_cells(after, expected)
    case.check({5}, after, expected)


@methods
@pytest.mark.parametrize("heads", [1, 2])
def test_gru(heads: int, method: str) -> None:
    case = Case(GRUConfig(heads=heads, method=method), gru)
    after, expected = case.check(STARTS)
    chex.assert_trees_all_close(after.hidden[0], np.stack(expected), rtol=EXACT, atol=EXACT)
    case.check({5}, after, expected)


def test_slstm_by_newton() -> None:
    """The outputs, and the cell under its maximum, which the iterations themselves do not know."""
    config = SLSTMConfig(heads=2, norm_eps=1e-3, method="newton")
    case = Case(config, functools.partial(slstm_block, eps=config.norm_eps))
    after, expected = case.check(STARTS)
    assert_cells(after.cell, expected["cells"])
    case.check({5}, after, expected)
