"""Parameters that several layers of a stack hold together, as HGRN2's lower bounds of forget gates."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from seqmodels import params
from seqmodels.params import Group, param
from seqmodels.typing import ChannelConfig, Initializer, MixerConfig

ACROSS = "across"
"""`context.shared[ACROSS]` is a layer's part of what its config's `across_layers` declares, None without one."""


@dataclasses.dataclass(frozen=True)
class AcrossLayers:
    """One parameter `[layers, *shape]`, with a row for every layer of a stack whose config declares this `name`.

    `share` turns it into what the layers get: arrays whose first axis is the layer. Rows are in the order of the
    layers; layers that declare nothing have none. `axes` are the logical axes of `shape`. Declarations of one name have
    to be equal, up to `init`: the first layer's is taken, as initialisers are functions made anew by each call.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer = dataclasses.field(compare=False)
    share: Callable[[Array], Any]
    group: Group = Group.DYNAMICS


class Across(nnx.Module):
    """The parameters across the layers of a stack whose `groups` are `(configs of the steps, repeats)`.

    Calling it returns, per group and step, what each repeat gets, along a leading axis; None for steps that declare
    nothing. `parameter_axis`: the mesh axis over which parameters are sharded, if any.
    """

    def __init__(
        self, width: int, groups: Sequence[tuple[Sequence[MixerConfig | ChannelConfig], int]], *, rngs: nnx.Rngs
    ):
        declared: dict[str, AcrossLayers] = {}
        rows: collections.Counter[str] = collections.Counter()
        places = []
        for configs, repeats in groups:
            own: list[AcrossLayers | None] = [config.across_layers(width) for config in configs]
            stride = collections.Counter(d.name for d in own if d is not None)
            seen: collections.Counter[str] = collections.Counter()
            steps: list[tuple[str, int, int, int] | None] = []
            for declaration in own:
                if declaration is None:
                    steps.append(None)
                    continue
                name = declaration.name
                if declared.setdefault(name, declaration) != declaration:
                    raise ValueError(
                        f"layers declare different parameters across layers as {name!r}: {declared[name]} and "
                        f"{declaration}; layers that share one need equal declarations, others a name of their own"
                    )
                first = rows[name] + seen[name]
                steps.append((name, first, first + stride[name] * repeats, stride[name]))
                seen[name] += 1
            for name, count in stride.items():
                rows[name] += count * repeats
            places.append(tuple(steps))
        self.places = tuple(places)
        self.shares = tuple((name, declaration.share) for name, declaration in declared.items())
        self.stacked = nnx.Dict(
            {
                name: param(rngs, (rows[name], *d.shape), d.init, group=d.group, axes=("layers", *d.axes))
                for name, d in declared.items()
            }
        )

    def __call__(self, parameter_axis: str | None) -> list[tuple[Any, ...]]:
        shared = {name: share(params.whole(self.stacked[name], parameter_axis)) for name, share in self.shares}
        return [tuple(None if place is None else _rows(shared, *place) for place in steps) for steps in self.places]


def _rows(shared: dict[str, Any], name: str, first: int, stop: int, stride: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[first:stop:stride], shared[name])
