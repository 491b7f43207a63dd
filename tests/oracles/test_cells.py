"""Classical cells against their oracles in float64: outputs, gradients, and states that are carried on."""

from __future__ import annotations

import functools
from typing import Any

import chex
import pytest

from seqmodels.mixers import GatedRNNConfig, MinGRUConfig, MinLSTMConfig
from seqmodels.typing import MixerConfig
from tests.oracles.cells import gated_rnn, mingru, minlstm
from tests.oracles.test_mixers import EXACT, STARTS, Case

pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")

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
