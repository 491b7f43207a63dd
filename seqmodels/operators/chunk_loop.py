"""The chunk form on CPUs: a loop over chunks that reads and writes every array where it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqmodels import compat

Tree = Any  # a pytree of arrays
Place = tuple[Any, ...]  # where a part begins, in the leading axes of an array


def chunk_loop(
    body: Callable[[Tree, Tree], tuple[Tree, Tree]],
    state: Tree,
    xs: Tree,
    *,
    rows: int,
    chunk: int,
    heads: int | None = None,
) -> tuple[Tree, Tree]:
    """`body(state, xs) -> (state, outputs)` over one chunk of steps after the other, for some rows and heads at a time.

    `xs` are [B, T, ...], or with `heads` [B, T, H, ...] and masks [B, T]; states [B, ...] or [B, H, ...], in the types
    that `body` returns. `rows` divides B and `heads` H; where `chunk` does not divide T, the last one is shorter.
    Returns the state and outputs [B, T, ...] or [B, T, H, ...].

    `lax.scan` brings every array into the order of its steps before, and every result back after it, and each such copy
    takes as long as a product or two. The gradient keeps what came in and the state before each chunk, and goes through
    each chunk again; of several parts, forward-mode differentiation does not pass.
    """
    state, xs = compat.vary_alike((state, xs))
    leaves, tree = jax.tree.flatten(xs)
    batch, length = leaves[0].shape[:2]
    if heads is None:
        cut = _Cut((batch, length), (rows, min(chunk, length)))
    else:
        cut = _Cut((batch, length, max(leaves, key=jnp.ndim).shape[2]), (rows, min(chunk, length), heads))
    if cut.whole == cut.part:
        return jax.checkpoint(body, prevent_cse=False)(state, xs)
    inexact = [bool(jnp.issubdtype(x.dtype, jnp.inexact)) for x in leaves]
    arrays, masks = ([x for x, kind in zip(leaves, inexact, strict=True) if kind == own] for own in (True, False))

    def step(state: Tree, arrays: list[jax.Array], masks: list[jax.Array]) -> tuple[Tree, Tree]:
        parts = {True: iter(arrays), False: iter(masks)}
        return body(state, jax.tree.unflatten(tree, [next(parts[kind]) for kind in inexact]))

    def program(size: int) -> tuple[Callable[..., Any], list[jax.Array]]:
        """`step` for so many steps, and the arrays that `body` closes over, which are its last arguments."""
        shapes = jax.eval_shape(lambda: (cut.of_state(state, 0), cut.of_steps((arrays, masks), 0, 0, size)))
        like = jax.tree.map(lambda x: _zeros(x.shape, x), shapes)
        return jax.closure_convert(step, like[0], *like[1])

    steps, closed_over = zip(*(program(size) for size in cut.sizes), strict=True)
    return _run(steps, cut, closed_over, state, arrays, masks)


class _Cut(NamedTuple):
    """Arrays [B, T, ...] or [B, T, H, ...] in parts of so many rows, steps and heads."""

    whole: tuple[int, ...]
    part: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Of rows and heads."""
        return self.whole[0] // self.part[0] * self._across

    @property
    def _across(self) -> int:
        return self.whole[2] // self.part[2] if len(self.whole) == 3 else 1

    @property
    def sizes(self) -> list[int]:
        """Of a chunk, and of the last one where that is shorter."""
        rest = self.whole[1] % self.part[1]
        return [self.part[1], rest] if rest else [self.part[1]]

    def place(self, block: Any) -> Place:
        """Where a block begins in a state."""
        row, head = block // self._across * self.part[0], block % self._across * self.part[-1]
        return (row, head)[: len(self.whole) - 1]

    def of_state(self, state: Tree, block: Any) -> Tree:
        return _read(state, self.place(block), (self.part[0], *self.part[2:]))

    def of_kept(self, kept: Tree, block: Any, chunk: Any) -> Tree:
        """One block of what has a leading axis for chunks."""
        found = _read(kept, (chunk, *self.place(block)), (1, self.part[0], *self.part[2:]))
        return jax.tree.map(lambda x: x[0], found)

    def of_steps(self, xs: Tree, block: Any, chunk: Any, size: int) -> Tree:
        return _read(xs, self.at(block, chunk), (self.part[0], size, *self.part[2:]))

    def at(self, block: Any, chunk: Any) -> Place:
        """Where a chunk of a block begins."""
        row, *head = self.place(block)
        return (row, chunk * self.part[1], *head)

    def each(self, visit: Callable[..., Any], carry: Any, *, backward: bool = False) -> Any:
        """`visit(carry, number of the chunk, which of the sizes)` of every chunk."""
        count = self.whole[1] // self.part[1]
        last = lambda carry: carry if len(self.sizes) == 1 else visit(carry, count, 1)
        if backward:
            return lax.fori_loop(0, count, lambda n, carry: visit(carry, count - 1 - n, 0), last(carry))
        return last(lax.fori_loop(0, count, lambda n, carry: visit(carry, n, 0), carry))


def _read(xs: Tree, place: Place, shape: tuple[int, ...]) -> Tree:
    """Parts of this shape in the leading axes, and with all of the others."""

    def leaf(x: jax.Array) -> jax.Array:
        begin = (*place[: x.ndim], *(0,) * (x.ndim - len(place)))
        return lax.dynamic_slice(x, begin, (*shape[: x.ndim], *x.shape[len(shape) :]))

    return jax.tree.map(leaf, xs)


def _write(xs: Tree, parts: Tree, place: Place) -> Tree:
    begin = lambda x: (*place, *(0,) * (x.ndim - len(place)))
    return jax.tree.map(lambda x, part: lax.dynamic_update_slice(x, part, begin(x)), xs, parts)


def _zeros(shape: tuple[int, ...], like: Any) -> jax.Array:
    return compat.vary_over(jnp.zeros(shape, like.dtype), compat.varying_axes(like))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(steps: Any, cut: _Cut, closed_over: Any, state: Tree, arrays: Any, masks: Any) -> tuple[Tree, Tree]:
    return _forward(steps, cut, closed_over, state, arrays, masks, keep=False)[0]


def _forward(
    steps: Any, cut: _Cut, closed_over: Any, state: Tree, arrays: Any, masks: Any, *, keep: bool = True
) -> tuple[tuple[Tree, Tree], Any]:
    def step(state: Tree, block: Any, chunk: Any, kind: int) -> tuple[Tree, Tree]:
        xs = cut.of_steps((arrays, masks), block, chunk, cut.sizes[kind])
        return steps[kind](state, *xs, *closed_over[kind])

    def of_block(block: Any, carry: Any) -> Any:
        def visit(carry: Any, chunk: Any, kind: int) -> Any:
            before, outputs, kept = carry
            if keep:
                kept = _write(kept, jax.tree.map(lambda s: s[None], before), (chunk, *cut.place(block)))
            after, some = step(before, block, chunk, kind)
            return after, _write(outputs, some, cut.at(block, chunk)), kept

        states, outputs, kept = carry
        state, outputs, kept = cut.each(visit, (cut.of_state(states, block), outputs, kept))
        return _write(states, state, cut.place(block)), outputs, kept

    shapes = jax.eval_shape(lambda: step(cut.of_state(state, 0), 0, 0, 0))[1]
    outputs = jax.tree.map(lambda y: _zeros((*cut.whole, *y.shape[len(cut.whole) :]), y), shapes)
    chunks = -(-cut.whole[1] // cut.part[1])
    kept = jax.tree.map(lambda s: _zeros((chunks, *s.shape), s), state) if keep else None
    states, outputs, kept = lax.fori_loop(0, cut.blocks, of_block, (state, outputs, kept))
    return (states, outputs), (closed_over, arrays, masks, kept)


def _backward(steps: Any, cut: _Cut, residuals: Any, gradients: Any) -> Any:
    closed_over, arrays, masks, kept = residuals
    d_state, d_outputs = gradients

    def of_block(block: Any, carry: Any) -> Any:
        def visit(carry: Any, chunk: Any, kind: int) -> Any:
            flowing, d_arrays, d_closed = carry
            of_steps = lambda xs: cut.of_steps(xs, block, chunk, cut.sizes[kind])
            run = lambda state, arrays, closed: steps[kind](state, arrays, of_steps(masks), *closed)
            _, pull = jax.vjp(run, cut.of_kept(kept, block, chunk), of_steps(arrays), closed_over[kind])
            flowing, some, more = pull((flowing, of_steps(d_outputs)))
            d_closed = [jax.tree.map(jnp.add, d, more) if n == kind else d for n, d in enumerate(d_closed)]
            return flowing, _write(d_arrays, some, cut.at(block, chunk)), d_closed

        d_states, d_arrays, d_closed = carry
        flowing = cut.of_state(d_states, block)
        flowing, d_arrays, d_closed = cut.each(visit, (flowing, d_arrays, d_closed), backward=True)
        return _write(d_states, flowing, cut.place(block)), d_arrays, d_closed

    zeros = lambda tree: jax.tree.map(lambda x: _zeros(x.shape, x), tree)
    start = (d_state, zeros(arrays), [zeros(closed) for closed in closed_over])
    d_state, d_arrays, d_closed = lax.fori_loop(0, cut.blocks, of_block, start)
    return tuple(d_closed), d_state, d_arrays, None


_run.defvjp(_forward, _backward)
