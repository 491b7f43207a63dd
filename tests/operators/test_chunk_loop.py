"""The loop over chunks on CPUs against a loop over chunks in Python."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from seqmodels.operators.chunk_loop import chunk_loop

B, T, H, K = 4, 11, 6, 3
ROUNDING_64 = 1e-13


def arrays(heads: bool) -> tuple[Any, ...]:
    """A weight that the body closes over, a state, steps, weights of the outputs and a mask."""
    random = np.random.default_rng(0)
    across = (H,) if heads else ()
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape))
    steps = {"x": draw(B, T, *across, K), "gate": draw(B, T, *across)}
    return draw(K), draw(B, *across, K), steps, draw(B, T, *across, K), jnp.asarray(random.random((B, T)) < 0.8)


def body_of(weight: Any) -> Any:
    """Something of every kind: sums over the steps of a chunk, a nonlinear state, outputs before and after it."""

    def body(state: Any, xs: Any) -> tuple[Any, Any]:
        steps, mask = xs
        seen = jnp.where(mask.reshape(*mask.shape, *(1,) * (steps["x"].ndim - 2)), steps["x"], 0)
        fresh = jnp.cumsum(seen * jnp.exp(steps["gate"])[..., None], axis=1)
        scaled = lambda x: jnp.einsum("...k,k->...k", x, weight)
        out = scaled(fresh) + jnp.sin(state)[:, None]
        return jnp.tanh(scaled(state) + fresh[:, -1]), {"out": out, "steps": steps["gate"] + state.sum(-1)[:, None]}

    return body


def by_hand(weight: Any, state: Any, steps: Any, mask: Any, *, chunk: int, **_: Any) -> Any:
    outputs = []
    for start in range(0, T, chunk):
        xs = jax.tree.map(lambda x: x[:, start : start + chunk], (steps, mask))  # noqa: B023
        state, out = body_of(weight)(state, xs)
        outputs.append(out)
    return state, jax.tree.map(lambda *y: jnp.concatenate(y, 1), *outputs)


def looped(weight: Any, state: Any, steps: Any, mask: Any, **cut: Any) -> Any:
    return chunk_loop(body_of(weight), state, (steps, mask), **cut)


def both(run: Any, **cut: Any) -> Any:
    """Everything that comes out, and gradients of everything that goes in but the mask."""
    weight, state, steps, of_outputs, mask = arrays("heads" in cut)

    def loss(*given: Any) -> Any:
        state, outputs = run(*given, mask, **cut)
        return jnp.sum(jnp.cos(state)) + jnp.sum(outputs["out"] * of_outputs) + jnp.sum(outputs["steps"] ** 2), (
            state,
            outputs,
        )

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(weight, state, steps)


@pytest.mark.parametrize(
    "cut",
    [
        {"rows": 4, "chunk": 4}, {"rows": 2, "chunk": 11}, {"rows": 1, "chunk": 1}, {"rows": 4, "chunk": 20},
        {"rows": 4, "chunk": 4, "heads": 6}, {"rows": 1, "chunk": 4, "heads": 2}, {"rows": 2, "chunk": 5, "heads": 6},
        {"rows": 4, "chunk": 20, "heads": 3},
    ],
    ids=str,
)  # fmt: skip
def test_values_states_and_gradients(cut: dict[str, int]) -> None:
    """Whole chunks and a shorter one, or a row shorter than a chunk; all rows and heads, or some at a time."""
    with jax.enable_x64(True):
        expected, found = both(by_hand, **cut), both(looped, **cut)
    chex.assert_trees_all_close(found, expected, rtol=ROUNDING_64, atol=ROUNDING_64)


def test_the_gradient_of_a_gradient() -> None:
    def twice(run: Any) -> Any:
        weight, state, steps, _, mask = arrays(False)
        slope = lambda weight: jax.grad(lambda w: jnp.sum(run(w, state, steps, mask, rows=2, chunk=4)[0]))(weight)
        return jax.jit(jax.grad(lambda weight: jnp.sum(slope(weight) ** 2)))(weight)

    with jax.enable_x64(True):
        chex.assert_trees_all_close(twice(looped), twice(by_hand), rtol=ROUNDING_64, atol=ROUNDING_64)


def test_a_batch_of_them() -> None:
    """`jax.vmap` over everything, what the body closes over and the mask included."""

    def slopes(run: Any) -> Any:
        given = [jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), part) for part in arrays(False)]

        def loss(weight: Any, state: Any, steps: Any, of_outputs: Any, mask: Any) -> Any:
            state, outputs = run(weight, state, steps, mask, rows=2, chunk=4)
            return jnp.sum(jnp.cos(state)) + jnp.sum(outputs["out"] * of_outputs)

        return jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1, 2))))(*given)

    with jax.enable_x64(True):
        chex.assert_trees_all_close(slopes(looped), slopes(by_hand), rtol=ROUNDING_64, atol=ROUNDING_64)


def test_a_state_with_whole_numbers() -> None:
    """A count beside the state has no gradient and stops none."""

    def counting(weight: Any, state: Any, steps: Any, mask: Any, run: Any) -> Any:
        body = lambda state, xs: (
            (body_of(weight)(state[0], xs)[0], state[1] + jnp.sum(xs[1], axis=1)),
            body_of(weight)(state[0], xs)[1]["out"] * (1 + state[1])[:, None, None],
        )
        return run(body, (state, jnp.zeros(B, int)), (steps, mask))

    def in_python(body: Any, state: Any, xs: Any) -> Any:
        outputs = []
        for start in range(0, T, 4):
            state, out = body(state, jax.tree.map(lambda x: x[:, start : start + 4], xs))  # noqa: B023
            outputs.append(out)
        return state, jnp.concatenate(outputs, 1)

    def slopes(run: Any) -> Any:
        weight, state, steps, of_outputs, mask = arrays(False)

        def loss(*given: Any) -> Any:
            (state, count), out = counting(*given, mask, run)
            return jnp.sum(jnp.cos(state)) + jnp.sum(out * of_outputs), count

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(weight, state, steps)

    with jax.enable_x64(True):
        loop = functools.partial(chunk_loop, rows=2, chunk=4)
        chex.assert_trees_all_close(slopes(loop), slopes(in_python), rtol=ROUNDING_64, atol=ROUNDING_64)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_device_for_each_part_of_the_heads(check_vma: bool) -> None:
    """What the body closes over is on all devices: its gradient is the sum of theirs."""
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    over = P(None, None, "heads")

    def spread(weight: Any, state: Any, steps: Any, mask: Any, **cut: Any) -> Any:
        run = lambda *given: looped(*given, **cut)
        specs = (P(), P(None, "heads"), over, P())
        out_specs = (P(None, "heads"), over)
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=check_vma)(
            weight, state, steps, mask
        )

    cut = {"rows": 2, "chunk": 4, "heads": 3}
    with jax.enable_x64(True):
        chex.assert_trees_all_close(both(spread, **cut), both(by_hand, **cut), rtol=ROUNDING_64, atol=ROUNDING_64)


def test_forward_mode_does_not_pass() -> None:
    weight, state, steps, _, mask = arrays(False)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda state: looped(weight, state, steps, mask, rows=4, chunk=4)[0], (state,), (state,))
