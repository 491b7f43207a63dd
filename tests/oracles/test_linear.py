"""Linear attention, RetNet, gated RFA and HGRN2 against their oracles in float64: outputs, gradients, states."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import params
from seqmodels.layers import Stack
from seqmodels.layers.across import ACROSS
from seqmodels.mixers import FeatureMap, GatedRFAConfig, HGRN2Config, LinearAttentionConfig, RetNetConfig
from seqmodels.mixers.hgrn2 import bounded_gate, lower_bounds
from seqmodels.typing import Context
from tests.oracles import linear_attention as oracles
from tests.oracles.differences import check_gradient
from tests.oracles.test_mixers import EXACT, LENGTH, STARTS, WIDTH, Case

# A few float32 operations, none of which loses digits.
FLOAT32 = 2e-6

pytestmark = pytest.mark.usefixtures("x64")

same = functools.partial(chex.assert_trees_all_close, rtol=EXACT, atol=EXACT)


def first_row(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tuple(tree))


LINEAR = {
    "elu": LinearAttentionConfig(heads=2),
    "relu": LinearAttentionConfig(heads=1, features=FeatureMap.RELU, chunk=4, norm_eps=0.5),
    "without-normaliser": LinearAttentionConfig(heads=2, normaliser=False, expand_value=2.0),
    "identity": LinearAttentionConfig(heads=2, features=FeatureMap.IDENTITY, normaliser=False, norm_eps=1e-2),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_attention(name: str) -> None:
    config = LINEAR[name]
    options = {
        "heads": config.heads,
        "features": config.features,
        "normaliser": config.normaliser,
        "eps": config.norm_eps,
    }
    case = Case(config, functools.partial(oracles.linear_attention_layer, **options))
    after, expected = case.check(STARTS)
    same(after.memory[0], expected[0])
    if config.normaliser:
        same(after.normaliser[0], expected[1])
    case.check({5}, after, expected)


@pytest.mark.parametrize(
    "config", [RetNetConfig(heads=2), RetNetConfig(heads=1, expand_value=1.0, rope_base=50.0, norm_eps=1e-2, chunk=4)]
)
def test_retnet(config: RetNetConfig) -> None:
    oracle = functools.partial(oracles.retnet_layer, heads=config.heads, base=config.rope_base, eps=config.norm_eps)
    case = Case(config, oracle)
    mix, seen = case.mix, 0

    def positioned(arrays: Any, x: Any, state: Any, context: Context) -> Any:
        return mix(arrays, x, state, context.replace(positions=context.segments.positions(seen)[0]))

    case.mix = positioned
    after, expected = case.check(STARTS)
    same(after.memory[0], expected[0])
    seen = expected[1]
    assert seen == LENGTH - max(STARTS)
    case.check({7}, after, expected)


def test_the_rotation_of_retnet_depends_on_distances_alone() -> None:
    """The paper's eq. 3: n tokens further on, every output is the same."""
    mixer = RetNetConfig(heads=2).make(WIDTH, layer=0, depth=1, rngs=nnx.Rngs(0))
    x, context = np.random.default_rng(0).standard_normal((1, LENGTH, WIDTH)), Context.whole(1, LENGTH)
    run = jax.jit(lambda positions: mixer(x, None, context.replace(positions=positions))[0])
    y = run(context.positions)
    chex.assert_trees_all_close(run(context.positions + 1000), y, rtol=1e-9, atol=1e-9)  # angles lose three digits
    assert np.max(np.abs(run(0 * context.positions) - y)) > 1e-3


@pytest.mark.parametrize(
    "config", [GatedRFAConfig(heads=2, features=5), GatedRFAConfig(heads=1, features=3, norm_eps=0.3)]
)
def test_gated_rfa(config: GatedRFAConfig) -> None:
    size = WIDTH // config.heads
    directions = np.random.default_rng(config.seed).standard_normal((config.heads, config.features, size))
    case = Case(config, functools.partial(oracles.gated_rfa_layer, directions=directions, eps=config.norm_eps))
    after, expected = case.check(STARTS)
    same(first_row(after), expected)
    case.check({5}, after, expected)


def test_random_features_estimate_the_gaussian_kernel() -> None:
    """phi(x) phi(y) = exp(-|x - y|^2 / 2) up to 1 / sqrt(2 features) of noise (Theorem 1 of the paper)."""
    config = GatedRFAConfig(heads=1, features=20_000)
    mixer = config.make(WIDTH, layer=0, depth=1, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((1, LENGTH, 1, WIDTH))
    phi = mixer._features(jnp.asarray(x))[0, :, 0]
    unit = x[0, :, 0] / np.linalg.norm(x[0, :, 0], axis=-1, keepdims=True)
    kernel = np.exp(-np.sum((unit[:, None] - unit[None]) ** 2, axis=-1) / 2)
    chex.assert_trees_all_close(phi @ phi.T, kernel, atol=4 / np.sqrt(2 * config.features))


def test_directions_differ_by_head_and_seed_and_are_no_parameters() -> None:
    make = lambda seed: GatedRFAConfig(heads=2, seed=seed).make(WIDTH, layer=0, depth=1, rngs=nnx.Rngs(0))
    first, other = make(0), make(1)
    assert not np.allclose(*first.directions)
    assert not np.allclose(first.directions, other.directions)
    np.testing.assert_array_equal(first.directions, make(0).directions)
    assert all(leaf.shape != first.directions.shape for leaf in jax.tree.leaves(params.split(first)[1]))


@pytest.mark.parametrize(
    ("config", "bounded"),
    [(HGRN2Config(head_size=4), False), (HGRN2Config(head_size=8, norm_eps=1e-2, chunk=4), True)],
)
def test_hgrn2(config: HGRN2Config, bounded: bool) -> None:
    gamma = np.random.default_rng(3).standard_normal((3, WIDTH))
    bound = oracles.lower_bounds(gamma)[2] if bounded else 0.0
    oracle = functools.partial(oracles.hgrn2_layer, head_size=config.head_size, eps=config.norm_eps, bound=bound)
    case = Case(config, oracle)
    if bounded:
        mix, part = case.mix, jax.tree.map(lambda leaf: leaf[2], lower_bounds(jnp.asarray(gamma)))
        case.mix = lambda arrays, x, state, context: mix(arrays, x, state, context.replace(shared={ACROSS: part}))
    after, expected = case.check(STARTS)
    same(after.memory[0], expected)
    case.check({5}, after, expected)


def test_bounds_of_a_stack_and_their_gradient() -> None:
    """Three layers in two groups: each has its published bound, and Gamma the gradient of that."""
    config = HGRN2Config(head_size=4)
    stack = Stack(WIDTH, (((config, config), 1), ((config,), 2)), rngs=nnx.Rngs(0))
    definition, arrays = params.split(stack)
    random = np.random.default_rng(1)
    arrays = jax.tree.map(lambda p: np.asarray(p, np.float64) + 0.1 * random.standard_normal(p.shape), arrays)
    x, weights = random.standard_normal((2, LENGTH, WIDTH))

    def expected(gamma: np.ndarray) -> np.ndarray:
        y, bounds = x, oracles.lower_bounds(gamma)
        first, second = arrays["groups"]["0"]["steps"], arrays["groups"]["1"]["steps"]["0"]
        places = [(first["0"], 0), (first["1"], 0), (second, 0), (second, 1)]
        for bound, (step, repeat) in zip(bounds, places, strict=True):
            step = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], step)
            normed = y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-6) * step["norm"]["scale"]
            layer = functools.partial(oracles.hgrn2_layer, head_size=4, eps=config.norm_eps, bound=bound)
            y = y + layer(normed, step["layer"], {0})[0]
        return y

    @jax.jit
    def run(gamma: Any) -> Any:
        def loss(gamma: Any) -> Any:
            given = {**arrays, "across": {"stacked": {"hgrn2_bounds": gamma}}}
            y = params.merge(definition, given)(jnp.asarray(x)[None], None, Context.whole(1, LENGTH))[0][0]
            return jnp.sum(y * weights), y

        return jax.value_and_grad(loss, has_aux=True)(gamma)

    gamma = arrays["across"]["stacked"]["hgrn2_bounds"]
    assert gamma.shape == (4, WIDTH)
    (_, y), gradient = run(gamma)
    same(y, expected(gamma))
    check_gradient(lambda gamma: float(np.sum(expected(gamma) * weights)), gamma, gradient)


def test_bounds_and_gates_keep_their_digits() -> None:
    """Near 0 and near 1, in float32, against float64; gradients are finite at gates of 0 and at bounds of 0 and 1."""
    x = np.array([-1e3, -80.0, -3.0, 0.0, 1e-3, 3.0, 20.0, 60.0], np.float32)
    gamma = np.stack([np.zeros(4), [-30.0, 0.0, 10.0, 16.0], [-40.0, 2.0, 16.0, -20.0]]).astype(np.float32)
    single, double = lower_bounds(jnp.asarray(gamma)), lower_bounds(jnp.asarray(gamma, np.float64))
    chex.assert_trees_all_close(single, double, rtol=FLOAT32)
    np.testing.assert_allclose(np.asarray(double.bound) + np.asarray(double.rest), 1, rtol=1e-12)
    assert not np.any(np.asarray(single.bound)[0])

    @jax.jit
    def gates(x: Any, bounds: Any) -> Any:
        of = lambda x, bounds: (lambda pair: (pair[0].sum() + pair[1].sum(), pair))(bounded_gate(x, bounds))
        return jax.value_and_grad(of, (0, 1), has_aux=True)(x, bounds)

    x = np.broadcast_to(x, (3, 4, 8))
    parts = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[..., None], x.shape), single)
    (_, (log_decay, key)), gradients = gates(x, parts)
    chex.assert_tree_all_finite(gradients)
    bound, rest, wide = (np.asarray(leaf, np.float64) for leaf in (*parts, x))
    small = rest / (1 + np.exp(np.minimum(wide, 700)))
    a = bound + rest / (1 + np.exp(np.minimum(-wide, 700)))
    exact = np.where(small < 0.5, np.log1p(-np.minimum(small, 0.5)), np.log(a))
    exact = np.where(bound == 0, -np.logaddexp(0, -wide), exact)
    np.testing.assert_allclose(key, small, rtol=FLOAT32)
    np.testing.assert_allclose(log_decay, exact, rtol=FLOAT32)
    chex.assert_tree_all_finite(jax.grad(lambda gamma: jnp.sum(lower_bounds(gamma).rest[1:]))(jnp.asarray(gamma)))
