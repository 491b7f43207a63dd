"""Attention with norms of queries and keys and an output gate, as Qwen3-Next has it, against its oracle in float64."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import params
from seqmodels.layers import NormConfig
from seqmodels.mixers import AttentionConfig
from seqmodels.typing import Context
from tests.oracles.attention import attention
from tests.oracles.test_mixers import STARTS, WIDTH, Case

pytestmark = pytest.mark.usefixtures("x64")

# An eps large enough that a norm which left it out, or took another one, would be seen.
CENTRED = NormConfig(eps=1e-2, zero_centred=True)
CASES: dict[str, tuple[AttentionConfig, dict[str, Any]]] = {
    "qwen3-next": (
        AttentionConfig(heads=4, kv_heads=2, head_size=6, rope_fraction=0.34, query_key_norm=CENTRED, output_gate=True),
        {"rope": (1e4, 0.34), "eps": 1e-2},
    ),
    "norms-alone-window": (
        AttentionConfig(heads=2, window=3, rope_base=100.0, query_key_norm=CENTRED),
        {"rope": (100.0, 1.0), "window": 3, "eps": 1e-2},
    ),
    "gate-alone": (AttentionConfig(heads=2, output_gate=True), {"rope": (1e4, 1.0)}),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str) -> None:
    config, options = CASES[name]
    oracle = functools.partial(attention, heads=config.heads, kv_heads=config.kv_heads or config.heads, **options)
    Case(config, oracle).check(STARTS)


def test_a_cache_holds_normed_keys() -> None:
    """Two calls give what one does."""
    config = CASES["qwen3-next"][0]
    mixer = config.make(WIDTH, layer=0, depth=2, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((1, 7, WIDTH))
    whole, _ = mixer(x, None, Context.whole(1, 7))
    first, state = mixer(x[:, :4], mixer.init_state(1, 7, jnp.float64), Context.whole(1, 4))
    second, _ = mixer(x[:, 4:], state, Context.whole(1, 3, fresh=False, offset=4))
    # float64 through one attention.
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, rtol=0, atol=1e-12)


def test_defaults_have_neither_norms_nor_a_gate() -> None:
    arrays = params.split(AttentionConfig(heads=2).make(WIDTH, layer=0, depth=2, rngs=nnx.Rngs(0)))[1]
    assert set(arrays) == {"query", "key", "value", "out"}
