"""Published models: as many parameters as their papers say, layers where they say, and they run."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import params
from seqmodels.layers import Block, MLPConfig
from seqmodels.layers.stack import configs_of
from seqmodels.mixers import AttentionConfig, MLSTMConfig, RGLRUConfig, SLSTMConfig
from seqmodels.models import ModelConfig
from seqmodels.models.published import GRIFFIN, griffin, hawk, runs, xlstm, xlstm_7b
from seqmodels.typing import Segments

GPT_NEOX, GEMMA = 50_304, 256_000  # vocabularies
MILLION = 10**6


def parameters(config: ModelConfig) -> int:
    """Without making them."""
    arrays = jax.eval_shape(lambda: params.split(config.make(rngs=nnx.Rngs(0)))[1])
    return sum(array.size for array in jax.tree.leaves(arrays))


@pytest.mark.parametrize(
    ("slstm_at", "published"),
    [((), 163.8), pytest.param((3, 20), 163.7, marks=pytest.mark.slow)],  # the papers' 125M class, in millions
)
def test_xlstm_has_the_published_parameters(slstm_at: tuple[int, ...], published: float) -> None:
    found = parameters(xlstm(24, 768, GPT_NEOX, slstm_at=slstm_at))
    assert round(found / MILLION, 1) == published


def test_xlstm_7b_has_the_published_parameters() -> None:
    assert parameters(xlstm_7b()) == 6_865_424_896


@pytest.mark.parametrize("size", ["100M", *(pytest.param(size, marks=pytest.mark.slow) for size in ("400M", "1.3B"))])
def test_griffin_has_about_the_parameters_of_its_name(size: str) -> None:
    """Embeddings left out. The names round, and some of them generously (89 M are called 100M)."""
    named = float(size[:-1]) * (1000 if size[-1] == "B" else 1)
    found = (parameters(griffin(size, GEMMA)) - GEMMA * GRIFFIN[size].width) / MILLION
    assert 0.85 * named < found < 1.05 * named


def test_patterns() -> None:
    kinds = lambda config: "".join({RGLRUConfig: "R", AttentionConfig: "A"}[type(m)] for m in configs_of(config.layers))
    layers = griffin("7B", GEMMA).layers
    assert [repeats for _, repeats in layers] == [10, 1]  # 32 layers: ten times R R A, then R R
    assert kinds(griffin("7B", GEMMA)) == "RRARR"
    assert kinds(hawk("100M", GEMMA)) == "R"
    assert hawk("100M", GEMMA).layers[0][1] == 12

    mixed = xlstm(8, 64, 11, slstm_at=[1, 2, 7])
    scalar, matrix = SLSTMConfig(), MLSTMConfig.original()
    block = Block(scalar, MLPConfig(hidden_size=128))  # 1.3 * 64, rounded up to a multiple of 64
    assert mixed.layers == (((matrix,), 1), ((block,), 2), ((matrix,), 4), ((block,), 1))
    (group,) = xlstm_7b().layers
    assert [(type(block), repeats) for block, repeats in zip(group[0], group[1:], strict=True)] == [(Block, 32)]
    assert runs([matrix, matrix]) == (((matrix,), 2),)


def small(config: ModelConfig) -> ModelConfig:
    """Griffin or Hawk with few channels: one recurrent layer, and Griffin's local one."""
    (pattern, _), *_ = config.layers
    unit = dataclasses.replace(pattern[0], recurrent_size=32)
    local = [dataclasses.replace(pattern[-1], heads=2, head_size=8, window=3)] if len(pattern) > 1 else []
    return dataclasses.replace(config, width=16, layers=(((unit, *local), 1),))


@pytest.mark.parametrize(
    "config",
    [
        xlstm(3, 16, 11, slstm_at=(1,), heads=2),
        xlstm_7b(2, 16, 11),
        small(griffin("100M", 11)),
        small(hawk("100M", 11)),
    ],
)
def test_small_ones_run_and_carry_their_state(config: ModelConfig) -> None:
    model = config.make(rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 11, (1, 8))
    fresh = model.init_state(1)
    run = jax.jit(lambda tokens, state: model(tokens, state, Segments.whole(1, tokens.shape[1], fresh=False)))
    logits, _ = run(tokens, fresh)
    first, state = run(tokens[:, :4], fresh)
    second, _ = run(tokens[:, 4:], state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), logits, atol=1e-5)  # float32, other sums
    cap = config.logits_cap or np.inf
    assert float(jnp.max(jnp.abs(logits))) < cap


def test_changes_reach_the_config() -> None:
    changed = griffin("100M", GEMMA, dtype="bfloat16", channel=MLPConfig(expansion=2))
    assert (changed.dtype, changed.channel) == ("bfloat16", MLPConfig(expansion=2))
    assert dataclasses.replace(changed, dtype="float32", channel=MLPConfig(bias=True)) == griffin("100M", GEMMA)


def test_errors_name_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no published size '2B'; choose one of 100M, .*14B"):
        griffin("2B", GEMMA)
    with pytest.raises(ValueError, match=r"slstm_at=\[3, 8\] names a place beyond the 8 blocks"):
        xlstm(8, 64, 11, slstm_at=(8, 3))
