"""Gradients against float64, gates at their ends, bfloat16."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_vjp

from seqmodels.typing import Segments
from tests.mixers.properties import (
    BATCH,
    CAPACITY,
    CONFIGS,
    FLOAT32_GRADIENT,
    MIXED,
    RECURRENT,
    TREES,
    Carry,
    Result,
    Subject,
    Weights,
    assert_close,
    assert_valid_close,
    float64,
    is_inexact,
    subject,
    tokens,
)

every_mixer = pytest.mark.parametrize("name", CONFIGS)
every_recurrence = pytest.mark.parametrize("name", RECURRENT)

# Central differences in float64 of a loss of order one: step^2 of truncation, 2^-52 / step of rounding.
STEP, DIFFERENCES = 3e-6, 1e-6
# Gates take arguments in the hundreds here, whose rounding (2^-24 of them) becomes a relative error of their values.
EXTREME = 1e-4
# Mamba-3's angles turn by 0.5 tanh(gate) step, at 1e3 hundreds of turns at a time: rounding the tokens alone (to 2^-24)
# moves its last keys by 2.4e-4 there, in float64. A gate is a sum of 64 products, whose partial sums are about 8 times
# as large as a product and round as much more; three times that for the largest of some hundred entries. Where vectors
# are of 8 numbers, and sums in another order than where they are of 16, 2.6e-3 was seen.
# The gated delta rule's gradient of log A: rounding tokens or weights alone moves it by up to 1.5e-4, in float64.
SENSITIVE = {"mamba3": 60, "gated_deltanet": 5}
# Beside the largest gradient of all, one this small is what rounding left of a cancellation.
CANCELLED = 1e-10
# bfloat16 keeps 8 bits: products of two roundings, summed with random signs, stay near 2^-8 of the outputs' size.
# Softmax and gates amplify a few entries more, so 99 % of the entries have to be this close and none may be far off.
BFLOAT16_99, BFLOAT16_MAX = 2**-5, 2**-4
# Rounding tokens and weights alone, and computing in float32, moves 99 % of gated_deltanet's, kda's and rwkv7's outputs
# by up to 0.028, of deltaproduct's by 0.034: small keys and reads are brought to unit size, their rounding with them.
AMPLIFIED = {"gated_deltanet": 2, "deltaproduct": 2, "kda": 2, "rwkv7": 2}


def assert_gradients(
    s: Subject, x: np.ndarray, carry: Carry, arrays: Any, segments: Segments, weights: Weights
) -> None:
    """The reverse-mode gradient to every leaf apart, so that a small one cannot hide behind a large one."""
    leaves, structure = jax.tree.flatten((arrays, x, carry))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path((arrays, x, carry))]
    inexact = [index for index, leaf in enumerate(leaves) if is_inexact(leaf)]

    def run(value: Any, index: int) -> Result:
        arrays, x, carry = jax.tree.unflatten(structure, [*leaves[:index], value, *leaves[index + 1 :]])
        return s.run(x, carry, segments, arrays=arrays, weights=weights)

    for number, index in enumerate(inexact):

        def loss(value: Any, index: int = index) -> Any:
            return np.asarray(run(value, index).loss)

        def loss_and_vjp(value: Any, index: int = index, number: int = number) -> Any:
            result = run(value, index)
            gradient = np.asarray(jax.tree.leaves(result.gradients)[number])
            return np.asarray(result.loss), lambda cotangent: (cotangent * gradient,)

        check_vjp(loss, loss_and_vjp, (leaves[index],), DIFFERENCES, DIFFERENCES, STEP, err_msg=paths[index])


# A tree compiles the longest; its gradients in float64 are held against the oracle's in the quick tier.
quick = [pytest.param(name, marks=pytest.mark.slow) if name in TREES else name for name in CONFIGS]


@pytest.mark.parametrize("name", quick)
def test_gradients_against_differences_in_float64(name: str) -> None:
    """Gradients to every parameter, to the input and to the initial state, the final state being in the loss."""
    s = subject(name)
    with jax.enable_x64(True):
        x, warm, arrays, weights = float64((tokens(0), s.warm, s.params, s.weights(MIXED.valid)))
        exact = s.run(x, warm, MIXED, arrays=arrays, weights=weights)
        chex.assert_trees_all_equal_dtypes((exact.y, exact.carry.state), (x, warm.state))
        assert_gradients(s, x, warm, arrays, MIXED, weights)
    single = s.run(tokens(0), s.warm, MIXED)
    assert_valid_close(single.y, exact.y, MIXED.valid)
    assert_close(single.gradients, exact.gradients, FLOAT32_GRADIENT)


def test_a_wrong_gradient_is_caught() -> None:
    """The control of the test above: one gradient off by one part in a thousand."""
    right = subject(next(iter(CONFIGS)))

    class Wrong:
        def run(self, *args: Any, **kwargs: Any) -> Result:
            result = right.run(*args, **kwargs)
            return result._replace(gradients=result.gradients._replace(x=result.gradients.x * 1.001))

    with jax.enable_x64(True):
        x, warm, arrays, weights = float64((tokens(0), right.warm, right.params, right.weights(MIXED.valid)))
        with pytest.raises(AssertionError, match=r"\[1\]"):
            assert_gradients(Wrong(), x, warm, arrays, MIXED, weights)


@every_recurrence
@pytest.mark.parametrize("scale", [1e2, 1e3])
def test_extreme_gates(name: str, scale: float) -> None:
    """Gates driven to their ends by large inputs: finite, and what float64 says.

    At 1e3 sigmoids underflow to zero. Gradients are compared at 1e2 only: beyond, a norm after the recurrence cancels
    nearly all of a gradient along its own output, and float32 keeps no digit of the rest. What cancels throughout (the
    mLSTM's normaliser scales whole heads, whose norm undoes it) is left with rounding of the other gradients' size.
    """
    s, x = subject(name), np.float32(scale) * tokens(0)
    single = s.run(x, s.warm, MIXED)
    chex.assert_tree_all_finite(jax.tree.map(np.asarray, (single.gradients, single.after)))
    with jax.enable_x64(True):
        x, warm, arrays, weights = float64((x, s.warm, s.params, s.weights(MIXED.valid)))
        exact = jax.tree.map(np.asarray, s.run(x, warm, MIXED, arrays=arrays, weights=weights))
    extreme = SENSITIVE.get(name, 1) * EXTREME
    assert_valid_close(single.y, exact.y, MIXED.valid, extreme)
    assert_close(single.after, exact.after, extreme)
    if scale == 1e2:
        largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(exact.gradients))
        assert_close(single.gradients, exact.gradients, extreme, floor=CANCELLED * largest)


@every_mixer
def test_bfloat16(name: str) -> None:
    """bfloat16 tokens stay near float32 ones, and what a recurrence accumulates stays float32."""
    s, x = subject(name), tokens(0)
    expected = s.run(x, s.fresh, MIXED)
    carry = Carry(s.mixer.init_state(BATCH, capacity=CAPACITY, dtype=jnp.bfloat16), np.zeros(BATCH, np.int32))
    y, after = s.forward(s.params, x.astype(jnp.bfloat16), carry, MIXED)
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_equal_shapes_and_dtypes(after, carry)
    if name in RECURRENT:
        narrow = [path for path, leaf in jax.tree_util.tree_leaves_with_path(after.state) if leaf.dtype == jnp.bfloat16]
        assert all("conv" in jax.tree_util.keystr(path) for path in narrow), f"{narrow} lose bits at every step"
    y, reference = np.asarray(y, np.float32)[MIXED.valid], np.asarray(expected.y)[MIXED.valid]
    error = np.abs(y - reference) / np.sqrt(np.mean(reference**2))
    amplified = AMPLIFIED.get(name, 1)
    assert np.quantile(error, 0.99) < amplified * BFLOAT16_99
    assert error.max() < amplified * BFLOAT16_MAX
