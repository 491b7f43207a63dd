"""Token shift within documents, over calls and over devices."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqmodels.layers.token_shift import lerp, no_token, token_shift
from seqmodels.typing import Context
from tests.layers.test_short_conv import context_of

WIDTH = 3


def tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, length, WIDTH)).astype(np.float32)


def test_the_token_before_is_one_of_the_same_document() -> None:
    """Also from a carried state; padding may hold NaN, and a document without a token leaves nothing behind."""
    x, state = tokens(3, 6), np.full((3, WIDTH), 7, np.float32)
    context = context_of("--+--.", "..+-++", "-.x...")
    poisoned = jnp.where(context.segments.valid[..., None], x, jnp.nan)
    previous, last = token_shift(poisoned, state, context)
    nothing = np.zeros(WIDTH, np.float32)
    expected = [
        [state[0], x[0, 0], nothing, x[0, 2], x[0, 3], nothing],
        [nothing, nothing, nothing, x[1, 2], nothing, nothing],
        [state[2], nothing, nothing, nothing, nothing, nothing],
    ]
    chex.assert_trees_all_equal(previous, np.array(expected))
    chex.assert_trees_all_equal(last, np.stack([x[0, 4], x[1, 5], nothing]))


def test_split_anywhere() -> None:
    x, rows = tokens(2, 8), ("+--+----", "--------")
    whole, after = token_shift(x, no_token(2, WIDTH), context_of(*rows))
    for cut in (1, 3, 4, 7):
        first, state = token_shift(x[:, :cut], no_token(2, WIDTH), context_of(*(row[:cut] for row in rows)))
        second, state = token_shift(x[:, cut:], state, context_of(*(row[cut:] for row in rows)))
        chex.assert_trees_all_equal(jnp.concatenate([first, second], 1), whole)
        chex.assert_trees_all_equal(state, after)


@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_time(check_vma: bool) -> None:
    x, state = tokens(3, 16), np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)
    context = context_of("----------------", "+-----.....x....", "--+-----..+----.")
    mesh, along = jax.make_mesh((8,), ("time",), axis_types=(AxisType.Auto,)), P(None, "time")

    def run(x, state, segments, positions):
        return token_shift(x, state, Context(segments, positions, sequence_axis="time"))

    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(along, P(), along, along), out_specs=(along, P()), check_vma=check_vma
    )
    found = jax.jit(sharded)(x, state, context.segments, context.positions)
    chex.assert_trees_all_equal(found, token_shift(x, state, context))


def test_types_and_shapes() -> None:
    x = jnp.ones((2, 5, WIDTH), jnp.bfloat16)
    previous, state = token_shift(x, no_token(2, WIDTH, jnp.bfloat16), Context.whole(2, 5))
    assert (previous.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    with pytest.raises(ValueError, match=r"\(3, 3\) cannot continue inputs of shape \(2, 5, 3\)"):
        token_shift(x, no_token(3, WIDTH), Context.whole(2, 5))


def test_a_share_of_one_is_the_current_token() -> None:
    x, previous = tokens(2, 5), tokens(2, 5)[::-1]
    share = jnp.array([1.0, 0.0, 0.25])
    expected = np.stack([x[..., 0], previous[..., 1], 0.25 * x[..., 2] + 0.75 * previous[..., 2]], axis=-1)
    chex.assert_trees_all_close(lerp(x, previous, share), expected, rtol=1e-6, atol=1e-6)
