"""RWKV-4, RWKV-6 and RWKV-7 against their oracles in float64: time mixes, channel mixes, states, first values."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import ModelConfig, params
from seqmodels.layers import NormConfig, RWKVChannelConfig
from seqmodels.mixers import RWKV4Config, RWKV6Config, RWKV7Config
from seqmodels.typing import Context, Segments
from tests.oracles.differences import check_gradient
from tests.oracles.rwkv import channel_mix, rwkv4_time_mix, rwkv6_time_mix, rwkv7_time_mix
from tests.oracles.test_mixers import EXACT, LENGTH, STARTS, WIDTH, Case

# A language model computes in float32: 6e-8 a rounding, through six layers and their norms.
SINGLE = 1e-5

pytestmark = pytest.mark.usefixtures("x64")


def assert_exact(got: Any, expected: Any) -> None:
    chex.assert_trees_all_close(got, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("config", [RWKV4Config(), RWKV4Config(recurrent_size=12, method="chunked", chunk=4)])
def test_rwkv4(config: RWKV4Config) -> None:
    case = Case(config, rwkv4_time_mix)
    after, expected = case.check(STARTS)
    scale = jnp.exp(after.average.log_max[0])
    sums = scale * after.average.numerator[0], scale * after.average.denominator[0]
    assert_exact((after.last[0], *sums), (expected["last"], expected["num"], expected["den"]))
    case.check({5}, after, expected)


@pytest.mark.parametrize("head_size", [4, 8])
def test_rwkv6(head_size: int) -> None:
    config = RWKV6Config(head_size=head_size, mix_rank=3, decay_rank=2, norm_eps=1e-3, chunk=4)
    case = Case(config, functools.partial(rwkv6_time_mix, size=head_size, eps=1e-3))
    after, expected = case.check(STARTS)
    assert_exact((after.last[0], after.memory[0]), (expected["last"], expected["memory"]))
    case.check({5}, after, expected)


@pytest.mark.parametrize(("head_size", "ranks"), [(4, {}), (8, {"decay_rank": 3, "rate_rank": 2, "gate_rank": 5})])
def test_rwkv7(head_size: int, ranks: dict[str, int]) -> None:
    """Alone, as the first layer."""
    config = RWKV7Config(head_size=head_size, chunk=4, **ranks)
    case = Case(config, functools.partial(rwkv7_time_mix, size=head_size))
    after, expected = case.check(STARTS)
    assert_exact((after.last[0], jnp.swapaxes(after.memory[0], 1, 2)), (expected["last"], expected["memory"]))
    case.check({5}, after, expected)


@pytest.mark.parametrize(("version", "hidden_size"), [(4, None), (6, 11), (7, None)])
def test_channel_mix(version: int, hidden_size: int | None) -> None:
    case = Case(RWKVChannelConfig(version, hidden_size), channel_mix)  # type: ignore[arg-type]
    layer = case.mix
    case.mix = lambda *inputs: layer(*inputs)[:2]  # a channel layer reports scalars besides
    after, expected = case.check(STARTS)
    assert_exact(after.last[0], expected["last"])
    case.check({5}, after, expected)


def layer_norm(x: np.ndarray, parameters: dict[str, np.ndarray], eps: float) -> np.ndarray:
    centred = x - x.mean(axis=1, keepdims=True)
    return (
        centred / np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + eps) * parameters["scale"] + parameters["bias"]
    )


def three_layers(arrays: Any, x: np.ndarray, groups: tuple[int, ...], eps: float) -> np.ndarray:
    """RWKV-7's residual steps in turn; the values of the first layer go to the other two."""
    first = None
    for group, repeats in enumerate(groups):
        steps = arrays["groups"][str(group)]["steps"]
        for repeat in range(repeats):
            time, channel = (jax.tree.map(lambda leaf, n=repeat: leaf[n], steps[step]) for step in ("0", "1"))
            normed = layer_norm(x, time["norm"], eps)
            y, after = rwkv7_time_mix(normed, time["layer"], STARTS, size=4, first=first, eps=eps)
            first = after["values"] if first is None else first
            x = x + y
            x = x + channel_mix(layer_norm(x, channel["norm"], eps), channel["layer"], STARTS)[0]
    return x


@pytest.mark.parametrize("groups", [(3,), pytest.param((1, 2), marks=pytest.mark.slow)], ids=str)
def test_the_first_layers_values_reach_every_later_layer(groups: tuple[int, ...]) -> None:
    """A language model of three RWKV-7 layers against its oracles layer by layer, in one call and in two.

    The layers stand in one group, which loops over them, or in several. Its stack is compared in float64, its logits,
    which are float32, too.
    """
    eps, vocabulary = 0.1, 11  # norms of few channels that divide by little would be too steep for differences
    layers = tuple(((RWKV7Config(head_size=4, norm_eps=eps),), repeats) for repeats in groups)
    options: Any = {"norm": NormConfig("layer", eps=eps), "embedding_norm": True, "tied": False}
    config = ModelConfig(vocabulary, WIDTH, layers, channel=RWKVChannelConfig(7, 12), **options)
    random = np.random.default_rng(0)
    definition, arrays = params.split(config.make(rngs=nnx.Rngs(0)))
    arrays = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) + 0.3 * random.standard_normal(leaf.shape), arrays)
    tokens = random.integers(0, vocabulary, LENGTH)
    start = np.isin(np.arange(LENGTH), list(STARTS))[None]
    segments = Segments(start, np.ones_like(start))

    x = layer_norm(arrays["embedding"][tokens], arrays["embedding_norm"], eps)
    weights = random.standard_normal(x.shape)
    expected = three_layers(arrays["stack"], x, groups, eps)

    @jax.jit
    def run(arrays: Any, x: Any, state: Any, segments: Segments) -> Any:
        context = Context(segments, segments.positions()[0])
        return params.merge(definition, arrays).stack(x[None], state, context)[:2]

    cut = lambda begin, end: jax.tree.map(lambda leaf: leaf[:, begin:end], segments)
    whole, state = run(arrays, x, None, segments)
    assert_exact(whole[0], expected)
    one, carried = run(arrays, x[:4], None, cut(0, 4))
    two, carried = run(arrays, x[4:], carried, cut(4, None))
    assert_exact(jnp.concatenate([one, two], 1)[0], expected)
    assert_exact(carried, state)

    loss = lambda stack, x: jnp.sum(run({**arrays, "stack": stack}, x, None, segments)[0][0] * weights)
    slopes = jax.grad(loss, (0, 1))(arrays["stack"], x)
    check_gradient(lambda point: np.sum(three_layers(*point, groups, eps) * weights), (arrays["stack"], x), slopes)

    logits, _ = jax.jit(params.merge(definition, arrays))(tokens[None], None, segments)
    expected = layer_norm(expected, arrays["norm"], eps) @ arrays["head"]["kernel"]
    chex.assert_trees_all_close(logits[0], expected, rtol=SINGLE, atol=SINGLE)
