"""RWKV-4, RWKV-6 and RWKV-7 against their oracles in float64: time mixes, channel mixes, states, values of layer 0."""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp
import pytest

from seqmodels.layers import RWKVChannelConfig
from seqmodels.mixers import RWKV4Config
from tests.oracles.rwkv import channel_mix, rwkv4_time_mix
from tests.oracles.test_mixers import EXACT, STARTS, Case

pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")


def true_sums(average: Any) -> tuple[Any, Any]:
    scale = jnp.exp(average.log_max[0])
    return scale * average.numerator[0], scale * average.denominator[0]


@pytest.mark.parametrize("config", [RWKV4Config(), RWKV4Config(recurrent_size=12, method="chunked", chunk=4)])
def test_rwkv4(config: RWKV4Config) -> None:
    case = Case(config, rwkv4_time_mix)
    after, expected = case.check(STARTS)
    chex.assert_trees_all_close(
        (after.last[0], *true_sums(after.average)), tuple(expected.values()), rtol=EXACT, atol=EXACT
    )
    case.check({5}, after, expected)


@pytest.mark.parametrize(("version", "hidden_size"), [(4, None), (6, 11), (7, None)])
def test_channel_mix(version: int, hidden_size: int | None) -> None:
    case = Case(RWKVChannelConfig(version, hidden_size), channel_mix)
    layer = case.mix
    case.mix = lambda *inputs: layer(*inputs)[:2]  # a channel layer reports scalars besides
    after, expected = case.check(STARTS)
    chex.assert_trees_all_close(after.last[0], expected["last"], rtol=EXACT, atol=EXACT)
    case.check({5}, after, expected)
