"""Mamba-1 and Mamba-3 against their oracles in float64, and what every Mamba starts with."""

from __future__ import annotations

import functools

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.mixers import LogLinearMamba2Config, Mamba1Config, Mamba2Config, Mamba3Config
from tests.oracles.mamba1 import mamba1_block
from tests.oracles.mamba3 import mamba3_block
from tests.oracles.test_mixers import EXACT, STARTS, Case

pytestmark = pytest.mark.usefixtures("x64")

MAMBA1 = {
    "published": Mamba1Config(state_size=3),
    "biases": Mamba1Config(state_size=2, inner_size=5, dt_rank=3, conv_width=2, conv_bias=False, bias=True),
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


DEPTH = 4
STARTS_AS = {
    "mamba1": Mamba1Config(state_size=3),
    "mamba2": Mamba2Config(head_size=2, state_size=8),
    "mamba3": Mamba3Config(head_size=2, state_size=8, rank=2),
    "log_linear": LogLinearMamba2Config(head_size=2, state_size=8, levels=2),
}


@pytest.mark.parametrize("name", STARTS_AS)
def test_linear_maps_start_as_published(name: str) -> None:
    """torch's default, uniform in +-1/sqrt(fan-in), the last one also divided by sqrt(layers)."""
    mixer = STARTS_AS[name].make(32, layer=0, depth=DEPTH, rngs=nnx.Rngs(0))
    bounds = {"input": (32, 1), "out": (64, DEPTH), "conv": (4, 1), "select": (64, 1), "step": (2, 1)}
    found = [part for part in bounds if hasattr(mixer, part)]
    assert found[:2] == ["input", "out"]
    for part in found:
        size, layers = bounds[part]
        bound = (size * layers) ** -0.5
        kernel = np.asarray(getattr(mixer, part).kernel[...])
        assert 0.97 * bound < np.max(np.abs(kernel)) <= bound * (1 + 1e-6), part
        assert np.std(kernel) == pytest.approx(bound / 3**0.5, rel=0.1), part


@pytest.mark.parametrize("name", STARTS_AS)
def test_steps_and_decays_start_as_published(name: str) -> None:
    mixer = STARTS_AS[name].make(128, layer=0, depth=DEPTH, rngs=nnx.Rngs(0))
    steps = np.log1p(np.exp(np.asarray(mixer.dt_bias[...])))
    assert 0.99e-3 < steps.min() < 2e-3
    assert 5e-2 < steps.max() < 0.101
    assert np.mean(np.log(steps)) == pytest.approx(np.log(1e-2), abs=0.5)  # in the middle of the logarithms
    assert (np.asarray(mixer.skip[...]) == 1).all()
    if name in ("mamba2", "log_linear"):
        rates = np.exp(np.asarray(mixer.a_log[...]))
        assert 1 <= rates.min() < 2 < 15 < rates.max() <= 16
        assert np.mean(rates) == pytest.approx(8.5, abs=1.5)  # uniform, their logarithms are not


def test_what_else_mamba_starts_with() -> None:
    mamba1 = STARTS_AS["mamba1"].make(32, layer=0, depth=DEPTH, rngs=nnx.Rngs(0))
    chex.assert_trees_all_close(np.exp(mamba1.a_log[...]), np.broadcast_to([1.0, 2.0, 3.0], (64, 3)), rtol=1e-6)
    assert mamba1.step.kernel[...].shape == (2, 64)  # rank ceil(32 / 16)
    mamba3 = STARTS_AS["mamba3"].make(32, layer=0, depth=DEPTH, rngs=nnx.Rngs(0))
    starts = {"bias_b": 1, "bias_c": 1, "copies_x": 0.5, "copies_z": 1, "copies_y": 0.5}
    for name, value in starts.items():
        assert (np.asarray(getattr(mamba3, name)[...]) == value).all(), name
    log_linear = STARTS_AS["log_linear"].make(32, layer=0, depth=DEPTH, rngs=nnx.Rngs(0))
    assert (np.asarray(log_linear.level[...]) == 1).all()


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
