"""DeltaNet, DeltaProduct and KDA against their oracles in float64: outputs, gradients, states that are carried on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import pytest

from seqmodels.mixers import DeltaNetConfig, DeltaProductConfig, Eigenvalues, KDAConfig
from seqmodels.typing import MixerConfig
from tests.oracles.deltaproduct import deltaproduct_layer
from tests.oracles.gated_deltanet import gated_deltanet_layer
from tests.oracles.kda import kda_layer
from tests.oracles.test_mixers import EXACT, STARTS, Case

pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")


def deltanet_layer(*args: Any, **options: Any) -> Any:
    """The oracle that Gated DeltaNet has, with the memory as the library keeps it."""
    if len(args) == 4:
        args = (*args[:3], {**args[3], "memory": args[3]["memory"].swapaxes(1, 2)})
    y, state = gated_deltanet_layer(*args, **options)
    return y, {**state, "memory": state["memory"].swapaxes(1, 2)}


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
