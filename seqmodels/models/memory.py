"""The arrays of a language model's state by name, and which of them are recurrent memory."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from seqmodels.models.lm import LMState
from seqmodels.typing import Memory

POSITION = "position"


class Role(enum.StrEnum):
    """What a leaf of a state is: see `seqmodels.typing.Memory`."""

    MEMORY = "memory"
    COMPANION = "companion"
    REST = "rest"


class Leaf(NamedTuple):
    """One array of a state. `shape`: of one row, `[repeats, ...]`; `neutral`: what stands beside a drawn memory."""

    role: Role
    heads: bool
    neutral: float
    shape: tuple[int, ...]
    dtype: Any


def named(state: LMState) -> dict[str, Array]:
    """The arrays of a state: `position` [B], and `layers.GROUP.STEP.FIELD` [repeats, B, ...] of every layer."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def replaced(state: LMState, arrays: Mapping[str, Array]) -> LMState:
    """A state with other `arrays`, some or all, by the names of `named`."""
    flat, structure = jax.tree.flatten(state)
    missing = set(arrays) - set(names := list(named(state)))
    if missing:
        raise ValueError(f"this state has no {', '.join(sorted(missing))}; it has {', '.join(names)}")
    return jax.tree.unflatten(structure, [arrays.get(name, leaf) for name, leaf in zip(names, flat, strict=True)])


def described(model: Any) -> dict[str, Leaf]:
    """Every array of a model's state by name (attention's caches with room for one token).

    The position goes with the memory: RetNet's is turned by it, and no other layer reads it. Raises TypeError where
    `model` is no `LanguageModel` or the like, ValueError where a layer declares a leaf that its state does not have.
    """
    if not (hasattr(model, "init_state") and hasattr(model, "stack")):
        raise TypeError(
            f"{type(model).__name__} has no init_state and stack, as LanguageModel has: its memory is unknown"
        )
    shapes = named(jax.eval_shape(lambda: model.init_state(1, 1)))
    found: dict[str, Leaf] = {}
    for name, shape in shapes.items():
        role, heads, neutral = Role.COMPANION, False, 0.0
        if name != POSITION:
            _, group, step, field = name.split(".", 3)
            memory = memory_of(model, int(group), int(step))
            role, heads, neutral = _role(memory, field)
        row = () if name == POSITION else (shape.shape[0], *shape.shape[2:])
        found[name] = Leaf(role, heads, neutral, row, shape.dtype)
    for index, period in enumerate(model.stack.groups):
        for number, residual in enumerate(period.steps):
            memory = memory_of(model, index, number)
            for field in () if memory is None else memory.leaves:
                if f"layers.{index}.{number}.{field}" not in found:
                    layer = type(residual.layer).__name__
                    raise ValueError(f"{layer}.recurrent_memory names {field!r}, and its state has no such leaf")
    return found


def memory_of(model: Any, group: int, step: int) -> Memory | None:
    """What the layer of a stack's `group` and `step` declares."""
    declared = getattr(model.stack.groups[group].steps[step].layer, "recurrent_memory", None)
    return declared if isinstance(declared, Memory) else None


def _role(memory: Memory | None, field: str) -> tuple[Role, bool, float]:
    if memory is not None and field in memory.leaves:
        return Role.MEMORY, memory.heads, 0.0
    if memory is not None and field in memory.companions:
        return Role.COMPANION, False, memory.companions[field]
    return Role.REST, False, 0.0


def grows(model: Any) -> bool:
    """Whether the model's state needs a capacity (full attention)."""
    try:
        jax.eval_shape(lambda: model.init_state(1))
    except ValueError:
        return True
    return False


def fresh_memory(model: Any, batch: int) -> LMState:
    """`init_state` of the layers that have recurrent memory, None for all others."""
    state = model.init_state(batch, 1)
    layers = (
        tuple(own if memory_of(model, g, s) is not None else None for s, own in enumerate(group))
        for g, group in enumerate(state.layers)
    )
    return LMState(state.position, tuple(layers))


def rows_first(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Arrays `[repeats, B, ...]` as `[B, repeats, ...]`, or back; `position` as it is."""
    return {name: x if x.ndim == 1 else x.swapaxes(0, 1) for name, x in arrays.items()}
