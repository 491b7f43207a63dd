"""What a supported architecture is: its config both ways, and a table of its tensors (`seqmodels.hf.tables`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx, traverse_util

from seqmodels import params
from seqmodels.hf.fields import Fields
from seqmodels.hf.tables import TRANSPOSED, Rule, rule
from seqmodels.layers.stack import Element, LayerGroups, layer_configs
from seqmodels.models.lm import ModelConfig
from seqmodels.typing import ChannelConfig, MixerConfig

LayerConfig = MixerConfig | ChannelConfig
Path = tuple[str, ...]

RUN_AND_START = frozenset(
    {"dtype", "remat", "dropout", "method", "chunk", "decay_range", "step_range", "min_decay", "max_decay"}
    | {"input_bias", "forget_bias"}
)
"""Fields of configs that say how a model runs or how it is initialised, which a checkpoint does not."""
SIZES = frozenset(
    {"expansion", "hidden_size", "key_size", "value_size", "head_size", "kv_heads", "recurrent_size"}
    | {"expand_key", "expand_value", "value_heads", "inner_size", "dt_rank"}
)
"""Fields that can say the same size in several ways (None, a factor, a number): compared by the arrays' shapes."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One `model_type` of config.json.

    `read(fields)` makes our config of a config.json, `write(config)` the entries that `read` needs; `write` need not
    ask whether it has expressed all there is to a config, that is checked by reading it back. `outer`: the rules of
    what is not in a block, less the head, parameters named from the model down ("norm.scale"). `block(steps, config)`:
    the rules of one block, tensors relative to `prefix` (which holds a {} for the number of the block), parameters
    relative to a residual step of the block ("0.layer.out.kernel", "1.norm.scale"); `steps` are the configs of its
    residual steps, of which every block has `depth`: 1, or 2 for a mixer and a channel layer.

    `head`: the tensor of an untied head. `aliases`: other names under which published files have a tensor.
    `ignored`: prefixes or suffixes of tensors that a file may hold and that have no meaning here.
    """

    model_type: str
    class_name: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    outer: Callable[[ModelConfig], tuple[Rule, ...]]
    block: Callable[[tuple[LayerConfig, ...], ModelConfig], tuple[Rule, ...]]
    prefix: str
    depth: int = 1
    head: str = "lm_head.weight"
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def rules(self, config: ModelConfig) -> Iterator[Placed]:
        """Every rule of a model, with full names."""
        untied = () if config.tied else (rule(self.head, "head.kernel", TRANSPOSED),)
        for outer in (*self.outer(config), *untied):
            yield Placed(outer, outer.tensors, tuple(Place(tuple(p.split(".")), None) for p in outer.parameters))
        for number, block in enumerate(blocks(config, self.depth)):
            prefix = self.prefix.format(number)
            for inner in self.block(tuple(step.config for step in block), config):
                places = tuple(_place(parameter, block) for parameter in inner.parameters)
                yield Placed(inner, tuple(prefix + tensor for tensor in inner.tensors), places)


class Place(NamedTuple):
    """A parameter: its path in `params.split(model)[1]`, and its repeat along the leading axis, if it has one."""

    path: Path
    repeat: int | None


class Placed(NamedTuple):
    rule: Rule
    tensors: tuple[str, ...]
    places: tuple[Place, ...]


class Step(NamedTuple):
    """A residual step of a model, in the order in which they run."""

    config: LayerConfig
    path: Path
    repeat: int


def steps(config: ModelConfig) -> Iterator[Step]:
    """The residual steps of a model, one after the other."""
    for group, (pattern, repeats) in enumerate(config.layers):
        inner = [one for element in pattern for one in layer_configs(element, config.channel)]
        for repeat in range(repeats):
            for index, one in enumerate(inner):
                yield Step(one, ("stack", "groups", str(group), "steps", str(index)), repeat)


def blocks(config: ModelConfig, depth: int) -> list[tuple[Step, ...]]:
    """The residual steps of a model in blocks of `depth`."""
    flat = list(steps(config))
    if len(flat) % depth:
        raise ValueError(f"{len(flat)} residual steps do not make blocks of {depth} (a mixer and a channel layer each)")
    return [tuple(flat[start : start + depth]) for start in range(0, len(flat), depth)]


def alike(config: ModelConfig, *kinds: type) -> tuple[Any, ...]:
    """The configs of a model's blocks, which have to be all the same and of these kinds: what one block consists of."""
    found = {tuple(step.config for step in block) for block in blocks(config, len(kinds))}
    names = ", ".join(kind.__name__ for kind in kinds)
    if len(found) > 1:
        raise ValueError(f"every block has to be the same here ({names}); this model has {len(found)} different ones")
    (block,) = found
    for one, kind in zip(block, kinds, strict=True):
        if type(one) is not kind:
            raise ValueError(f"a block has to consist of {names}, not of {', '.join(type(c).__name__ for c in block)}")
    return block


def period(elements: Sequence[Any]) -> int:
    """The smallest p such that every element equals the one p before it."""
    return next(p for p in range(1, len(elements) + 1) if elements[p:] == elements[: len(elements) - p])


def grouped(elements: Sequence[Element]) -> LayerGroups:
    """Blocks one after the other as layer groups: a repeated pattern, and what is left over of it."""
    length = period(elements)
    whole, rest = divmod(len(elements), length)
    groups = ((tuple(elements[:length]), whole),)
    return (*groups, (tuple(elements[:rest]), 1)) if rest else groups


def shapes(config: ModelConfig) -> tuple[params.Definition, dict[Path, tuple[int, ...]]]:
    """A model without its arrays, and the shapes of those, nothing of which is computed."""
    definition, arrays = params.split(nnx.eval_shape(lambda: config.make(rngs=nnx.Rngs(0))))
    return definition, {path: array.shape for path, array in traverse_util.flatten_dict(arrays).items()}


def express(architecture: Architecture, config: ModelConfig) -> dict[str, Any]:
    """The config.json entries of a model; raises ValueError on anything that the architecture cannot say."""
    written = {"model_type": architecture.model_type, **architecture.write(config)}
    again = architecture.read(Fields(written))
    for ours, theirs in zip(_compared(config), _compared(again), strict=True):
        if type(ours) is not type(theirs):
            raise ValueError(f"it has {type(theirs).__name__} where the model has {type(ours).__name__}")
        for field in dataclasses.fields(ours):
            mine, other = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name not in RUN_AND_START | SIZES | {"layers", "channel"} and mine != other:
                raise ValueError(f"{type(ours).__name__}.{field.name} has to be {other!r} there, not {mine!r}")
    here, there = (_per_step(one) for one in (config, again))
    for name in here | there:
        if here.get(name) != there.get(name):
            raise ValueError(f"it has {name} of shape {there.get(name)}, the model one of {here.get(name)}")
    return written


def _compared(config: ModelConfig) -> list[Any]:
    """Everything there is to a model's config, layers written out, the scale of embeddings as a number."""
    scale = config.width**0.5 if config.embed_scale is True else float(config.embed_scale or 1.0)
    return [dataclasses.replace(config, embed_scale=scale), *(step.config for step in steps(config))]


def _per_step(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of arrays by the number of their residual step, however the layers are grouped."""
    flat = shapes(config)[1]
    named = {".".join(path): shape for path, shape in flat.items() if path[0] != "stack"}
    for number, step in enumerate(steps(config)):
        inside = {path[5:]: shape for path, shape in flat.items() if path[:5] == step.path}
        named |= {f"{number}.{'.'.join(path)}": shape[1:] for path, shape in inside.items()}
    return named


def _place(parameter: str, block: tuple[Step, ...]) -> Place:
    number, *path = parameter.split(".")
    step = block[int(number)]
    return Place((*step.path, *path), step.repeat)
