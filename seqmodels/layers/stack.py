"""Blocks of a model under `lax.scan`: compile time does not grow with the number of repeats."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqmodels import compat, params
from seqmodels.layers.across import ACROSS, Across
from seqmodels.layers.dropout import check_dropout, dropout
from seqmodels.layers.norms import NormConfig
from seqmodels.typing import ChannelConfig, Context, MixerConfig

LAYER = "layer"
"""`context.shared[LAYER]` is the number of the layer that runs, for `publish` (int32, from 0)."""
# Up to so many repeats that are not recomputed are laid out one after the other.
UNROLLED = 4
STATE = "state"
"""`context.shared[STATE]` is the state of the layer that runs, or None, for `publish`."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A mixer followed by a channel layer, each a pre-norm residual step."""

    mixer: MixerConfig
    channel: ChannelConfig

    def __post_init__(self):
        for field, base in (("mixer", MixerConfig), ("channel", ChannelConfig)):
            if not isinstance(getattr(self, field), base):
                raise TypeError(f"Block.{field} must be a {base.__name__}, not {getattr(self, field)!r}")


Element = MixerConfig | ChannelConfig | Block
LayerGroups = tuple[tuple[tuple[Element, ...], int], ...]


def layer_configs(element: Element, channel: ChannelConfig | None) -> tuple[MixerConfig | ChannelConfig, ...]:
    """The residual steps of one pattern element; a bare mixer is followed by `channel`, if there is one."""
    if isinstance(element, Block):
        return (element.mixer, element.channel)
    if isinstance(element, MixerConfig):
        return (element,) if channel is None else (element, channel)
    if isinstance(element, ChannelConfig):
        return (element,)
    raise TypeError(
        f"a pattern holds mixer configs, channel configs and Blocks, not {element!r}; "
        "configs of your own derive from seqmodels.typing.MixerConfig or ChannelConfig"
    )


def check_layers(layers: LayerGroups) -> None:
    """Raises on anything that is not a non-empty tuple of `(pattern, repeats)` groups."""
    form = "write groups of (pattern, repeats), e.g. (((R, R, A), 8), ((R, R), 1))"
    if not isinstance(layers, tuple | list) or not layers:
        raise ValueError(f"layers={layers!r} holds no group; {form}")
    for group in layers:
        if not isinstance(group, tuple | list) or len(group) != 2 or not isinstance(group[0], tuple | list):
            raise ValueError(f"{group!r} is not a layer group; {form}")
        pattern, repeats = group
        if not pattern:
            raise ValueError(f"a layer group has an empty pattern; {form}")
        if not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"a layer group is repeated {repeats!r} times; repeats must be an integer of at least 1")
        for element in pattern:
            layer_configs(element, None)


def configs_of(layers: LayerGroups) -> Iterator[MixerConfig | ChannelConfig]:
    """Every config of every pattern."""
    for pattern, _ in layers:
        for element in pattern:
            yield from layer_configs(element, None)


def alignment(layers: LayerGroups) -> int:
    """Documents that are packed for these layers have to start at multiples of this."""
    return math.lcm(*(config.alignment for config in configs_of(layers) if isinstance(config, MixerConfig)))


class Residual(nnx.Module):
    """x + dropout(layer(norm(x))), for a mixer or a channel layer."""

    def __init__(
        self,
        config: MixerConfig | ChannelConfig,
        width: int,
        *,
        layer: int,
        depth: int,
        dropout: float,
        norm: NormConfig,
        rngs: nnx.Rngs,
    ):
        self.is_channel = isinstance(config, ChannelConfig)
        self.dropout = dropout
        self.norm = norm.make(width, rngs=rngs)
        self.layer = config.make(width, layer=layer, depth=depth, rngs=rngs)

    def __call__(self, x: Array, state: Any, context: Context) -> tuple[Array, Any, dict[str, Array], Context]:
        normed = self.norm(x)
        if hasattr(self.layer, "publish"):
            context = self.layer.publish(normed, context.replace(shared={**context.shared, STATE: state}))
            context = context.replace(shared={k: v for k, v in context.shared.items() if k != STATE})
        y, state, *aux = self.layer(normed, state, context)
        return x + dropout(y.astype(x.dtype), self.dropout, context), state, aux[0] if self.is_channel else {}, context


class Period(nnx.Module):
    """The residual steps of one repeat of a pattern; `layers` numbers the pattern element that each belongs to."""

    def __init__(self, steps: list[Residual], layers: tuple[int, ...]):
        self.steps = nnx.List(steps)
        self.layers = layers

    def __call__(
        self, x: Array, states: Any, context: Context, first: Array, across: tuple[Any, ...]
    ) -> tuple[Array, Any, list[dict[str, Array]], dict[str, Any]]:
        shared, after, reports = dict(context.shared), [], []
        for index, (step, offset) in enumerate(zip(self.steps, self.layers, strict=True)):
            layer = first + offset
            key = context.key
            if key is not None:  # a Block has two steps of the same number
                key = jax.random.fold_in(jax.random.fold_in(key, layer), index)
            inner = context.replace(shared={**shared, LAYER: layer, ACROSS: across[index]}, key=key)
            x, state, aux, inner = step(x, None if states is None else states[index], inner)
            shared = {name: value for name, value in inner.shared.items() if name not in (LAYER, ACROSS)}
            after.append(state)
            reports.append(aux)
        return x, tuple(after), reports, shared


class Stack(nnx.Module):
    """Groups of repeated patterns of pre-norm residual steps: `stack(x, state, context) -> (x, state, aux)`.

    The repeats of a pattern are one module with stacked parameters, run by `lax.scan`; with `remat` the backward pass
    recomputes each period from its input. `state` holds, per group and step, the states of all repeats along a leading
    axis; `state=None` starts fresh. `aux` maps a name to its mean over the layers that report it.

    A layer may define `publish(x, context) -> context`, called with its (normalised) input before the layer itself;
    what it puts into `context.shared` reaches every later layer. Before the first layer has published, the entry is
    zero: `context.shared[LAYER]` tells the first layer from the others.
    `context.shared[STATE]` is the state that the layer itself is about to get.

    Where a config's `across_layers` declares a parameter of several layers together (`AcrossLayers`), it is made here,
    and each of those layers finds its part in `context.shared[ACROSS]`.

    `context.key` is folded with the number of each layer and step; `dropout` is the rate on what each step adds, drawn
    only where there is a key.
    """

    def __init__(
        self,
        width: int,
        layers: LayerGroups,
        *,
        rngs: nnx.Rngs,
        channel: ChannelConfig | None = None,
        remat: bool = True,
        dropout: float = 0.0,
        norm: NormConfig | None = None,
    ):
        check_layers(layers)
        check_dropout(dropout)
        self.width = width
        self.remat = remat
        self.repeats = tuple(repeats for _, repeats in layers)
        self.periods = tuple(len(pattern) for pattern, _ in layers)
        depth = sum(length * repeats for length, repeats in zip(self.periods, self.repeats, strict=True))
        make = functools.partial(
            Residual, width=width, depth=depth, dropout=dropout, norm=norm or NormConfig(), rngs=rngs
        )
        groups, layer = [], 0
        for pattern, repeats in layers:
            made = []
            for _ in range(repeats):
                steps, numbers = [], []
                for number, element in enumerate(pattern):
                    for config in layer_configs(element, channel):
                        steps.append(make(config, layer=layer + number))
                        numbers.append(number)
                made.append(Period(steps, tuple(numbers)))
                layer += len(pattern)
            groups.append(params.stack(made))
        self.groups = nnx.List(groups)
        configs = [([c for e in pattern for c in layer_configs(e, channel)], repeats) for pattern, repeats in layers]
        self.across = Across(width, configs, rngs=rngs)

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = jnp.float32) -> tuple[Any, ...]:
        def of_group(group: Period, repeats: int) -> Any:
            definition, arrays = params.split(group)

            def of_repeat(arrays: Any) -> Any:
                steps = params.merge(definition, arrays).steps
                return tuple(step.layer.init_state(batch, capacity, dtype) for step in steps)

            return jax.vmap(of_repeat, axis_size=repeats)(arrays)

        return tuple(of_group(group, repeats) for group, repeats in zip(self.groups, self.repeats, strict=True))

    def __call__(
        self, x: Float[Array, "B T D"], state: tuple[Any, ...] | None, context: Context
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...], dict[str, Array]]:
        x = jnp.where(context.segments.valid[..., None], x, 0)
        first, after, reports = 0, [], []
        across = self.across(context.parameter_axis)
        for index, group in enumerate(self.groups):
            inner = None if state is None else state[index]
            x, inner, aux, context = self._run(index, group, first, x, inner, across[index], context)
            first += self.periods[index] * self.repeats[index]
            after.append(inner)
            reports += aux
        return x, tuple(after), _mean(reports)

    def _run(
        self, index: int, group: Period, first: int, x: Array, state: Any, across: tuple[Any, ...], context: Context
    ) -> tuple[Array, Any, list[dict[str, Array]], Context]:
        definition, arrays = params.split(group)

        def body(carry, repeat):
            x, shared = carry
            arrays, state, first, across = repeat
            period = params.gathered(params.merge(definition, arrays), context.parameter_axis)
            x, state, aux, shared = period(x, state, context.replace(shared=shared), first, across)
            return (x, shared), (state, aux)

        numbers = first + self.periods[index] * jnp.arange(self.repeats[index], dtype=jnp.int32)
        xs = (arrays, state, numbers, across)
        shared = dict(context.shared)
        if any(hasattr(step.layer, "publish") for step in group.steps):
            # The carry of a scan keeps its structure: what a period publishes stands there, as zeros, from the start.
            one = jax.tree.map(lambda a: a[0], xs)
            published = jax.eval_shape(lambda x, one: body((x, shared), one)[0][1], x, one)
            zeros = lambda a: compat.vary_over(jnp.zeros(a.shape, a.dtype), compat.varying_axes(a))
            shared = jax.tree.map(zeros, published) | shared
        repeats = self.repeats[index]
        # A loop of one turn would cost a third more to compile. Without recomputation a loop writes all that the
        # backward pass needs into stacks, and reads it out of them: a fifth of a step's time on a CPU.
        unrolled = repeats == 1 or (not self.remat and repeats <= UNROLLED)
        body = jax.checkpoint(body, prevent_cse=unrolled) if self.remat else body
        if unrolled:
            carry, turns = (x, shared), []
            for turn in range(repeats):
                carry, after = body(carry, jax.tree.map(lambda a, turn=turn: a[turn], xs))
                turns.append(after)
            (x, shared), (state, aux) = carry, jax.tree.map(lambda *a: jnp.stack(a), *turns)
        else:
            (x, shared), (state, aux) = jax.lax.scan(body, (x, shared), xs)
        return x, state, aux, context.replace(shared=shared)


def _mean(reports: list[dict[str, Array]]) -> dict[str, Array]:
    """Scalars per repeat, from every step that reports, as one mean per name."""
    names = sorted({name for report in reports for name in report})
    gathered = {name: [report[name] for report in reports if name in report] for name in names}
    return {name: jnp.mean(jnp.concatenate(values)) for name, values in gathered.items()}
