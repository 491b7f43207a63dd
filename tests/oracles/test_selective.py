"""Mamba-1 and Mamba-3 against their oracles in float64: outputs, gradients, and states that are carried on."""

from __future__ import annotations

import functools

import chex
import pytest

from seqmodels.mixers import Mamba1Config
from tests.oracles.mamba1 import mamba1_block
from tests.oracles.test_mixers import EXACT, STARTS, Case

pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")

MAMBA1 = {
    "published": Mamba1Config(state_size=3),
    "biases": Mamba1Config(state_size=2, inner_size=5, dt_rank=3, conv_width=2, conv_bias=False, use_bias=True),
    "falcon": Mamba1Config(state_size=3, expansion=0.5, norm_bcdt_eps=1e-3, method="chunked", chunk=4),
}


@pytest.mark.parametrize("name", MAMBA1)
def test_mamba1(name: str) -> None:
    config = MAMBA1[name]
    case = Case(config, functools.partial(mamba1_block, norm_eps=config.norm_bcdt_eps))
    after, expected = case.check(STARTS)
    chex.assert_trees_all_close(after.ssm[0], expected["ssm"], rtol=EXACT, atol=EXACT)
    chex.assert_trees_all_close(after.conv[0], expected["conv"], rtol=EXACT, atol=EXACT)
    case.check({5}, after, expected)
