"""Every executor against a float64 loop: outputs, final states, resets, padding, tails, types and gradients."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from seqmodels.scan import scan, step
from tests.scan.examples import AFFINE, EXAMPLES, PRODUCT, Example, loop

pytestmark = pytest.mark.optimised
# float32 rounding (6e-8) over 13 steps of products of order one.
ROUNDING = 2e-5
LENGTH = 13
METHODS = (
    {"method": "sequential"},
    {"method": "associative"},
    {"method": "chunked", "chunk": 1},
    {"method": "chunked", "chunk": 4},
    {"method": "chunked", "chunk": 64},
)
by_name = pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
by_method = pytest.mark.parametrize("options", METHODS, ids=lambda m: "-".join(map(str, m.values())))


def _poisoned(inputs: Any, valid: np.ndarray | None) -> Any:
    if valid is None:
        return inputs
    mask = lambda x: jnp.asarray(valid).reshape(-1, *[1] * (x.ndim - 1))
    return jax.tree.map(lambda x: jnp.where(mask(x), x, jnp.nan), inputs)


@by_method
@by_name
def test_equals_a_loop_in_float64(example: Example, options: dict) -> None:
    rng = np.random.default_rng(1)
    inputs, state = example.inputs(rng, LENGTH), example.state(rng)
    run = jax.jit(functools.partial(scan, example.recurrence, **options))
    some, most = rng.random(LENGTH) < 0.3, rng.random(LENGTH) < 0.7
    for reset, valid in ((some, most), (some, np.ones_like(most)), (np.zeros_like(some), most)):
        outputs, final = run(_poisoned(inputs, valid), state, reset=reset, valid=valid)
        expected = loop(example, inputs, state, reset, valid)
        chex.assert_trees_all_close((outputs, final), expected, rtol=ROUNDING, atol=ROUNDING)
    chex.assert_trees_all_close(run(inputs), loop(example, inputs, None, None, None), rtol=ROUNDING, atol=ROUNDING)


@by_name
def test_a_split_at_any_step_changes_nothing(example: Example) -> None:
    rng = np.random.default_rng(2)
    inputs, state = example.inputs(rng, LENGTH), example.state(rng)
    run = jax.jit(functools.partial(scan, example.recurrence))
    whole = run(inputs, state)
    for cut in (1, 6):
        early, middle = run(jax.tree.map(lambda x, c=cut: x[:c], inputs), state)
        late, final = run(jax.tree.map(lambda x, c=cut: x[c:], inputs), middle)
        joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), early, late)
        chex.assert_trees_all_close((joined, final), whole, rtol=ROUNDING, atol=ROUNDING)


@by_name
def test_steps_equal_the_scan(example: Example) -> None:
    rng = np.random.default_rng(3)
    inputs = example.inputs(rng, 5)
    one = jax.jit(functools.partial(step, example.recurrence))
    state, outputs = None, []
    for t in range(5):
        y, state = one(jax.tree.map(lambda x, t=t: x[t], inputs), state)
        outputs.append(y)
    expected = scan(example.recurrence, inputs, method="sequential")
    chex.assert_trees_all_close((jnp.stack(outputs), state), expected, rtol=ROUNDING, atol=ROUNDING)


def test_a_reset_on_padding_still_resets_and_a_kept_first_flag_continues() -> None:
    inputs = AFFINE.inputs(np.random.default_rng(4), 4)
    valid, reset = np.array([True, False, True, True]), np.array([False, True, False, False])
    later, _ = loop(AFFINE, jax.tree.map(lambda x: x[2:], inputs), None, None, None)
    for options in METHODS[:2]:
        run = jax.jit(functools.partial(scan, AFFINE.recurrence, **options))
        outputs, _ = run(inputs, jnp.full(3, 9.0), reset=reset, valid=valid)
        chex.assert_trees_all_close(outputs[2:], later, rtol=ROUNDING, atol=ROUNDING)


def test_padding_meets_no_singular_point() -> None:
    """Elements that are divided by their norm have no gradient at zero, and padding must not put them there."""

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(w: jax.Array, method: str) -> jax.Array:
        unit = lambda x: (jnp.zeros(3), w @ x / jnp.linalg.norm(w @ x))
        recurrence = AFFINE.recurrence._replace(elements=unit, read=lambda s, x: s, initial=lambda x: jnp.zeros(3))
        inputs = jnp.where(valid[:, None], jnp.arange(1.0, 13.0).reshape(4, 3), jnp.nan)
        return jnp.sum(scan(recurrence, inputs, valid=valid, method=method)[0] ** 2)

    valid = jnp.array([False, True, True, False])
    for method in ("sequential", "associative"):
        chex.assert_tree_all_finite(gradient(jnp.eye(3) + 0.1, method))


def test_a_function_of_update_alone_never_builds_elements() -> None:
    def refuse(_: Any) -> Any:
        raise AssertionError("the sequential form has `update` and needs no element")

    recurrence = AFFINE.recurrence._replace(
        elements=refuse, update=lambda x, s: jnp.exp(x["log_decay"]) * s + x["drive"]
    )
    inputs = AFFINE.inputs(np.random.default_rng(5), 6)
    expected = loop(AFFINE, inputs, None, None, None)
    chex.assert_trees_all_close(scan(recurrence, inputs, method="sequential"), expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("options", METHODS[:2] + METHODS[3:4], ids=lambda m: m["method"])
def test_gradients_of_inputs_and_initial_state_through_outputs_and_final_state(options: dict, x64: None) -> None:
    rng = np.random.default_rng(6)
    inputs, state = jax.tree.map(lambda x: x.astype(jnp.float64), (AFFINE.inputs(rng, 5), AFFINE.state(rng)))
    reset, valid = jnp.arange(5) == 3, jnp.arange(5) != 2

    @jax.jit
    def loss(inputs: Any, state: Any) -> jax.Array:
        outputs, final = scan(AFFINE.recurrence, inputs, state, reset=reset, valid=valid, **options)
        return jnp.sum(jnp.sin(outputs)) + jnp.sum(jnp.cos(final))

    check_grads(loss, (inputs, state), order=1, modes=["rev"])
    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(_poisoned(inputs, valid), state)
    chex.assert_tree_all_finite(grads)
    chex.assert_trees_all_equal(jax.tree.map(lambda g: g[2], grads[0]), jax.tree.map(lambda x: 0 * x[2], inputs))
    product = lambda x, s: jnp.sum(jnp.sin(scan(PRODUCT.recurrence, x, s, **options)[1]))
    args = jax.tree.map(lambda x: x.astype(jnp.float64), (PRODUCT.inputs(rng, 5), PRODUCT.state(rng)))
    check_grads(jax.jit(product), args, order=1, modes=["rev"])


def test_a_wrong_gradient_is_seen(x64: None) -> None:
    """The control of the test above: the same check refuses a gradient that is 1 % off."""
    x = jnp.linspace(0.1, 1.0, 5)

    @jax.custom_vjp
    def off(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(x))

    off.defvjp(lambda x: (off(x), x), lambda x, g: (1.01 * g * jnp.cos(x),))
    with pytest.raises(AssertionError, match="tolerance"):
        check_grads(off, (x,), order=1, modes=["rev"])


def test_states_are_at_least_float32_and_integers_stay() -> None:
    inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), AFFINE.inputs(np.random.default_rng(7), 9))
    for options in METHODS:
        run = functools.partial(scan, AFFINE.recurrence, **options)
        _, state = jax.eval_shape(run, inputs, jnp.zeros(3, jnp.bfloat16))
        assert state.dtype == jnp.float32
    maximum = EXAMPLES[-1]
    for options in METHODS:
        run = functools.partial(scan, maximum.recurrence, **options)
        _, (value, count) = jax.eval_shape(run, maximum.inputs(np.random.default_rng(7), 9))
        assert (value.dtype, count.dtype) == (jnp.float32, jnp.int32)


def test_a_complex_decay_widens_a_real_state() -> None:
    recurrence = AFFINE.recurrence._replace(act=lambda e, s: jnp.exp(e[0]) * s + e[1], initial=lambda x: jnp.zeros(3))
    inputs = AFFINE.inputs(np.random.default_rng(8), 9)
    inputs["log_decay"] = inputs["log_decay"] + 1j
    decay, drive = np.exp(np.asarray(inputs["log_decay"])), np.asarray(inputs["drive"])
    expected = np.zeros(3, complex)
    for a, b in zip(decay, drive, strict=True):
        expected = a * expected + b
    for options in METHODS[:4]:
        _, state = jax.jit(functools.partial(scan, recurrence, **options))(inputs)
        assert state.dtype == jnp.complex64
        np.testing.assert_allclose(state, expected, rtol=ROUNDING, atol=ROUNDING)


def test_batch_and_heads_come_from_vmap_and_a_second_call_compiles_nothing() -> None:
    rng = np.random.default_rng(9)
    rows = [AFFINE.inputs(rng, LENGTH) for _ in range(2)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    chex.clear_trace_counter()
    run = jax.jit(jax.vmap(chex.assert_max_traces(lambda x: scan(AFFINE.recurrence, x), n=1)))
    outputs, _ = run(batch)
    run(jax.tree.map(lambda x: x * 0.5, batch))
    expected = np.stack([loop(AFFINE, row, None, None, None)[0] for row in rows])
    chex.assert_trees_all_close(outputs, expected, rtol=ROUNDING, atol=ROUNDING)


def test_the_backward_pass_keeps_one_state_a_chunk() -> None:
    """No array of T dense states in the compiled gradient: chunks are recomputed from their carry."""
    length, size = 256, 24
    recurrence = AFFINE.recurrence._replace(
        elements=lambda x: (jnp.zeros(()), x[:, None] * x[None]),
        read=lambda s, x: s @ x,
        initial=lambda x: jnp.zeros((size, size)),
    )
    loss = lambda x: jnp.sum(scan(recurrence, x, method="chunked", chunk=16)[0])
    text = jax.jit(jax.grad(loss)).lower(jnp.ones((length, size))).as_text()
    assert f"tensor<16x{size}x{size}xf32>" in text
    assert f"tensor<{length}x{size}x{size}xf32>" not in text
    assert f"tensor<16x16x{size}x{size}xf32>" not in text
