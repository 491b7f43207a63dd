"""Parameters across the layers of a stack: who gets which row, and that sharding, remat and scans change nothing."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqmodels import params
from seqmodels.layers import ACROSS, AcrossLayers, Block, MLPConfig, Stack
from seqmodels.params import Group
from seqmodels.typing import ChannelConfig, Context, MixerConfig

WIDTH = 4
# A handful of float32 operations, compiled in another way: of a number, and of its array's largest entry.
RELATIVE, ROUNDING = 1e-5, 1e-6


class Parts(NamedTuple):
    sum: Any
    own: Any


def parts(rows: jax.Array) -> Parts:
    return Parts(jnp.cumsum(rows, axis=0), rows)


@dataclasses.dataclass(frozen=True)
class Scaled(MixerConfig):
    """y = gain x part: the layer's own gain, and its part of what all layers of this `name` share."""

    name: str = "shared"
    size: int = WIDTH

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> nnx.Module:
        return Scaler(width, rngs)

    def across_layers(self, width: int) -> AcrossLayers:
        return AcrossLayers(self.name, (self.size,), ("embed",), jax.nn.initializers.normal(), parts)


class Scaler(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        init = jax.nn.initializers.normal()
        self.gain = params.param(rngs, (width,), init, group=Group.MATRIX, axes=("embed",))

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> Any:
        return ()

    def __call__(self, x: Any, state: Any, context: Context) -> Any:
        part = context.shared[ACROSS]
        assert isinstance(part, Parts)
        return x * (self.gain[...] + part.sum + 10 * part.own)[None, None], ()


@dataclasses.dataclass(frozen=True)
class ScaledChannel(ChannelConfig):
    """The same in a channel layer."""

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> nnx.Module:
        return ChannelScaler(width, rngs)

    def across_layers(self, width: int) -> AcrossLayers:
        return Scaled().across_layers(width)


class ChannelScaler(Scaler):
    def __call__(self, x: Any, state: Any, context: Context) -> Any:
        return *super().__call__(x, state, context), {}


@dataclasses.dataclass(frozen=True)
class Plain(MixerConfig):
    """Declares nothing and gets nothing."""

    def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> nnx.Module:
        return Nothing(width, rngs)


class Nothing(Scaler):
    def __call__(self, x: Any, state: Any, context: Context) -> Any:
        assert context.shared[ACROSS] is None
        return x * self.gain[...][None, None], ()


A, B, C, N = Scaled(), Scaled(name="other"), ScaledChannel(), Plain()
# (group, step, repeat) of the rows of the parameter that A and C share, and of B's, in the order of the layers.
LAYERS = (((A, N, Block(A, C), B), 2), ((N,), 1), ((B, A), 3))
SHARED = [(0, 0, 0), (0, 2, 0), (0, 3, 0), (0, 0, 1), (0, 2, 1), (0, 3, 1), (2, 1, 0), (2, 1, 1), (2, 1, 2)]
OTHER = [(0, 4, 0), (0, 4, 1), (2, 0, 0), (2, 0, 1), (2, 0, 2)]


def made(**options: Any) -> tuple[Any, Any]:
    """A stack's definition and its arrays, gains and rows of order one."""
    definition, arrays = params.split(Stack(WIDTH, LAYERS, rngs=nnx.Rngs(0), **options))
    random = np.random.default_rng(1)
    return definition, jax.tree.map(lambda leaf: np.float32(0.3 * random.standard_normal(leaf.shape)), arrays)


def tokens() -> np.ndarray:
    return np.float32(np.random.default_rng(0).standard_normal((2, 3, WIDTH)))


def run(definition: Any, arrays: Any, axis: str | None = None) -> Any:
    context = Context.whole(2, 3).replace(parameter_axis=axis)
    return params.merge(definition, arrays)(tokens(), None, context)[0]


def by_hand(arrays: Any) -> np.ndarray:
    """The same in a loop over groups, repeats and steps."""
    x, places = tokens(), {place: row for row, place in enumerate(SHARED)}
    others = {place: row for row, place in enumerate(OTHER)}
    for group, (steps, repeats) in enumerate([(5, 2), (1, 1), (2, 3)]):
        for repeat in range(repeats):
            for step in range(steps):
                of = jax.tree.map(lambda leaf, r=repeat: leaf[r], arrays["groups"][str(group)]["steps"][str(step)])
                scale = of["layer"]["gain"]
                for name, rows in (("shared", places), ("other", others)):
                    if (row := rows.get((group, step, repeat))) is not None:
                        table = arrays["across"]["stacked"][name]
                        scale = scale + table[: row + 1].sum(axis=0) + 10 * table[row]
                normed = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * of["norm"]["scale"]
                x = x + normed * scale
    return x


def test_every_layer_gets_its_own_row() -> None:
    """Patterns, repeats and groups, channel layers, layers in between that declare nothing, two names."""
    definition, arrays = made()
    chex.assert_shape(arrays["across"]["stacked"]["shared"], (len(SHARED), WIDTH))
    chex.assert_shape(arrays["across"]["stacked"]["other"], (len(OTHER), WIDTH))
    chex.assert_trees_all_close(
        jax.jit(run, static_argnums=0)(definition, arrays), by_hand(arrays), rtol=RELATIVE, atol=ROUNDING
    )


def assert_rounded(found: Any, expected: Any) -> None:
    def close(found: Any, expected: Any) -> None:
        largest = max(1.0, float(np.max(np.abs(expected))))
        np.testing.assert_allclose(found, expected, rtol=RELATIVE, atol=ROUNDING * largest)

    jax.tree.map(close, found, expected)


def test_remat_and_shards_change_nothing() -> None:
    """Outputs and gradients, the parameter's own included, recomputed or not, and gathered from four devices."""
    loss = lambda arrays, definition, axis=None: jnp.sum(run(definition, arrays, axis) ** 2)
    definition, arrays = made()
    value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(arrays, definition)
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(gradient["across"]))
    stored = jax.jit(jax.value_and_grad(loss), static_argnums=1)(arrays, made(remat=False)[0])
    assert_rounded(stored, (value, gradient))

    specs = params.partition_specs(params.merge(definition, arrays), {"embed": "fsdp", "layers": None})
    assert specs["across"]["stacked"]["shared"] == P(None, "fsdp")
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    inside = lambda arrays: loss(arrays, definition, "fsdp") / 4  # each device has the same loss
    one = lambda arrays: jax.value_and_grad(inside)(arrays)
    sharded = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=(specs,), out_specs=(P(), specs), check_vma=False))
    found, shards = sharded(arrays)
    assert_rounded((4 * found, shards), (value, gradient))


def test_what_the_parameter_declares() -> None:
    stack = Stack(WIDTH, LAYERS, rngs=nnx.Rngs(0))
    assert params.labels(stack)["across"]["stacked"] == {"shared": "dynamics", "other": "dynamics"}
    assert params.logical_axes(stack)["across"]["stacked"]["other"] == ("layers", "embed")
    plain = params.split(Stack(WIDTH, (((N, MLPConfig(expansion=1)), 2),), rngs=nnx.Rngs(0)))[1]
    assert set(plain) == {"groups"}


def test_one_name_is_one_parameter() -> None:
    with pytest.raises(ValueError, match=r"(?s)'shared'.*equal declarations, others a name of their own"):
        Stack(WIDTH, (((A, Scaled(size=8)), 1),), rngs=nnx.Rngs(0))
