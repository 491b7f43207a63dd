"""A mixture of experts against a loop over tokens, its losses against their formula, alone and on a mesh."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import ModelConfig, params
from seqmodels.layers import Activation, MoEConfig
from seqmodels.layers.moe import _blocks
from seqmodels.typing import Context
from tests import evidence
from tests.oracles.differences import check_gradient
from tests.oracles.moe import mixture_of_experts
from tests.train.test_mesh import assert_mesh_equals_one_device

WIDTH, BATCH, LENGTH = 6, 2, 7
# float64 in another order of summation, through a few dozen terms.
EXACT = 1e-12
# float32 sums of a few dozen terms in another order.
ROUNDING = 1e-5

exact = pytest.mark.usefixtures("x64")


def made(config: MoEConfig, dtype: Any = np.float64) -> tuple[params.Definition, dict[str, Any]]:
    """A layer whose router prefers some experts to others."""
    random = np.random.default_rng(0)
    definition, arrays = params.split(config.make(WIDTH, layer=0, depth=2, rngs=nnx.Rngs(0)))
    move = lambda leaf: (np.asarray(leaf, np.float64) + 0.3 * random.standard_normal(leaf.shape)).astype(dtype)
    return definition, jax.tree.map(move, arrays)


def padded(batch: int = BATCH, length: int = LENGTH) -> tuple[Context, np.ndarray]:
    """The end of the second row is padding."""
    valid = np.ones((batch, length), bool)
    valid[1:, length - 2 :] = False
    context = Context.whole(batch, length)
    return context.replace(segments=context.segments._replace(valid=jnp.asarray(valid))), valid


CASES = {
    "qwen": MoEConfig(experts=5, top_k=3, hidden_size=4, shared_hidden_size=3),
    "switch": MoEConfig(experts=4, top_k=1, hidden_size=5, renormalise=False, gated=False, activation=Activation.GELU),
    "all-experts": MoEConfig(experts=3, top_k=3, hidden_size=4, renormalise=False, router_z=0.1),
    "shared-ungated": MoEConfig(
        experts=12, top_k=2, hidden_size=4, shared_hidden_size=5, shared_gate=False, activation=Activation.RELU_SQUARED
    ),
    "one-expert": MoEConfig(experts=1, top_k=1, hidden_size=4, balance=0.0),
}


@exact
@pytest.mark.parametrize("name", CASES)
def test_values_losses_and_gradients_equal_a_loop_over_tokens(name: str) -> None:
    config = CASES[name]
    definition, arrays = made(config)
    context, valid = padded()
    random = np.random.default_rng(1)
    x, weights = random.standard_normal((2, BATCH, LENGTH, WIDTH))
    weights *= valid[..., None]

    def loss(arrays: Any, x: Any) -> Any:
        y, _, aux = params.merge(definition, arrays)(x, (), context)
        return jnp.sum(y * weights) + sum(aux.values()), (y, aux)

    (_, (y, aux)), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(arrays, x)
    expected, losses = mixture_of_experts(x, arrays, valid, config)
    evidence.record("MoEConfig", "tests/oracles/moe.py", evidence.relative_error(np.asarray(y)[valid], expected[valid]))
    chex.assert_trees_all_close(np.asarray(y)[valid], expected[valid], rtol=EXACT, atol=EXACT)
    assert set(aux) == {key for key, value in losses.items() if value}
    chex.assert_trees_all_close(dict(aux), {key: losses[key] for key in aux}, rtol=EXACT)

    def oracle_loss(point: Any) -> float:
        y, losses = mixture_of_experts(point[1], point[0], valid, config)
        return float(np.sum(y * weights) + sum(losses.values()))

    check_gradient(oracle_loss, (arrays, x), gradients)


def test_padding_may_hold_nan() -> None:
    config = CASES["qwen"]
    definition, arrays = made(config, np.float32)
    context, valid = padded()
    x = np.random.default_rng(1).standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)

    @jax.jit
    def run(x: Any) -> Any:
        def loss(arrays: Any, x: Any) -> Any:
            y, _, aux = params.merge(definition, arrays)(x, (), context)
            return jnp.sum(jnp.sin(y), where=valid[..., None]) + sum(aux.values())

        return jax.value_and_grad(loss, argnums=(0, 1))(arrays, x)

    clean, poisoned = (run(np.where(valid[..., None], x, fill).astype(np.float32)) for fill in (7.0, np.nan))
    chex.assert_trees_all_equal(clean, poisoned)
    chex.assert_tree_all_finite(poisoned)


@pytest.mark.parametrize("length", [1, 2, 3, 50])
def test_any_number_of_tokens(length: int) -> None:
    """A layer of many experts decodes one token, and what a token gets does not depend on the others."""
    config = MoEConfig(experts=16, top_k=3, hidden_size=4)
    definition, arrays = made(config, np.float32)
    moe = params.merge(definition, arrays)
    x = np.random.default_rng(2).standard_normal((2, 50, WIDTH)).astype(np.float32)
    expected, _ = mixture_of_experts(x[:, :length].astype(np.float64), arrays, np.ones((2, length), bool), config)
    y = jax.jit(lambda x: moe(x, (), Context.whole(*x.shape[:2]))[0])(x[:, :length])
    chex.assert_trees_all_close(y, expected.astype(np.float32), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("count", [1, 5, 64, 200])
@pytest.mark.parametrize("routing", ["random", "one", "rare"])
def test_every_assignment_has_a_row_of_its_own_in_a_block_of_its_expert(count: int, routing: str) -> None:
    experts, random = 8, np.random.default_rng(count)
    chosen = {
        "random": random.integers(0, experts, count),
        "one": np.full(count, 5),
        "rare": np.where(np.arange(count) < experts, np.arange(count) % experts, 3),
    }[routing]
    blocks = _blocks(jnp.asarray(chosen), experts)
    row = np.asarray(blocks.row)
    assert len(set(row.tolist())) == count
    np.testing.assert_array_equal(np.asarray(blocks.expert)[row // blocks.size], chosen)
    assert blocks.expert.shape[0] * blocks.size <= 1.5 * count


def test_uniform_routing_has_the_least_balance_loss() -> None:
    """Its value is the coefficient times top_k; it grows where the tokens crowd, and its gradient spreads them."""
    config = MoEConfig(experts=4, top_k=1, hidden_size=4, balance=0.5)
    definition, arrays = made(config, np.float32)
    corners = np.eye(4, WIDTH, dtype=np.float32)[np.arange(BATCH * 8) % 4].reshape(BATCH, 8, WIDTH)

    @jax.jit
    def loss(strength: Any) -> Any:
        router = jnp.eye(WIDTH, 4) + jnp.zeros((WIDTH, 4)).at[:4, 0].set(strength)
        changed = {**arrays, "router": {"kernel": router}}
        return params.merge(definition, changed)(corners, (), Context.whole(BATCH, 8))[2]["balance"]

    np.testing.assert_allclose(loss(0.0), 0.5, rtol=ROUNDING)
    assert loss(3.0) > 0.9
    assert jax.grad(loss)(3.0) > 0.01
    every = MoEConfig(experts=4, top_k=4, hidden_size=4, balance=0.5)
    aux = every.make(WIDTH, layer=0, depth=2, rngs=nnx.Rngs(0))(corners, (), Context.whole(BATCH, 8))[2]
    np.testing.assert_allclose(aux["balance"], 4 * 0.5, rtol=ROUNDING)


def test_a_router_is_float32_in_a_bfloat16_model() -> None:
    """In bfloat16 the logits of these two experts would be equal, and the first would be chosen."""
    config = MoEConfig(experts=2, top_k=1, hidden_size=4, renormalise=False)
    definition, arrays = made(config, np.float32)
    router = np.zeros((WIDTH, 2), np.float32)
    router[0] = 1.0, 1.001
    arrays = {**arrays, "router": {"kernel": router}}
    x = jnp.ones((1, 1, WIDTH), jnp.bfloat16)
    y, _, aux = params.merge(definition, arrays)(x, (), Context.whole(1, 1))
    expected, _ = mixture_of_experts(np.ones((1, 1, WIDTH)), arrays, np.ones((1, 1), bool), config)
    # Two bfloat16 products of a few terms of size one.
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, rtol=0.03, atol=0.03)
    assert (y.dtype, aux["balance"].dtype) == (jnp.bfloat16, jnp.float32)


def test_losses_are_over_the_tokens_of_all_devices() -> None:
    """Loss and gradients on eight devices are those of one; losses of a device's own tokens would differ."""
    moe = MoEConfig(experts=4, top_k=2, hidden_size=8, shared_hidden_size=8, balance=1.0, router_z=0.1)
    assert_mesh_equals_one_device(ModelConfig(32, 64, (((moe,), 2),)), (2, 2, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k=0 of experts=8"),
        ({"top_k": 9}, "top_k=9 of experts=8"),
        ({"expansion": 0.0}, "expansion must be positive"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"shared_hidden_size": -1}, "shared_hidden_size must be at least 1"),
        ({"balance": -0.1}, "balance is the coefficient"),
        ({"router_z": float("nan")}, "router_z is the coefficient"),
        ({"activation": "tanh"}, "unknown activation 'tanh'"),
    ],
)
def test_errors_of_the_config(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(**changes)
