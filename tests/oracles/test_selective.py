"""Mamba-1 and Mamba-3 against their oracles in float64: outputs, gradients, and states that are carried on."""

from __future__ import annotations

import functools

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.mixers import Mamba1Config, Mamba3Config
from tests.oracles.mamba1 import mamba1_block
from tests.oracles.mamba3 import mamba3_block
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


def test_mamba1_starts_as_published() -> None:
    mixer = Mamba1Config(state_size=3).make(32, layer=0, depth=2, rngs=nnx.Rngs(0))
    chex.assert_trees_all_close(np.exp(mixer.a_log[...]), np.broadcast_to([1.0, 2.0, 3.0], (64, 3)), rtol=1e-6)
    steps = np.log1p(np.exp(np.asarray(mixer.dt_bias[...])))
    assert 0.9e-3 < steps.min() < 5e-3
    assert 2e-2 < steps.max() < 0.11
    assert mixer.step.kernel[...].shape == (2, 64)  # rank ceil(32 / 16)
    for linear, size in ((mixer.input, 32), (mixer.select, 64), (mixer.step, 2)):  # uniform in +-1 / sqrt(fan-in)
        assert 0.9 * size**-0.5 < np.max(np.abs(linear.kernel[...])) <= size**-0.5


MAMBA3 = {
    "published": (Mamba3Config(head_size=4, state_size=6), {"angles": 1}),
    "grouped": (
        Mamba3Config(head_size=4, state_size=5, groups=2, rotated_fraction=1.0, decay_floor=0.8, chunk=4),
        {"angles": 2, "groups": 2, "floor": 0.8},
    ),
    "mimo": (Mamba3Config(head_size=8, state_size=4, rank=2, output_norm=True, step_range=(0.5, 2.0)), {"angles": 1}),
    "mimo-grouped": (
        Mamba3Config(head_size=4, state_size=2, groups=4, rank=3, rotated_fraction=1.0),
        {"angles": 1, "groups": 4},
    ),
}


@pytest.mark.parametrize("name", MAMBA3)
def test_mamba3(name: str) -> None:
    config, options = MAMBA3[name]
    case = Case(config, functools.partial(mamba3_block, **{"groups": 1, **options}))
    after, expected = case.check(STARTS)
    turns = after.turns[0] - expected["angle"] / (2 * np.pi)
    chex.assert_trees_all_close(turns, np.round(turns), rtol=0, atol=EXACT)
    found = (jnp.swapaxes(after.memory[0], 1, 2), after.key[0], after.value[0])
    chex.assert_trees_all_close(found, tuple(expected[name] for name in "hkv"), rtol=EXACT, atol=EXACT)
    case.check({5}, after, expected)
