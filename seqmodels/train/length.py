"""How a model fares beyond the length it was trained on: losses by position, remembrance, and the size of its state."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from seqmodels import params
from seqmodels.models.memory import Role, described, named
from seqmodels.typing import Segments

CHUNK = 1024


class LossCurve(NamedTuple):
    """`loss[i]`: the mean in nats over positions `edges[i] <= t < edges[i + 1]` of all rows."""

    edges: Int[np.ndarray, "N+1"]
    loss: Float[np.ndarray, "N"]


class StateStatistics(NamedTuple):
    """Of one leaf of recurrent memory after so many tokens, over rows and entries: `[positions, repeats]`."""

    std: Any
    mean_abs: Any


def doubling(length: int, first: int = 64) -> list[int]:
    """The edges 0, first, 2 first, 4 first, ... up to `length`."""
    edges = [0]
    while (edge := first << (len(edges) - 1)) < length:
        edges.append(edge)
    return [*edges, length]


def loss_by_position(
    model: Any,
    tokens: Int[np.ndarray, "B T+1"],
    *,
    edges: Sequence[int] | None = None,
    chunk: int = CHUNK,
) -> LossCurve:
    """Mean next-token loss by position in rows of any length, each one document from a fresh state.

    The state is carried from chunk to chunk, so that memory does not grow with the rows; full attention gets a cache
    for all of them. A PSM runs token by token from the second chunk on: give it one as long as the rows. `edges` of the
    positions' ranges: `doubling(T)` by default, `range(0, T + 1, n)` for even ones.
    """
    tokens = _checked(tokens, least=2)
    length = tokens.shape[1] - 1
    bounds = np.asarray(doubling(length) if edges is None else list(edges))
    if len(bounds) < 2 or (np.diff(bounds) <= 0).any() or bounds[0] < 0 or bounds[-1] > length:
        raise ValueError(f"edges {bounds.tolist()} have to rise from 0 or more up to at most the {length} predictions")
    chunk = min(chunk, length)
    definition, arrays = params.split(model)

    found: list[Any] = []
    state = None if chunk >= length else model.init_state(tokens.shape[0], length)
    for at in range(0, length, chunk):
        row, valid = _piece(tokens, at, chunk, 1)
        state, losses = _score(definition, arrays, state, row, valid)
        found.append(losses)
    by_position = np.concatenate(jax.device_get(found)).astype(np.float64)[: bounds[-1]]
    sums = np.add.reduceat(by_position, bounds[:-1])
    return LossCurve(bounds, sums / np.diff(bounds))


def effective_remembrance(
    model: Any, tokens: Int[np.ndarray, "B T"], starts: Sequence[int]
) -> Float[np.ndarray, "B N"]:
    """EffRem_T(t) = TV(q(. | x[0:T]), q(. | x[t:T])) for each t of `starts` (2507.02782); TV(p, q) = |p - q|_1 / 2.

    q is the distribution of the next token; 0 says that the tokens before t do not matter for it. Every t is a forward
    pass over T tokens, those before t as padding, so that one program serves all. Raises ValueError where a PSM's
    documents could not start at t.
    """
    tokens = _checked(tokens, least=1)
    length, align = tokens.shape[1], model.config.alignment
    if any(not 0 <= t < length or t % align for t in starts):
        aligned = f" and multiples of the model's alignment, {align}" if align > 1 else ""
        raise ValueError(f"starts {list(starts)} have to be positions from 0 to {length - 1}{aligned}")
    definition, arrays = params.split(model)

    whole = np.asarray(_predict(definition, arrays, tokens, 0))
    cut = [np.asarray(_predict(definition, arrays, tokens, t)) for t in starts]
    return np.stack([0.5 * np.abs(whole - one).sum(axis=-1) for one in cut], axis=1)


def state_statistics(
    model: Any, tokens: Int[np.ndarray, "B T"], positions: Sequence[int], *, chunk: int = CHUNK
) -> dict[str, StateStatistics]:
    """Std and mean size of every layer's recurrent memory after so many tokens (`positions`, rising) of a document.

    By the leaf's name, `layers.GROUP.STEP.FIELD`, its repeats along the last axis. Memory is taken as it is kept: that
    of an mLSTM under its maximum. Raises ValueError for a model without any.
    """
    tokens = _checked(tokens, least=1)
    if (
        not positions
        or list(positions) != sorted(set(positions))
        or positions[0] < 1
        or positions[-1] > tokens.shape[1]
    ):
        raise ValueError(f"positions {list(positions)} have to rise from 1 or more to at most {tokens.shape[1]} tokens")
    names = [name for name, leaf in described(model).items() if leaf.role == Role.MEMORY]
    if not names:
        raise ValueError("no layer of this model has recurrent memory: there is nothing to take statistics of")
    definition, arrays = params.split(model)
    chunk = min(chunk, positions[-1])

    state, found = model.init_state(tokens.shape[0], positions[-1]), []
    for before, position in zip([0, *positions[:-1]], positions, strict=True):
        for at in range(before, position, chunk):
            state = _advance(definition, arrays, state, *_piece(tokens[:, :position], at, chunk, 0))
        found.append(_measure({name: array for name, array in named(state).items() if name in names}))
    return jax.tree.map(lambda *each: np.stack(each), *jax.device_get(found))


# compiled once for all models of one definition, as an experiment compares them


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _score(definition: params.Definition, arrays: Any, state: Any, row: Array, valid: Array) -> tuple[Any, Array]:
    model = params.merge(definition, arrays)
    hidden, state, _ = model.forward(row[:, :-1], state, Segments(jnp.zeros_like(valid), valid))
    losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), row[:, 1:])
    return state, jnp.mean(losses, axis=0)


@functools.partial(jax.jit, static_argnums=0)
def _predict(definition: params.Definition, arrays: Any, row: Array, start: Array) -> Array:
    model = params.merge(definition, arrays)
    position = jnp.broadcast_to(jnp.arange(row.shape[1])[None], row.shape)
    hidden, _, _ = model.forward(row, None, Segments(position == start, position >= start))
    return jax.nn.softmax(model.logits(hidden[:, -1]), axis=-1)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(definition: params.Definition, arrays: Any, state: Any, row: Array, valid: Array) -> Any:
    return params.merge(definition, arrays).forward(row, state, Segments(jnp.zeros_like(valid), valid))[1]


@jax.jit
def _measure(memory: dict[str, Array]) -> dict[str, StateStatistics]:
    def of(x: Array) -> StateStatistics:
        entries = tuple(range(1, x.ndim))
        return StateStatistics(jnp.std(x, axis=entries), jnp.mean(jnp.abs(x), axis=entries))

    return jax.tree.map(of, memory)


def _checked(tokens: Any, *, least: int) -> Int[np.ndarray, "B T"]:
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.shape[1] < least or not len(tokens):
        raise ValueError(
            f"tokens have to be integers [rows, time] with at least {least} in a row, not {tokens.dtype} {tokens.shape}"
        )
    return tokens.astype(np.int32)


def _piece(tokens: np.ndarray, at: int, chunk: int, more: int) -> tuple[np.ndarray, np.ndarray]:
    """`chunk + more` tokens from `at` on, and which of the first `chunk` there are: the last piece is filled up."""
    piece = tokens[:, at : at + chunk + more]
    size = piece.shape[1] - more
    valid = np.broadcast_to(np.arange(chunk)[None] < size, (len(piece), chunk))
    return np.pad(piece, [(0, 0), (0, chunk - size)]), valid
