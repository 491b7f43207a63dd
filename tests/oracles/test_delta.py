"""DeltaNet, DeltaProduct, KDA and log-linear Mamba-2 against their oracles in float64: outputs, gradients, states."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax.numpy as jnp
import pytest

from seqmodels.mixers import DeltaNetConfig, DeltaProductConfig, Eigenvalues, KDAConfig, LogLinearMamba2Config
from seqmodels.typing import MixerConfig
from tests.oracles.deltanet import deltanet_layer
from tests.oracles.deltaproduct import deltaproduct_layer
from tests.oracles.kda import kda_layer
from tests.oracles.log_linear import log_linear_mamba2_block
from tests.oracles.test_mixers import EXACT, STARTS, Case

pytestmark = pytest.mark.usefixtures("x64")


CASES: dict[str, tuple[MixerConfig, Callable[..., Any], dict[str, Any]]] = {
    "deltanet": (DeltaNetConfig(heads=2), deltanet_layer, {"heads": 2, "keys": 4}),
    "deltanet-signed": (
        DeltaNetConfig(heads=1, expand_key=0.5, expand_value=2, eigenvalues=Eigenvalues.SIGNED, norm_eps=1e-3, chunk=4),
        deltanet_layer,
        {"heads": 1, "keys": 4, "largest_beta": 2.0, "eps": 1e-3},
    ),
    "deltaproduct": (
        DeltaProductConfig(householders=3, heads=2, output_gate=False, chunk=7),  # chunks end inside a token
        deltaproduct_layer,
        {"heads": 2, "keys": 3, "steps": 3},
    ),
    "deltaproduct-gated": (
        DeltaProductConfig(householders=2, heads=1, decay=True, eigenvalues=Eigenvalues.POSITIVE),
        deltaproduct_layer,
        {"heads": 1, "keys": 6, "steps": 2, "largest_beta": 1.0},
    ),
    "kda": (KDAConfig(heads=2), kda_layer, {"heads": 2}),
    "kda-signed": (
        KDAConfig(heads=1, expand_key=0.5, gate_rank=3, eigenvalues=Eigenvalues.SIGNED, norm_eps=1e-3, chunk=4),
        kda_layer,
        {"heads": 1, "largest_beta": 2.0, "eps": 1e-3},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layer(name: str) -> None:
    config, oracle, options = CASES[name]
    case = Case(config, functools.partial(oracle, **options))
    after, expected = case.check(STARTS)
    chex.assert_trees_all_close(after.memory[0], expected["memory"], rtol=EXACT, atol=EXACT)
    chex.assert_trees_all_close(after.conv[0], expected["conv"], rtol=EXACT, atol=EXACT)
    case.check({5}, after, expected)


@pytest.mark.parametrize(("groups", "chunk"), [(1, None), (2, 4)])
def test_log_linear_mamba2(groups: int, chunk: int | None) -> None:
    """Documents begin anywhere in a row and in a chunk; the carried one goes on inside its blocks."""
    sizes = {"head_size": 4, "state_size": 3, "groups": groups}
    config = LogLinearMamba2Config(**sizes, levels=5, chunk=chunk)
    case = Case(config, functools.partial(log_linear_mamba2_block, **sizes))
    after, expected = case.check({0, 1})
    for starts in ({6}, {1, 4}):
        close = functools.partial(chex.assert_trees_all_close, rtol=EXACT, atol=EXACT)
        close(jnp.swapaxes(after.memory[0], 2, 3), expected["memory"])
        close(after.conv[0], expected["conv"])
        assert int(after.length[0]) == len(expected["history"])
        after, expected = case.check(starts, after, expected)
