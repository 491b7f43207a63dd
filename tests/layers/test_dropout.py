"""Dropout: its mean and variance, draws of their own for every place and step, and none without a key."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqmodels import params
from seqmodels.layers import MLPConfig, Stack
from seqmodels.layers.dropout import dropout
from seqmodels.models import ModelConfig
from seqmodels.typing import ChannelConfig, Context

WIDTH, RATE = 8, 0.3
SHAPE = (64, 50, WIDTH)
# Five standard deviations of a mean over the independent draws of SHAPE; their fourth moment makes variances as wide.
SPREAD = 5 * (RATE / (1 - RATE) / np.prod(SHAPE)) ** 0.5
# The same few products in programs that XLA fuses in other ways.
ROUNDING = 1e-5


def keyed(seed: int | None = 0, shape: tuple[int, ...] = SHAPE) -> Context:
    key = None if seed is None else jax.random.key(seed)
    return Context.whole(*shape[:2]).replace(key=key)


def draws(function: Any) -> int:
    """How many masks a function's program draws, loop bodies counted once."""
    program = str(jax.make_jaxpr(function)())
    masks = program.count("name=_bernoulli")
    assert ("random_bits" in program) == (masks > 0)
    return masks


@dataclasses.dataclass(frozen=True)
class Constant(ChannelConfig):
    """Adds 1, or with `drawing` a coin tossed with the layer's own key."""

    drawing: bool = False

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> nnx.Module:
        return One(self.drawing, rngs)


class One(nnx.Module):
    def __init__(self, drawing: bool, rngs: nnx.Rngs) -> None:
        init = jax.nn.initializers.ones
        self.one = params.param(rngs, (), init, group=params.Group.DYNAMICS, axes=())
        self.drawing = drawing

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> Any:
        return ()

    def __call__(self, x: Any, state: Any, context: Context) -> tuple[Any, Any, dict[str, Any]]:
        y = jnp.broadcast_to(self.one[...], x.shape)
        return y * jax.random.bernoulli(context.key, 1 - RATE, x.shape) if self.drawing else y, (), {}


def test_keeps_the_mean_and_scales_what_is_left() -> None:
    y = np.asarray(dropout(jnp.ones(SHAPE), RATE, keyed()), np.float64)
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - RATE)], rtol=1e-6)
    np.testing.assert_allclose(y.mean(), 1, atol=SPREAD)
    np.testing.assert_allclose(y.var(), RATE / (1 - RATE), atol=SPREAD)
    # along each axis on its own too: no row, time or feature shares its draw
    for axis in range(3):
        assert not np.array_equal(*np.moveaxis(y, axis, 0)[:2])


def test_takes_the_type_of_what_it_drops_and_nothing_of_what_is_not_finite() -> None:
    x = jnp.full(SHAPE, jnp.inf, jnp.bfloat16)
    y = dropout(x, RATE, keyed())
    assert y.dtype == jnp.bfloat16
    assert not jnp.isnan(y).any()


def test_without_a_key_or_a_rate_the_program_is_that_of_no_dropout() -> None:
    tokens = np.zeros((2, 4), int)
    layers = (((MLPConfig(expansion=1),), 2), ((MLPConfig(expansion=1),), 1))
    plain, dropping = (ModelConfig(5, WIDTH, layers, dropout=rate).make(rngs=nnx.Rngs(0)) for rate in (0.0, RATE))
    key = jax.random.key(0)
    assert draws(lambda: plain.forward(tokens, key=key)[0]) == 0
    assert draws(lambda: dropping.forward(tokens)[0]) == 0
    assert draws(lambda: dropping.forward(tokens, key=key)[0]) == 3  # the embedding, and each group's loop body
    program = lambda model: str(jax.make_jaxpr(lambda: model(tokens)[0])())
    assert program(plain) == program(dropping)
    x = jnp.ones(SHAPE)
    assert dropout(x, RATE, keyed(None)) is x
    assert dropout(x, 0.0, keyed()) is x


def test_every_layer_and_step_draws_its_own() -> None:
    stack = Stack(WIDTH, (((Constant(), Constant()), 2), ((Constant(),), 1)), rngs=nnx.Rngs(0), dropout=RATE)
    run = lambda seed: np.asarray(stack(jnp.zeros(SHAPE), None, keyed(seed))[0], np.float64)
    # A sum of five independent ones; two layers that shared a draw would add two more covariances.
    np.testing.assert_allclose(run(0).mean(), 5, atol=5 * SPREAD)
    np.testing.assert_allclose(run(0).var(), 5 * RATE / (1 - RATE), atol=10 * SPREAD)
    np.testing.assert_array_equal(run(0), run(0))
    np.testing.assert_allclose(np.cov(run(0).ravel(), run(1).ravel())[0, 1], 0, atol=10 * SPREAD)


def test_a_layer_that_draws_from_its_key_is_dropped_independently() -> None:
    stack = Stack(WIDTH, (((Constant(drawing=True),), 1),), rngs=nnx.Rngs(0), dropout=RATE)
    y = np.asarray(stack(jnp.zeros(SHAPE), None, keyed())[0], np.float64)
    np.testing.assert_allclose(y.mean(), 1 - RATE, atol=2 * SPREAD)  # 1 if both drew alike


def test_the_embedding_is_dropped_apart_from_the_layers() -> None:
    model = ModelConfig(2, WIDTH, (((Constant(),), 1),), dropout=RATE).make(rngs=nnx.Rngs(0))
    definition, arrays = params.split(model)
    model = params.merge(definition, {**arrays, "embedding": jnp.ones_like(arrays["embedding"])})
    model.norm = lambda x: x
    y = model.forward(np.zeros(SHAPE[:2], int), key=jax.random.key(0))[0]
    # 0, 1 or 2 of the two are left
    shares = [np.mean(np.isclose(y, count / (1 - RATE))) for count in range(3)]
    np.testing.assert_allclose(shares, [RATE**2, 2 * RATE * (1 - RATE), (1 - RATE) ** 2], atol=SPREAD)


def test_the_backward_pass_recomputes_the_same_draws() -> None:
    x, found = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, WIDTH)), jnp.float32), []
    for remat in (True, False):
        layers = (((MLPConfig(expansion=1), MLPConfig(expansion=1)), 2),)
        stack = Stack(WIDTH, layers, rngs=nnx.Rngs(0), remat=remat, dropout=0.5)
        definition, arrays = params.split(stack)
        loss = lambda arrays, definition=definition: jnp.sum(
            params.merge(definition, arrays)(x, None, keyed(shape=x.shape))[0] ** 2
        )
        found.append(jax.jit(jax.value_and_grad(loss))(arrays))
    chex.assert_trees_all_close(*found, rtol=ROUNDING, atol=ROUNDING)


def test_devices_along_a_sequence_axis_draw_apart() -> None:
    mesh = jax.make_mesh((8,), ("time",), axis_types=(AxisType.Auto,))

    def run(x: jax.Array, key: jax.Array) -> jax.Array:
        return dropout(x, RATE, Context.whole(*x.shape[:2]).replace(key=key, sequence_axis="time"))

    along = P(None, "time")
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(along, P()), out_specs=along))
    y = np.asarray(sharded(jnp.ones((8, 64, 8)), jax.random.key(0)))
    spans = {span.tobytes() for span in np.split(y, 8, axis=1)}
    assert len(spans) == 8


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_rates_outside_the_range_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"dropout is {rate}.*\[0, 1\)"):
        ModelConfig(5, WIDTH, (((MLPConfig(),), 1),), dropout=rate)
    with pytest.raises(ValueError, match="dropout is"):
        Stack(WIDTH, (((MLPConfig(),), 1),), rngs=nnx.Rngs(0), dropout=rate)
