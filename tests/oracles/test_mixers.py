"""Outputs, final states and gradients of every mixer against its oracle in float64, from the same parameters.

Every parameter is moved away from its initial value: with zero biases and unit scales an error could hide.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import params
from seqmodels.layers.positions import Positions
from seqmodels.mixers import AttentionConfig, Mamba2Config, MLSTMConfig, RGLRUConfig, SLSTMConfig
from seqmodels.typing import Context, MixerConfig, Segments
from tests import evidence
from tests.oracles.attention import attention
from tests.oracles.differences import check_gradient
from tests.oracles.mamba2 import mamba2_block
from tests.oracles.rg_lru import rg_lru_block
from tests.oracles.xlstm import mlstm_block, slstm_block

WIDTH, LENGTH = 8, 9
STARTS = {0, 1, 5}  # a document of one token, and two longer than the convolution
# float64 in another order of summation, through a few dozen terms.
EXACT = 1e-11

pytestmark = pytest.mark.usefixtures("x64")


def file_of(oracle: Callable[..., Any]) -> str:
    """Where an oracle stands, below the project's root."""
    function = oracle.func if isinstance(oracle, functools.partial) else oracle
    return function.__module__.replace(".", "/") + ".py"


class Case:
    """A mixer with float64 parameters, its oracle, and a loss that weighs every output."""

    def __init__(self, config: MixerConfig, oracle: Callable[..., Any]) -> None:
        random = np.random.default_rng(0)
        definition, arrays = params.split(config.make(WIDTH, layer=0, depth=2, rngs=nnx.Rngs(0)))
        move = lambda leaf: np.asarray(leaf, np.float64) + 0.1 * random.standard_normal(leaf.shape)
        self.arrays = jax.tree.map(move, arrays)
        self.x = random.standard_normal((LENGTH, WIDTH))
        self.weights = random.standard_normal((LENGTH, WIDTH))
        self.oracle = oracle
        self.record = functools.partial(evidence.record, type(config).__name__, file_of(oracle))
        self.mix = lambda arrays, x, state, context: params.merge(definition, arrays)(x[None], state, context)

    def check(self, starts: set[int], state: Any = None, oracle_state: Any = None) -> tuple[Any, Any]:
        """Compares outputs and gradients; returns the two final states, the oracle's as it comes."""
        start = np.isin(np.arange(LENGTH), list(starts))[None]
        context = Context(Segments(jnp.asarray(start), jnp.ones((1, LENGTH), bool)), jnp.zeros((1, LENGTH), int))

        def loss(arrays: Any, x: Any) -> Any:
            y, after = self.mix(arrays, x, state, context)
            return jnp.sum(y[0] * self.weights), (y[0], after)

        (_, (y, after)), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
            self.arrays, self.x
        )
        given = () if oracle_state is None else (oracle_state,)
        run = lambda point: self.oracle(point[1], point[0], starts, *given)
        expected = run((self.arrays, self.x))
        expected, expected_after = expected if isinstance(expected, tuple) else (expected, None)
        self.record(evidence.relative_error(y, expected))
        chex.assert_trees_all_close(np.asarray(y), expected, rtol=EXACT, atol=EXACT)

        def oracle_loss(point: Any) -> float:
            out = run(point)
            return float(np.sum((out[0] if isinstance(out, tuple) else out) * self.weights))

        check_gradient(oracle_loss, (self.arrays, self.x), gradients)
        return after, expected_after


@pytest.mark.parametrize("blocks", [1, 4])
def test_rg_lru(blocks: int) -> None:
    case = Case(RGLRUConfig(recurrent_size=12, blocks=blocks), rg_lru_block)
    after, expected = case.check(STARTS)
    chex.assert_trees_all_close(after.hidden[0], expected["hidden"], rtol=EXACT, atol=EXACT)
    chex.assert_trees_all_close(after.conv[0], expected["conv"], rtol=EXACT, atol=EXACT)
    assert int(after.length[0]) == LENGTH - max(STARTS)
    # The carried document is not new: its next token has the multiplier sqrt(1 - a^2).
    case.check({5}, after, expected)


@pytest.mark.parametrize(("groups", "conv_width"), [(1, 4), (2, 3)])
def test_mamba2(groups: int, conv_width: int) -> None:
    config = Mamba2Config(head_size=4, state_size=3, groups=groups, conv_width=conv_width)
    case = Case(config, functools.partial(mamba2_block, head_size=4, state_size=3, groups=groups))
    after, expected = case.check(STARTS)
    chex.assert_trees_all_close(jnp.swapaxes(after.ssm[0], 1, 2), expected["ssm"], rtol=EXACT, atol=EXACT)
    chex.assert_trees_all_close(after.conv[0], expected["conv"], rtol=EXACT, atol=EXACT)
    case.check({5}, after, expected)


def assert_cells(got: Any, expected: list[tuple[np.ndarray, ...]]) -> None:
    """The library's cells, one array a field, against the oracle's, one tuple a head."""
    for field, own in zip(got, zip(*expected, strict=True), strict=True):
        chex.assert_trees_all_close(field[0], np.stack(own), rtol=EXACT, atol=EXACT)


MLSTM = {
    "7B": MLSTMConfig(heads=2, gate_cap=1.5, input_bias=(0.0, 0.5), norm_eps=1e-3),
    "7B-keys-of-its-own": MLSTMConfig(heads=2, expansion=1.5, key_size=5, gate_cap=None, forget_bias=(-1.0, 1.0)),
    "original": MLSTMConfig.original(heads=2, block_size=2, conv_width=3),
}


@pytest.mark.parametrize("name", MLSTM)
def test_mlstm(name: str) -> None:
    config = MLSTM[name]
    oracle = functools.partial(mlstm_block, heads=config.heads, cap=config.gate_cap, eps=config.norm_eps)
    case = Case(config, oracle)
    after, expected = case.check(STARTS)
    memory = jnp.swapaxes(after.cell.memory, 2, 3)
    assert_cells(after.cell._replace(memory=memory), expected["cells"])
    if config.conv_width is not None:
        chex.assert_trees_all_close(after.conv[0], expected["conv"], rtol=EXACT, atol=EXACT)
    case.check({5}, after, expected)


def test_slstm() -> None:
    config = SLSTMConfig(heads=2, norm_eps=1e-3)
    case = Case(config, functools.partial(slstm_block, eps=config.norm_eps))
    after, expected = case.check(STARTS)
    assert_cells(after.cell, expected["cells"])
    chex.assert_trees_all_close(after.conv[0], expected["conv"], rtol=EXACT, atol=EXACT)
    case.check({5}, after, expected)


ATTENTION: dict[str, tuple[AttentionConfig, dict[str, Any]]] = {
    "rope": (AttentionConfig(heads=2), {"rope": (1e4, 1.0)}),
    "half-rope-window": (AttentionConfig(heads=2, window=3, rope_fraction=0.5), {"rope": (1e4, 0.5), "window": 3}),
    "nope-gqa": (AttentionConfig(heads=4, kv_heads=2, positions=Positions.NOPE), {}),
    "nope-mqa-cap": (AttentionConfig(heads=4, kv_heads=1, positions=Positions.NOPE, logits_cap=0.7), {"cap": 0.7}),
    "alibi": (
        AttentionConfig(heads=4, head_size=6, positions=Positions.ALIBI),
        {"slopes": [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]},
    ),
    "alibi-three-heads": (
        # Two heads' slopes, then every other slope of four heads (section 3 of the paper).
        AttentionConfig(heads=3, head_size=4, window=1 + 3, positions=Positions.ALIBI),
        {"slopes": [2.0**-4, 2.0**-8, 2.0**-2], "window": 4},
    ),
    "non-causal": (AttentionConfig(heads=2, causal=False), {"rope": (1e4, 1.0), "causal": False}),
    "window-of-one": (AttentionConfig(heads=1, window=1), {"rope": (1e4, 1.0), "window": 1}),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    config, options = ATTENTION[name]
    oracle = functools.partial(attention, heads=config.heads, kv_heads=config.kv_heads or config.heads, **options)
    Case(config, oracle).check(STARTS)
