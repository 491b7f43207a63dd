"""The record that a recurrence is, and the few things that every executor does with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqmodels import compat

Tree = Any  # a pytree of arrays


def _state_as_output(state: Tree, inputs_t: Tree) -> Tree:
    del inputs_t
    return state


class Recurrence(NamedTuple):
    """A recurrence over time as pure functions, each written for one step, or one chunk, of one unbatched sequence.

    Laws (checked by `seqmodels.testing.check_recurrence`):

        combine(combine(a, b), c) == combine(a, combine(b, c))
        combine(identity(a), a) == a == combine(a, identity(a))
        act(combine(a, b), s) == act(b, act(a, s)),   act(identity(a), s) == s
        update(x, s) == act(elements(x), s)
        fold(xs, reset) == the combine of the steps since the last reset
        emit(xs, s, reset) == the reads of the steps, from s
        sweep(xs, s, reset) == (the state after the steps, emit(xs, s, reset))

    Decays are natural logs in the elements; `combine` takes the earlier span first.
    """

    elements: Callable[[Tree], Tree]
    """`(inputs_t) -> element`: one step's input as an element."""
    combine: Callable[[Tree, Tree], Tree]
    """`(earlier, later) -> element`: the aggregate of two neighbouring spans."""
    identity: Callable[[Tree], Tree]
    """`(element) -> element`: the neutral element of that shape."""
    act: Callable[[Tree, Tree], Tree] | None = None
    """`(element, state) -> state`; None: the state is an element, and `act(e, s) = combine(s, e)`."""
    read: Callable[[Tree, Tree], Tree] = _state_as_output
    """`(state, inputs_t) -> outputs_t`; by default the state itself."""
    initial: Callable[[Tree], Tree] | None = None
    """`(inputs_t) -> state`: before any token, and after a reset. Only shapes and types of inputs_t may matter.

    Default: the identity where `act` is None, else zeros like the state that was given."""
    read_before: bool = False
    """`read` sees the state before its own step."""
    associative: bool = True
    """False: the parenthesisation is part of the model. Only `tree` and its streaming `step` run it; `read` gets
    `(prefix, present)`: the aggregate of the steps before its own, the identity where there is none, and a flag."""
    update: Callable[[Tree, Tree], Tree] | None = None
    """`(inputs_t, state) -> state`: `act(elements(inputs_t), state)` without building the element."""
    neutral: Callable[[Tree], Tree] | None = None
    """`(inputs_t) -> inputs_t` which leaves the state untouched; how `valid` reaches `fold` and `emit`."""
    fold: Callable[[Tree, jax.Array], Tree] | None = None
    """`(inputs of a chunk, reset) -> element`: the chunk's element since its last reset."""
    emit: Callable[[Tree, Tree, jax.Array], Tree] | None = None
    """`(inputs of a chunk, state, reset) -> outputs`; segments that start inside begin from `initial`."""
    sweep: Callable[[Tree, Tree, jax.Array], tuple[Tree, Tree]] | None = None
    """`(inputs of a chunk, state, reset) -> (state, outputs)`: `fold`, `act` and `emit` at once, where these share work
    or an element costs more than the state; runs where one chunk is taken at a time."""


def take(tree: Tree, index: Any) -> Tree:
    """Every leaf at `index` of its leading axis."""
    return jax.tree.map(lambda x: x[index], tree)


def select(condition: jax.Array, on_true: Tree, on_false: Tree) -> Tree:
    """Leaf by leaf `where`, the condition broadcast over trailing axes."""

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = jnp.asarray(a), jnp.asarray(b)
        mask = lax.expand_dims(condition, range(condition.ndim, max(a.ndim, b.ndim)))
        return jnp.where(mask, a, b)

    return jax.tree.map(leaf, on_true, on_false)


def precise(tree: Tree) -> Tree:
    """Inexact leaves at least float32; float64, complex, integers and booleans stay as they are."""

    def leaf(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return lax.convert_element_type(x, jnp.promote_types(x.dtype, jnp.float32))

    return jax.tree.map(leaf, tree)


def cast_like(tree: Tree, like: Tree) -> Tree:
    """Leaves of `tree` in the types of `like`."""
    return jax.tree.map(lambda x, y: lax.convert_element_type(x, y.dtype), tree, like)


def settle_element(recurrence: Recurrence, element: Tree) -> Tree:
    """An element in the types that combining returns (a real drive under a complex decay), at least float32.

    Raises ValueError where `combine` changes the element's structure or shapes.
    """
    element = precise(element)
    both = jax.eval_shape(recurrence.combine, element, element)
    if jax.tree.structure(both) != jax.tree.structure(element) or any(
        a.shape != b.shape for a, b in zip(*map(jax.tree.leaves, (both, element)), strict=True)
    ):
        raise ValueError(
            f"combine turns elements {shapes(element)} into {shapes(both)}: structure and shapes must stay"
        )
    return jax.tree.map(lambda x, b: lax.convert_element_type(x, jnp.promote_types(x.dtype, b.dtype)), element, both)


def element_of(recurrence: Recurrence, inputs_t: Tree) -> Tree:
    """One step's element, settled."""
    return settle_element(recurrence, recurrence.elements(inputs_t))


def act(recurrence: Recurrence, element: Tree, state: Tree) -> Tree:
    """The state after a span."""
    return recurrence.combine(state, element) if recurrence.act is None else recurrence.act(element, state)


def advance(recurrence: Recurrence, inputs_t: Tree, state: Tree) -> Tree:
    """The state after one step."""
    if recurrence.update is not None:
        return recurrence.update(inputs_t, state)
    return act(recurrence, element_of(recurrence, inputs_t), state)


def initial_state(recurrence: Recurrence, inputs_t: Tree, state: Tree | None) -> Tree:
    """The state before any token, which a reset restores too."""
    if recurrence.initial is not None:
        return precise(recurrence.initial(inputs_t))
    if recurrence.act is None:
        return precise(recurrence.identity(element_of(recurrence, inputs_t)))
    if state is None:
        raise ValueError(
            "this recurrence starts from a state of its own shape and none is known: "
            "pass state=, or give the recurrence an `initial`"
        )
    return jax.tree.map(jnp.zeros_like, precise(state))


def shapes(tree: Tree) -> str:
    """Shapes and types of a pytree, for error messages."""
    return str(jax.tree.map(lambda x: f"{jnp.result_type(x).name}{list(jnp.shape(x))}", tree)).replace("'", "")


def settle(
    recurrence: Recurrence, inputs_t: Tree, state: Tree | None, *, invariant: str | None = None
) -> tuple[Tree, Tree]:
    """`(state, initial)` in the types that a step returns, so that both can be a loop's carry.

    `invariant` names a mesh axis over which the carry does not vary although the inputs do.
    Raises ValueError where a step changes the state's structure or shapes.
    """
    like = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs_t)
    initial = initial_state(recurrence, like, state)
    state = initial if state is None else precise(state)
    if jax.tree.structure(initial) != jax.tree.structure(state):
        raise ValueError(f"the state {shapes(state)} is not built like the initial one, {shapes(initial)}")
    for given, own in zip(*map(jax.tree.leaves, (state, initial)), strict=True):
        if jnp.ndim(own) and jnp.shape(given) != jnp.shape(own):
            raise ValueError(
                f"the state {shapes(state)} is not shaped like the initial one, {shapes(initial)}: "
                "pass the state of one sequence, and map over batch and heads with jax.vmap"
            )
    for _ in range(3):  # a step may widen a type that widens another; types only grow
        try:
            after = jax.eval_shape(lambda x, s: precise(advance(recurrence, x, s)), inputs_t, state)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"a step failed on the state {shapes(state)} with inputs {shapes(inputs_t)}: {error}"
            ) from error
        same = jax.tree.structure(after) == jax.tree.structure(state)
        if not same or any(a.shape != jnp.shape(b) for a, b in zip(*map(jax.tree.leaves, (after, state)), strict=True)):
            raise ValueError(
                f"a step turns the state {shapes(state)} into {shapes(after)}: "
                "structure and shapes must stay; correct the state, `initial` or `act`"
            )
        settled = jax.tree.map(lambda x, a: _as_carry(x, a, invariant), state, after)
        if all(a.dtype == b.dtype for a, b in zip(*map(jax.tree.leaves, (settled, state)), strict=True)):
            break
        state = settled
    return settled, jax.tree.map(lambda x, s: _as_carry(x, s, invariant), initial, settled)


def _as_carry(x: jax.Array, like: Any, invariant: str | None) -> jax.Array:
    x = lax.convert_element_type(x, jnp.promote_types(jnp.result_type(x), like.dtype))
    x = jnp.broadcast_to(x, like.shape)
    return compat.vary_over(x, compat.varying_axes(like) - {invariant})


def hide_invalid(recurrence: Recurrence, inputs: Tree, valid: jax.Array | None) -> Tree:
    """Inputs whose invalid steps hold neutral values, or where no `neutral` is known those of the first valid step.

    Padding may be NaN; and zeros may be no input at all, where elements are divided by their norm.
    """
    if valid is None:
        return inputs
    first = take(inputs, jnp.argmax(valid))
    first = lax.stop_gradient(select(jnp.any(valid), first, jax.tree.map(jnp.zeros_like, first)))
    inputs = select(valid, inputs, jax.tree.map(lambda x, f: jnp.broadcast_to(f, x.shape), inputs, first))
    if recurrence.neutral is None:
        return inputs
    return select(valid, inputs, jax.vmap(recurrence.neutral)(inputs))


def zero_invalid(outputs: Tree, valid: jax.Array | None) -> Tree:
    """Outputs with zeros at invalid steps."""
    return outputs if valid is None else select(valid, outputs, jax.tree.map(jnp.zeros_like, outputs))


def resetting(recurrence: Recurrence) -> Callable[[Tree, Tree], Tree]:
    """`combine` lifted to (reset flag, element): a span that holds a reset forgets what came before it."""

    def combine(earlier: Tree, later: Tree) -> Tree:
        flag_earlier, element_earlier = earlier
        flag_later, element_later = later
        both = recurrence.combine(element_earlier, element_later)
        return flag_earlier | flag_later, select(flag_later, element_later, both)

    return combine
