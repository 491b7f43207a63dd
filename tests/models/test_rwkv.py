"""Whole RWKV models: channel layers with a state, published values over devices, generation token by token."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqmodels import ModelConfig, params
from seqmodels.generate import generate
from seqmodels.layers import NormConfig, RWKVChannelConfig
from seqmodels.mixers import RWKV4Config, RWKV6Config, RWKV7Config
from seqmodels.typing import MixerConfig
from tests.train.test_mesh import EVERY_AXIS, assert_mesh_equals_one_device

VOCABULARY, WIDTH, BATCH, LENGTH = 13, 16, 2, 16
# float32 through six layers whose group norms divide by the spread of eight channels.
ROUNDING = 5e-5
RWKV: dict[int, MixerConfig] = {4: RWKV4Config(), 6: RWKV6Config(head_size=8), 7: RWKV7Config(head_size=8)}

every_version = pytest.mark.parametrize("version", RWKV)


def config_of(version: int, *mixers: MixerConfig, repeats: int = 2) -> ModelConfig:
    """Mixers with the channel mix of their version, as the papers have them: LayerNorms, one after the embedding."""
    layers = (((RWKV[version], *mixers), repeats),)
    options: Any = {"norm": NormConfig("layer", eps=1e-5), "embedding_norm": True, "tied": False}
    return ModelConfig(VOCABULARY, WIDTH, layers, channel=RWKVChannelConfig(version, 24), **options)


def moved(config: ModelConfig) -> tuple[Any, Any]:
    """A model whose parameters have left their initial zeros, which would hide everything."""
    random = np.random.default_rng(1)
    definition, arrays = params.split(config.make(rngs=nnx.Rngs(0)))
    return definition, jax.tree.map(lambda a: np.asarray(a + 0.1 * random.standard_normal(a.shape), a.dtype), arrays)


def tokens(seed: int = 0, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (BATCH, length))


@every_version
def test_prefill_then_steps_equal_one_call(version: int) -> None:
    """Outputs and the states of every layer, those of channel layers among them."""
    config = config_of(version)
    definition, arrays = moved(config)
    run = jax.jit(lambda *inputs: params.merge(definition, arrays)(*inputs))
    whole, after = run(tokens(), None)
    state = params.merge(definition, arrays).init_state(BATCH)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    pieces = []
    for begin, end in [(0, 5), *((t, t + 1) for t in range(5, LENGTH))]:
        logits, state = run(tokens()[:, begin:end], state)
        pieces.append(logits)
    chex.assert_trees_all_close(jnp.concatenate(pieces, 1), whole, rtol=ROUNDING, atol=ROUNDING)
    chex.assert_trees_all_close(state, after, rtol=ROUNDING, atol=ROUNDING)
    channel = [state.layers[0][step].last for step in (1,)]
    assert all(np.any(np.asarray(last) != 0) for last in channel), "the channel layers carried nothing"


@every_version
def test_generation_goes_on_where_the_prompt_ends(version: int) -> None:
    """Greedy tokens, one at a time from carried states, are those of reading everything anew each time."""
    definition, arrays = moved(config_of(version))
    model = params.merge(definition, arrays)
    prompt = tokens(3, 6)
    made = generate(model, list(prompt), 5, temperature=0.0).tokens
    whole, run = prompt, jax.jit(lambda whole: model(whole)[0])
    for n in range(5):
        padded = np.pad(whole, ((0, 0), (0, LENGTH - whole.shape[1])))
        chosen = np.argmax(np.asarray(run(padded))[:, whole.shape[1] - 1], axis=-1)
        np.testing.assert_array_equal(made[:, n], chosen)
        whole = np.concatenate([whole, chosen[:, None]], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_published_values_over_devices(check_vma: bool) -> None:
    """Time over eight devices equals one device, from nothing and from a carried state, another mixer in between."""
    definition, arrays = moved(config_of(7, RWKV[4]))
    mesh, along = jax.make_mesh((8,), ("time",), axis_types=(AxisType.Auto,)), P(None, "time")

    def run(arrays: Any, tokens: Any, state: Any, axis: str | None) -> Any:
        hidden, state, _ = params.merge(definition, arrays).on_mesh(sequence_axis=axis).forward(tokens, state)
        return hidden, state

    spread = jax.jit(
        jax.shard_map(
            lambda *inputs: run(*inputs, "time"),
            mesh=mesh,
            in_specs=(P(), along, P()),
            out_specs=(along, P()),
            check_vma=check_vma,
        )
    )
    alone = jax.jit(lambda *inputs: run(*inputs, None))
    state = None
    for seed in (0, 1):
        expected = alone(arrays, tokens(seed), state)
        found = spread(arrays, tokens(seed), state)
        chex.assert_trees_all_close(found, expected, rtol=ROUNDING, atol=ROUNDING)
        state = expected[1]


@pytest.mark.slow
@every_version
def test_training_over_a_mesh_equals_one_device(version: int) -> None:
    """Loss and gradients, with rows, parameters and time divided, through mixers and channel layers."""
    size = {"head_size": 16} if version > 4 else {}
    mixer = type(RWKV[version])(**size)
    options: Any = {"norm": NormConfig("layer", eps=1e-5), "embedding_norm": True, "tied": False}
    channel = RWKVChannelConfig(version, 64)
    assert_mesh_equals_one_device(ModelConfig(32, 64, (((mixer,), 2),), channel=channel, **options), EVERY_AXIS)
