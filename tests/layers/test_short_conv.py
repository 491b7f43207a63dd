from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqmodels.layers import ShortConv
from seqmodels.typing import Context, Segments

# Sums of at most five float32 products.
ROUNDING = 1e-6
CHANNELS = 3


def make(width: int) -> ShortConv:
    conv = ShortConv(CHANNELS, width, rngs=nnx.Rngs(0), variance=1.0)
    conv.bias[...] = jnp.asarray([0.5, -1.0, 2.0])
    return conv


def convolved(conv: ShortConv, tokens: np.ndarray) -> np.ndarray:
    """One whole document, by numpy's own convolution."""
    kernel = np.asarray(conv.kernel[...], np.float64)[::-1]
    columns = [np.convolve(tokens[:, c], kernel[:, c])[: len(tokens)] for c in range(CHANNELS)]
    return np.stack(columns, axis=1) + np.asarray(conv.bias[...])


def context_of(*rows: str) -> Context:
    """`+` starts a document, `-` goes on, `.` is padding, `x` is padding that starts a (then empty) document."""
    table = np.array([list(row) for row in rows])
    segments = Segments(jnp.asarray(np.isin(table, ["+", "x"])), jnp.asarray(np.isin(table, ["+", "-"])))
    return Context(segments, segments.positions()[0])


@pytest.mark.parametrize("width", [1, 4])
def test_documents_do_not_see_each_other(width: int) -> None:
    conv = make(width)
    x = np.random.default_rng(0).standard_normal((2, 9, CHANNELS)).astype(np.float32)
    context = context_of("+-++----.", "..+-----+")
    poisoned = jnp.where(context.segments.valid[..., None], x, jnp.nan)
    y, state = conv(poisoned, None, context)
    expected = np.zeros_like(x)
    for row, begin, end in [(0, 0, 2), (0, 2, 3), (0, 3, 8), (1, 2, 8), (1, 8, 9)]:
        expected[row, begin:end] = convolved(conv, x[row, begin:end])
    chex.assert_trees_all_close(y, expected, rtol=ROUNDING, atol=ROUNDING)
    for row, document in ((0, x[0, 3:8]), (1, x[1, 8:9])):
        last = np.concatenate([np.zeros((width - 1, CHANNELS)), document])[len(document) :]
        chex.assert_trees_all_close(state[row], last, rtol=0, atol=0)


def test_split_anywhere() -> None:
    conv = make(4)
    run = jax.jit(lambda x, state, context: conv(x, state, context))
    x = np.random.default_rng(1).standard_normal((2, 8, CHANNELS)).astype(np.float32)
    rows = ("+--+----", "+-------")
    whole, last = run(x, jnp.zeros((2, 3, CHANNELS)), context_of(*rows))
    for cut in (1, 3, 5, 7):
        first, state = run(x[:, :cut], jnp.zeros((2, 3, CHANNELS)), context_of(*(row[:cut] for row in rows)))
        second, state = run(x[:, cut:], state, context_of(*(row[cut:] for row in rows)))
        chex.assert_trees_all_close(jnp.concatenate([first, second], 1), whole, rtol=ROUNDING, atol=ROUNDING)
        chex.assert_trees_all_equal(state, last)


def test_state_where_a_row_has_no_token_or_ends_in_an_empty_document() -> None:
    conv = make(3)
    state = jnp.asarray(np.random.default_rng(2).standard_normal((3, 2, CHANNELS)), jnp.float32)
    x = jnp.full((3, 3, CHANNELS), jnp.nan).at[2, 0].set(1.0)
    _, after = conv(x, state, context_of("...", ".x.", "-.x"))
    chex.assert_trees_all_equal(after[0], state[0])
    chex.assert_trees_all_equal(after[1:], jnp.zeros((2, 2, CHANNELS)))


def test_state_is_float32_under_bfloat16() -> None:
    conv = make(4)
    y, state = conv(jnp.ones((2, 5, CHANNELS), jnp.bfloat16), None, Context.whole(2, 5))
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert conv.init_state(2, jnp.bfloat16).dtype == jnp.float32


@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_time(check_vma: bool) -> None:
    """Spans of two tokens are shorter than the convolution: inputs come from several devices back."""
    conv = make(5)
    x = np.random.default_rng(3).standard_normal((3, 16, CHANNELS)).astype(np.float32)
    context = context_of("----------------", "+-----.....x....", "--+-----..+----.")
    state = jnp.asarray(np.random.default_rng(4).standard_normal((3, 4, CHANNELS)), jnp.float32)
    mesh = jax.make_mesh((8,), ("time",), axis_types=(AxisType.Auto,))

    def run(x, state, segments, positions):
        return conv(x, state, Context(segments, positions, sequence_axis="time"))

    along = P(None, "time")
    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(along, P(), along, along), out_specs=(along, P()), check_vma=check_vma
    )
    found = jax.jit(sharded)(x, state, context.segments, context.positions)
    chex.assert_trees_all_close(found, conv(x, state, context), rtol=ROUNDING, atol=ROUNDING)


def test_a_state_of_other_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 3, 3\) cannot continue inputs of shape \(2, 5, 3\)"):
        make(4)(jnp.ones((2, 5, CHANNELS)), jnp.zeros((3, 3, CHANNELS)), Context.whole(2, 5))
