"""What the shared properties do not see of mLSTM and sLSTM: the first block, initial values, configs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from seqmodels import params
from seqmodels.mixers import MLSTMConfig, SLSTMConfig
from seqmodels.typing import Segments
from tests.mixers.properties import (
    FLOAT32,
    MIXED,
    TIME,
    UNBROKEN,
    Subject,
    assert_close,
    assert_valid_close,
    tokens,
)


def test_the_first_block_continues_packs_pads_and_shards() -> None:
    """Pieces, one device or eight, NaN in the padding: the same outputs and the same state."""
    s = Subject(MLSTMConfig.original(), caches=False)
    before = s.forward(s.params, tokens(7), s.fresh, UNBROKEN)[1]
    x = np.where(MIXED.valid[..., None], tokens(0), np.nan)
    y, after = s.forward(s.params, x, before, MIXED)
    assert np.isfinite(np.asarray(y)).all()
    carry, outputs = before, []
    for part in (slice(0, 7), slice(7, 8), slice(8, 16)):
        piece, carry = s.forward(s.params, x[:, part], carry, Segments(*(mask[:, part] for mask in MIXED)))
        outputs.append(piece)
    assert_valid_close(np.concatenate(outputs, axis=1), y, MIXED.valid)
    assert_close(carry, after, FLOAT32)
    mesh = jax.make_mesh((8,), (TIME,), axis_types=(AxisType.Auto,))
    sharded, carry = jax.jit(functools.partial(s._forward, mesh=mesh))(s.params, x, before, MIXED)
    assert_valid_close(sharded, y, MIXED.valid)
    assert_close(carry, after, FLOAT32)


def test_initial_values_are_the_published_ones() -> None:
    rngs = nnx.Rngs(0)
    plain = MLSTMConfig().make(64, layer=0, depth=4, rngs=rngs)
    np.testing.assert_allclose(plain.forget_bias[...], [3, 4, 5, 6])
    np.testing.assert_allclose(plain.input_bias[...], -10)
    assert not np.any(plain.gates.kernel[...])
    np.testing.assert_allclose(np.std(plain.query.kernel[...]), (2 / (5 * 64)) ** 0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(plain.out.kernel[...]), 2 / (4 * 64**0.5), rtol=0.05)
    assert (plain.key_size, plain.value_size) == (8, 16)
    first = MLSTMConfig.original(heads=64).make(64, layer=0, depth=4, rngs=rngs)
    assert 0.05 < np.std(first.input_bias[...]) < 0.2
    assert first.inner == 128
    for linear in (first.up, first.query, first.key, first.value):  # by the model's width, blocks of 4 channels too
        np.testing.assert_allclose(np.std(linear.kernel[...]), (2 / (5 * 64)) ** 0.5, rtol=0.1)

    for layer, exponent in ((0, 0.3), (3, 1.6)):
        scalar = SLSTMConfig().make(64, layer=layer, depth=4, rngs=rngs)
        bias = np.asarray(scalar.bias[...])
        np.testing.assert_allclose(bias[:, 1, [0, -1]], np.tile([5.0, -7.0], (4, 1)), rtol=1e-6)
        np.testing.assert_allclose(bias[:, 1, 5], 5 - 12 * (5 / 15) ** exponent, rtol=1e-5)
        assert not np.any(bias[:, [0, 2, 3]])
        assert not np.any(scalar.recurrent[...])
        np.testing.assert_allclose(np.std(scalar.kernel[...]), (2 / (5 * 64)) ** 0.5, rtol=0.05)
    assert params.labels(scalar)["bias"] == params.labels(plain)["forget_bias"] == params.Group.DYNAMICS


def test_recurrent_weights_start_at_zero_or_uniform_as_asked() -> None:
    make = lambda **options: SLSTMConfig(**options).make(64, layer=0, depth=4, rngs=nnx.Rngs(0)).recurrent[...]
    assert not np.any(make())
    found = make(recurrent_range=2.0)
    assert np.abs(found).max() <= 2 / 64**0.5
    np.testing.assert_allclose(np.std(found), 2 / 64**0.5 / 3**0.5, rtol=0.05)
    with pytest.raises(ValueError, match="recurrent_range must be 0 or more, not -1"):
        SLSTMConfig(recurrent_range=-1.0)


def test_memory_mixes_inside_a_head_only() -> None:
    """Head 0's earlier outputs reach all channels of head 0, and no other head."""
    s = Subject(SLSTMConfig(conv_width=1), caches=False)
    fresh = s.fresh

    def later(state: jax.Array) -> jax.Array:
        cell = fresh.state.cell._replace(output=state)
        carry = fresh._replace(state=fresh.state._replace(cell=cell))
        return s._forward(s.params, jnp.asarray(tokens(0, 4, 1)), carry, Segments.whole(4, 1, fresh=False))[0][0, 0]

    reached = np.asarray(jax.jit(jax.jacobian(later))(jnp.zeros((4, 4, 16))))[:, 0] != 0
    heads = reached.reshape(4, 16, 4, 16)
    for own in range(4):
        assert heads[own, :, own].all()
        assert not heads[own][:, np.arange(4) != own].any()


def test_configs_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"key_size=8: with conv_width=4 .*leave key_size at None"):
        MLSTMConfig(conv_width=4, key_size=8)
    with pytest.raises(ValueError, match="gate_cap must be positive, not 0"):
        MLSTMConfig(gate_cap=0)
    with pytest.raises(ValueError, match="heads must be at least 1, not 0"):
        SLSTMConfig(heads=0)
    with pytest.raises(ValueError, match="inner width 64 does not divide into heads=3"):
        MLSTMConfig(heads=3).make(64, layer=0, depth=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="inner width 128 does not divide into blocks of 5"):
        MLSTMConfig.original(block_size=5).make(64, layer=0, depth=1, rngs=nnx.Rngs(0))
