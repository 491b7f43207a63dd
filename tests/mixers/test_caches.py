"""What attention's caches hold: capacity, overflow, and a window whose state does not grow."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.mixers import AttentionConfig
from seqmodels.typing import Segments
from tests.mixers.properties import BATCH, FLOAT32, WIDTH, Subject, assert_close, layout, tokens


def test_full_attention_asks_for_a_capacity() -> None:
    mixer = nnx.eval_shape(lambda: AttentionConfig(heads=4).make(WIDTH, layer=0, depth=1, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="capacity"):
        mixer.init_state(BATCH)


def test_a_full_cache_answers_with_nan() -> None:
    """Rows that outgrow their cache turn to NaN there; what was right before and other rows stay right."""
    small, large = (Subject(AttentionConfig(heads=4), caches=True, capacity=capacity) for capacity in (9, 64))
    segments = layout("+------", "+------", "+---...", "+------")
    more = layout("-------", "--.....", "------.", "---+---")
    outputs = {}
    for s in (small, large):
        first, carry = s.forward(s.params, tokens(0, length=7), s.fresh, segments)
        second, carry = s.forward(s.params, tokens(1, length=7), carry, more)
        third, _ = s.forward(s.params, tokens(2, length=7), carry, layout(*["-......"] * BATCH))
        outputs[s.capacity] = np.concatenate([first, second, third[:, :1]], axis=1)
    held, right = outputs[9], outputs[64]
    overflows = np.zeros((BATCH, 15), bool)
    overflows[0, 7 + 2 :] = True  # the row has 14 tokens, then one more
    overflows[1, 14] = True  # nine tokens fit, the tenth does not
    overflows[2, [12, 14]] = True  # 4 + 6 tokens, then one more
    overflows[3, 9] = True  # the tenth token; the document that follows has slots of its own
    np.testing.assert_array_equal(np.isnan(held).all(axis=-1), overflows)
    assert_close(held[~overflows], right[~overflows], FLOAT32)
    chex.assert_tree_all_finite(right)


def test_a_window_sees_so_many_keys() -> None:
    """y_t depends on the last `window` tokens, its own included, and on no other; the state has as many slots."""
    window = 5
    s = Subject(AttentionConfig(heads=4, window=window), caches=True)
    shapes = jax.tree.map(jnp.shape, s.mixer.init_state(BATCH))
    assert shapes == jax.tree.map(jnp.shape, s.mixer.init_state(BATCH, capacity=1000))
    assert shapes.key[1] == window

    empty = s.fresh

    def last(x: jax.Array, y: jax.Array) -> jax.Array:
        """The sum of the outputs of y's third token, which follows x."""
        _, carry = s._forward(s.params, x, empty, Segments.whole(BATCH, 16, fresh=True))
        return s._forward(s.params, y, carry, Segments.whole(BATCH, 3, fresh=False))[0][:, 2].sum()

    gradients = jax.jit(jax.grad(last, (0, 1)))(tokens(0), tokens(1, length=3))
    reached = np.any(np.concatenate(gradients, axis=1) != 0, axis=(0, 2))
    np.testing.assert_array_equal(np.flatnonzero(reached), np.arange(19 - window, 19))
