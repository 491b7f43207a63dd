"""Time sharded over a mesh axis: each device folds its span to one element, and the elements are all-gathered."""

from __future__ import annotations

import jax
from jax import lax

from seqmodels import compat
from seqmodels.scan.recurrence import Recurrence, Tree, act, cast_like, select, settle


def sharded_carry(
    recurrence: Recurrence, span: Tree, inputs_t: Tree, state: Tree | None, axis_name: str
) -> tuple[Tree, Tree]:
    """`(carry-in of this device, state after the last device)` from each device's `(reset flag, element)`.

    For use inside `shard_map`. `state` is the one before the first device's span, the same on every device, as the
    second result is. One element per device travels, whatever the length.
    """
    state, initial = settle(recurrence, inputs_t, state, invariant=axis_name)
    spans = jax.tree.map(lambda x: compat.gather_along(x, axis_name), span)

    def body(before: Tree, span: Tree) -> tuple[Tree, Tree]:
        flag, element = span
        return cast_like(act(recurrence, element, select(flag, initial, before)), before), before

    last, carries = lax.scan(body, state, spans)
    return jax.tree.map(lambda x: x[lax.axis_index(axis_name)], carries), last
