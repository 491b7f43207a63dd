"""Transformer-PSM against its oracle in float64: from no state by the static tree, from a state token by token."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import params
from seqmodels.layers import MLPConfig
from seqmodels.layers.stack import Block
from seqmodels.mixers import AttentionConfig, PrefixScan
from seqmodels.typing import Context, Segments
from tests import evidence
from tests.oracles.differences import check_gradient
from tests.oracles.psm import psm

WIDTH, CHUNK, HEADS = 4, 2, 2
LENGTH = 17
STARTS = {0, 14}  # seven whole chunks (one block of four, one of two, one of one), then one and a half
# float64 in another order of summation, through a few hundred terms.
EXACT = 1e-11

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("causal_aggregator", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_psm(causal_aggregator: bool) -> None:
    """Outputs of both ways, and the gradient to every parameter and the input."""
    random = np.random.default_rng(0)
    pair = (((Block(AttentionConfig(heads=HEADS), MLPConfig(expansion=2, gated=False)),), 1),)
    config = PrefixScan(pair, pair, CHUNK, causal_aggregator=causal_aggregator)
    mixer = config.make(WIDTH, layer=0, depth=1, rngs=nnx.Rngs(0))
    definition, arrays = params.split(mixer)
    arrays = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) + 0.1 * random.standard_normal(leaf.shape), arrays)
    x, weights = (random.standard_normal((LENGTH, WIDTH)) for _ in range(2))
    segments = Segments(np.isin(np.arange(LENGTH), list(STARTS))[None], np.ones((1, LENGTH), bool))
    oracle = lambda x, arrays: psm(x, arrays, STARTS, chunk=CHUNK, heads=HEADS, causal_aggregator=causal_aggregator)

    def loss(arrays: Any, x: Any, state: Any) -> Any:
        context = Context(segments, segments.positions()[0])
        y, _ = params.merge(definition, arrays)(x[None], state, context)
        return jnp.sum(y[0] * weights), y[0]

    expected = oracle(x, arrays)
    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(arrays, x, None)
    evidence.record("PrefixScan", "tests/oracles/psm.py", evidence.relative_error(y, expected))
    chex.assert_trees_all_close(np.asarray(y), expected, rtol=EXACT, atol=EXACT)
    _, streamed = jax.jit(loss)(arrays, x, mixer.init_state(1, LENGTH, jnp.float64))
    chex.assert_trees_all_close(np.asarray(streamed), expected, rtol=EXACT, atol=EXACT)
    if not causal_aggregator:
        check_gradient(lambda point: float(np.sum(oracle(point[1], point[0]) * weights)), (arrays, x), gradients)
