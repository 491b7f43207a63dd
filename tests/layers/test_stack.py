"""The stack against a plain loop over layers, its hook for shared values, and what grows with depth."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import params
from seqmodels.layers import Block, MLPConfig, Stack
from seqmodels.layers.stack import LAYER
from seqmodels.params import Group
from seqmodels.typing import ChannelConfig, Context, MixerConfig

WIDTH = 4
# A handful of float32 operations, compiled in another way.
ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class RunningSum(MixerConfig):
    """y_t = gain * sum of x up to t; `publishing` adds the first layer's input, which it publishes."""

    publishing: bool = False

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> nnx.Module:
        return (Publisher if self.publishing else Summer)(width, layer, depth, rngs)


class Summer(nnx.Module):
    def __init__(self, width: int, layer: int, depth: int, rngs: nnx.Rngs) -> None:
        init = lambda key, shape, dtype: jnp.full(shape, 1.0 + layer / depth, dtype)
        self.gain = params.param(rngs, (width,), init, group=Group.DYNAMICS, axes=("embed",))

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> Any:
        return jnp.zeros((batch, WIDTH))

    def __call__(self, x: Any, state: Any, context: Context) -> tuple[Any, Any]:
        total = jnp.cumsum(x, axis=1) + (0 if state is None else state[:, None])
        return total * self.gain[...][None, None], total[:, -1]


class Publisher(Summer):
    def publish(self, x: Any, context: Context) -> Context:
        first = context.shared.get("first", jnp.zeros_like(x))
        return context.replace(shared={**context.shared, "first": jnp.where(context.shared[LAYER] == 0, x, first)})

    def __call__(self, x: Any, state: Any, context: Context) -> tuple[Any, Any]:
        y, state = super().__call__(x, state, context)
        return y + 10 * context.shared["first"], state


@dataclasses.dataclass(frozen=True)
class Reporting(ChannelConfig):
    """Does nothing and reports its layer number, and `extra` under its own name."""

    extra: bool = False

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> nnx.Module:
        return Reporter(layer, self.extra, rngs)


class Reporter(nnx.Module):
    def __init__(self, layer: int, extra: bool, rngs: nnx.Rngs) -> None:
        init = lambda key, shape, dtype: jnp.full(shape, float(layer), dtype)
        self.number = params.param(rngs, (), init, group=Group.DYNAMICS, axes=())
        self.extra = extra

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> Any:
        return ()

    def __call__(self, x: Any, state: Any, context: Context) -> tuple[Any, Any, dict[str, Any]]:
        aux = {"number": self.number[...], "running": context.shared[LAYER].astype(jnp.float32)}
        return jnp.zeros_like(x), (), aux | ({"extra": jnp.float32(2.0)} if self.extra else {})


@dataclasses.dataclass(frozen=True)
class Noise(ChannelConfig):
    """A unit normal."""

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> nnx.Module:
        return Noisy(layer, False, rngs)


@dataclasses.dataclass(frozen=True)
class Hiss(MixerConfig):
    """A unit normal, from a mixer."""

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> nnx.Module:
        return Hissing(layer, False, rngs)


class Noisy(Reporter):
    def __call__(self, x: Any, state: Any, context: Context) -> tuple[Any, Any, dict[str, Any]]:
        return jax.random.normal(context.key, x.shape), (), {}


class Hissing(Reporter):
    def __call__(self, x: Any, state: Any, context: Context) -> tuple[Any, Any]:
        return jax.random.normal(context.key, x.shape), ()


R, P = RunningSum(), RunningSum(publishing=True)
M = MLPConfig(expansion=2)


def tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, WIDTH)), jnp.float32)


def by_hand(stack: Stack, x: jax.Array, context: Context) -> jax.Array:
    """The same layers in a Python loop, each repeat's parameters taken out of the stack."""
    number, shared = 0, {}
    for group, repeats in zip(stack.groups, stack.repeats, strict=True):
        definition, arrays = params.split(group)
        for repeat in range(repeats):
            period = params.merge(definition, jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], arrays))
            for step, offset in zip(period.steps, period.layers, strict=True):
                power = jnp.mean(x**2, axis=-1, keepdims=True)
                normed = x / jnp.sqrt(power + 1e-6) * step.norm.scale[...][None, None]
                inner = context.replace(shared={**shared, LAYER: jnp.int32(number + offset)})
                if hasattr(step.layer, "publish"):
                    inner = step.layer.publish(normed, inner)
                    shared = {"first": inner.shared["first"]}
                x = x + step.layer(normed, None, inner)[0]
            number += max(period.layers) + 1
    return x


@pytest.mark.parametrize(
    ("layers", "channel"),
    [
        ((((R, M), 3), ((R,), 1)), None),
        ((((R, Block(R, M)), 2),), M),
        ((((R,), 1), ((P, R), 2), ((P,), 1)), None),
        ((((P,), 3),), M),
    ],
)
def test_equals_a_loop(layers: Any, channel: Any) -> None:
    stack = Stack(WIDTH, layers, rngs=nnx.Rngs(0), channel=channel)
    x, context = tokens(), Context.whole(2, 5)
    y, _, _ = stack(x, None, context)
    chex.assert_trees_all_close(y, by_hand(stack, x, context), rtol=ROUNDING, atol=ROUNDING)


def test_order_and_numbers_of_layers() -> None:
    stack = Stack(WIDTH, (((R, M, R), 2), ((R,), 3)), rngs=nnx.Rngs(0), channel=Reporting())
    assert [len(group.steps) for group in stack.groups] == [5, 2]
    first, second = stack.groups
    gains = [first.steps[0].layer.gain, first.steps[3].layer.gain, second.steps[0].layer.gain]
    numbers = [[round(float(g) * 9) - 9 for g in gain[...][:, 0]] for gain in gains]  # 1 + layer / 9
    assert numbers == [[0, 3], [2, 5], [6, 7, 8]]
    _, _, aux = stack(tokens(), None, Context.whole(2, 5))
    np.testing.assert_allclose(aux["number"], np.mean([0, 2, 3, 5, 6, 7, 8]), rtol=1e-6)
    np.testing.assert_allclose(aux["running"], aux["number"], rtol=1e-6)


def test_auxiliary_scalars_are_means_over_the_layers_that_report_them() -> None:
    layers = (((R, Reporting()), 3), ((R, Reporting(extra=True)), 1))
    aux = Stack(WIDTH, layers, rngs=nnx.Rngs(0))(tokens(), None, Context.whole(2, 5))[2]
    assert {name: float(value) for name, value in aux.items()} == {
        "number": 4.0,
        "running": 4.0,
        "extra": 2.0,
    }


def test_states_continue_and_fresh_ones_have_their_structure() -> None:
    stack = Stack(WIDTH, (((R, M), 2), ((P,), 1)), rngs=nnx.Rngs(0))
    x, continued = tokens(), lambda n: Context.whole(2, n, fresh=False)
    whole, after, _ = stack(x, None, Context.whole(2, 5))
    state = stack.init_state(2)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    first, state, _ = stack(x[:, :2], state, continued(2))
    second, state, _ = stack(x[:, 2:], state, continued(3))
    chex.assert_trees_all_close(state, after, rtol=ROUNDING, atol=ROUNDING)
    chex.assert_trees_all_close(jnp.concatenate([first, second], 1), whole, rtol=ROUNDING, atol=ROUNDING)


def test_remat_changes_the_program_and_not_the_gradient() -> None:
    x, found, programs = tokens(), [], []
    for remat in (True, False):
        stack = Stack(WIDTH, (((R, M), 3),), rngs=nnx.Rngs(0), remat=remat)
        definition, arrays = params.split(stack)
        loss = lambda arrays, definition=definition: jnp.sum(
            params.merge(definition, arrays)(x, None, Context.whole(2, 5))[0] ** 2
        )
        found.append(jax.grad(loss)(arrays))
        programs.append(str(jax.make_jaxpr(loss)(arrays)))
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-5)
    assert ["remat" in program or "checkpoint" in program for program in programs] == [True, False]


def test_the_program_does_not_grow_with_repeats() -> None:
    def lines(repeats: int) -> int:
        stack = Stack(WIDTH, (((P, M), repeats),), rngs=nnx.Rngs(0))
        definition, arrays = params.split(stack)
        run = lambda arrays: params.merge(definition, arrays)(tokens(), None, Context.whole(2, 5))[0]
        return jax.jit(jax.grad(lambda arrays: jnp.sum(run(arrays)))).lower(arrays).as_text().count("\n")

    assert lines(2) == lines(7)


def test_every_layer_has_a_key_of_its_own() -> None:
    layers = (((Block(Hiss(), Noise()), Noise()), 2), ((Noise(),), 3))
    stack = Stack(WIDTH, layers, rngs=nnx.Rngs(0))
    silence = jnp.zeros((512, 5, WIDTH))
    draw = lambda seed: stack(silence, None, Context.whole(512, 5).replace(key=jax.random.key(seed)))[0]
    # Nine independent unit normals; one key in common would make it the root of eleven, a tenth more.
    np.testing.assert_allclose(np.std(draw(0)), 3.0, rtol=0.04)
    chex.assert_trees_all_equal(draw(0), draw(0))
    assert not np.allclose(draw(0), draw(1))


def test_padding_may_hold_nan() -> None:
    stack = Stack(WIDTH, (((R, M), 2),), rngs=nnx.Rngs(0))
    context = Context.whole(2, 5)
    context = context.replace(segments=context.segments._replace(valid=jnp.ones((2, 5), bool).at[:, 4].set(False)))
    poisoned = tokens().at[:, 4].set(jnp.nan)
    chex.assert_tree_all_finite(stack(poisoned, None, context)[0])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "holds no group"),
        (((R, R), 2), "not a layer group"),
        ((((), 2),), "empty pattern"),
        ((((R,), 0),), "repeated 0 times"),
        ((((R,), 2.0),), "repeated 2.0 times"),
    ],
)
def test_errors_of_layer_groups(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stack(WIDTH, layers, rngs=nnx.Rngs(0))


def test_errors_of_pattern_elements() -> None:
    with pytest.raises(TypeError, match=r"not 'attention'.*typing.MixerConfig"):
        Stack(WIDTH, ((("attention",), 1),), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"Block\.channel must be a ChannelConfig"):
        Block(R, R)
