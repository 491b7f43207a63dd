from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.layers import BlockDiagonalLinear, LayerNorm, Linear, MLPConfig, NormConfig, RMSNorm
from seqmodels.typing import Context

# A few float32 roundings in sums of at most 64 terms.
ROUNDING = 1e-5


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_linear_is_a_matrix_product_in_the_type_of_its_input() -> None:
    linear = Linear(6, 4, rngs=nnx.Rngs(0), bias=True)
    linear.bias[...] = jnp.arange(4.0)
    x = normal(0, 2, 3, 6)
    expected = x @ np.asarray(linear.kernel[...]) + np.arange(4.0)
    chex.assert_trees_all_close(linear(x), expected, rtol=ROUNDING, atol=ROUNDING)
    assert linear(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert linear.kernel[...].dtype == jnp.float32


def test_block_diagonal_linear_equals_its_dense_matrix() -> None:
    linear = BlockDiagonalLinear(6, 3, rngs=nnx.Rngs(0))
    linear.bias[...] = jnp.arange(6.0)
    dense = np.zeros((6, 6))
    for block in range(3):
        span = slice(2 * block, 2 * block + 2)
        dense[span, span] = linear.kernel[...][block]
    x = normal(1, 2, 6)
    chex.assert_trees_all_close(linear(x), x @ dense + np.arange(6.0), rtol=ROUNDING, atol=ROUNDING)
    with pytest.raises(ValueError, match="6 does not divide into 4"):
        BlockDiagonalLinear(6, 4, rngs=nnx.Rngs(0))


def test_block_diagonal_weights_have_the_variance_of_their_own_block() -> None:
    kernel = BlockDiagonalLinear(256, 4, rngs=nnx.Rngs(0)).kernel[...]
    # 16,384 draws: the standard deviation is known to one part in 180.
    np.testing.assert_allclose(np.std(kernel), 64**-0.5, rtol=0.03)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norms(kind: type) -> None:
    norm = kind(8, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.arange(1.0, 9.0)
    x = 3 + 2 * normal(2, 5, 8)
    if kind is LayerNorm:
        norm.bias[...] = jnp.arange(8.0)
        expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        expected = expected * np.arange(1.0, 9.0) + np.arange(8.0)
    else:
        expected = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-6) * np.arange(1.0, 9.0)
    chex.assert_trees_all_close(norm(x), expected, rtol=ROUNDING, atol=ROUNDING)


def test_norms_by_config() -> None:
    x = normal(2, 5, 8)
    centred = NormConfig(eps=1e-3, zero_centred=True).make(8, rngs=nnx.Rngs(0))
    unit = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-3)
    chex.assert_trees_all_close(centred(x), unit, rtol=ROUNDING, atol=ROUNDING)
    centred.scale[...] = jnp.arange(8.0)
    chex.assert_trees_all_close(centred(x), unit * np.arange(1.0, 9.0), rtol=ROUNDING, atol=ROUNDING)
    plain = NormConfig("layer", eps=1e-3, bias=False).make(8, rngs=nnx.Rngs(0))
    assert plain.bias is None
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-3)
    chex.assert_trees_all_close(plain(x), expected, rtol=ROUNDING, atol=ROUNDING)
    with pytest.raises(ValueError, match=r"unknown norm 'batch'.*rms"):
        NormConfig("batch")
    with pytest.raises(ValueError, match="zero_centred belongs to kind='rms'"):
        NormConfig("layer", zero_centred=True)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norms_of_bfloat16_are_computed_in_float32(kind: type) -> None:
    x = jnp.asarray(normal(3, 4096) + 8, jnp.bfloat16)
    norm = kind(4096, rngs=nnx.Rngs(0))
    found = norm(x)
    assert found.dtype == jnp.bfloat16
    # The output is rounded once, to 8 bits; sums in bfloat16 would be off by several percent.
    expected = norm(x.astype(jnp.float32))
    chex.assert_trees_all_close(found.astype(jnp.float32), expected, rtol=2.0**-8, atol=2.0**-8)


@pytest.mark.parametrize(("activation", "gated"), [("gelu", True), ("silu", True), ("relu_squared", False)])
def test_mlp(activation: str, gated: bool) -> None:
    mlp = MLPConfig(expansion=1.9, activation=activation, gated=gated).make(8, layer=0, depth=1, rngs=nnx.Rngs(0))
    acts = {
        "gelu": lambda a: 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))),
        "silu": lambda a: a / (1 + np.exp(-a)),
        "relu_squared": lambda a: np.maximum(a, 0) ** 2,
    }
    x = normal(4, 2, 3, 8)
    up, down = np.asarray(mlp.up.kernel[...]), np.asarray(mlp.down.kernel[...])
    assert up.shape == (8, 16)  # 15.2, rounded up to a multiple of 8
    act = acts[activation]
    hidden = act(x @ np.asarray(mlp.gate.kernel[...])) * (x @ up) if gated else act(x @ up)
    y, state, aux = mlp(x, None, Context.whole(2, 3))
    chex.assert_trees_all_close(y, hidden @ down, rtol=ROUNDING, atol=ROUNDING)
    assert state == mlp.init_state(2) == ()
    assert aux == {}
    exact = MLPConfig(expansion=1.9, hidden_size=15).make(8, layer=0, depth=1, rngs=nnx.Rngs(0))
    assert exact.up.kernel[...].shape == (8, 15)


def test_mlp_keeps_nan_in_padding_away_from_gradients() -> None:
    mlp = MLPConfig().make(8, layer=0, depth=1, rngs=nnx.Rngs(0))
    context = Context.whole(1, 3)
    valid = jnp.asarray([[True, True, False]])
    context = context.replace(segments=context.segments._replace(valid=valid))
    x = jnp.asarray(normal(5, 1, 3, 8)).at[:, 2].set(jnp.nan)
    y, pull = jax.vjp(lambda x: mlp(x, None, context)[0], x)
    chex.assert_tree_all_finite((y, pull(jnp.ones_like(y))))


def test_errors_name_the_value_and_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'tanh'.*gelu.*silu"):
        MLPConfig(activation="tanh")
    with pytest.raises(ValueError, match="expansion must be positive, not 0"):
        MLPConfig(expansion=0)
