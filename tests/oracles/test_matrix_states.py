"""GLA and (gated) DeltaNet against their oracles in float64: outputs, gradients, and states that are carried on."""

from __future__ import annotations

import functools

import chex
import jax.numpy as jnp
import pytest

from seqmodels.mixers import Eigenvalues, GatedDeltaNetConfig, GLAConfig
from tests.oracles.gated_deltanet import gated_deltanet_layer
from tests.oracles.gla import gla_layer
from tests.oracles.test_mixers import EXACT, STARTS, Case

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(
    "config",
    [
        GLAConfig(heads=2, gate_rank=3),
        GLAConfig(heads=1, expand_value=2, temperature=1),
        GLAConfig(heads=2, conv_width=3),
    ],
    ids=str,
)
def test_gla(config: GLAConfig) -> None:
    case = Case(config, functools.partial(gla_layer, heads=config.heads, temperature=config.temperature))
    after, expected = case.check(STARTS)
    chex.assert_trees_all_close(after.memory[0], expected["memory"], rtol=EXACT, atol=EXACT)
    case.check({5}, after, expected)


DELTA = {
    "gated": (GatedDeltaNetConfig(heads=2), {"keys": 3}),
    "gated-signed": (GatedDeltaNetConfig(heads=1, eigenvalues=Eigenvalues.SIGNED, chunk=4), {"keys": 6}),
    "plain": (
        GatedDeltaNetConfig(heads=2, decay=False, output_gate=False, expand_key=1.0, expand_value=1.0, conv_width=3),
        {"keys": 4},
    ),
    "grouped": (
        GatedDeltaNetConfig(heads=2, value_heads=6, key_size=3, value_size=5, norm_eps=1e-3),
        {"keys": 3, "heads": 6, "key_heads": 2, "eps": 1e-3},
    ),
    "grouped-expanded": (
        GatedDeltaNetConfig(heads=1, value_heads=2, expand_key=0.5, expand_value=2),
        {"keys": 4, "heads": 2, "key_heads": 1},
    ),
}


@pytest.mark.parametrize("name", DELTA)
def test_gated_deltanet(name: str) -> None:
    config, options = DELTA[name]
    largest = 2.0 if config.eigenvalues == Eigenvalues.SIGNED else 1.0
    oracle = functools.partial(gated_deltanet_layer, **{"heads": config.heads, "largest_beta": largest, **options})
    case = Case(config, oracle)
    after, expected = case.check(STARTS)
    chex.assert_trees_all_close(jnp.swapaxes(after.memory[0], 1, 2), expected["memory"], rtol=EXACT, atol=EXACT)
    chex.assert_trees_all_close(after.conv[0], expected["conv"], rtol=EXACT, atol=EXACT)
    case.check({5}, after, expected)
