"""Softmax attention over keys that say where they stand: (document, position), whatever slot they lie in.

A query sees a key when both belong to the same document, the key holds a token, and, unless told otherwise,
0 <= query position - key position (< window). Cached keys are just more keys, of document 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqmodels import compat
from seqmodels.operators.softmax import Softmax, merge_softmax, softmax_mean, softmax_of

# Queries whose scores are computed at once, and recomputed in the backward pass, where there are more than four times
# as many. Whole scores are also slower: outside a loop XLA works out the mask again for every use of a score.
QUERY_BLOCK = 128
CAUSAL_SPANS = 4
# A window narrower than this is still computed in blocks of this length: smaller matrix products would not pay.
WINDOW_BLOCK = 256


class Queries(NamedTuple):
    query: Float[Array, "B T H K"]
    document: Int[Array, "B T"]
    position: Int[Array, "B T"]


class Keys(NamedTuple):
    """`filled` False: nothing stands there; whatever the arrays hold reaches neither outputs nor gradients."""

    key: Float[Array, "B S G K"]
    value: Float[Array, "B S G V"]
    document: Int[Array, "B S"]
    position: Int[Array, "B S"]
    filled: Bool[Array, "B S"]


class Scoring(NamedTuple):
    """Score q k^T / sqrt(K), bounded as c tanh(score / c) by `logits_cap` c, less `slopes[h]` times the distance.

    `causal` False: a query sees later keys of its document too (without a window).
    """

    window: int | None = None
    slopes: Sequence[float] | None = None
    logits_cap: float | None = None
    causal: bool = True


def attend(
    queries: Queries, cached: Keys | None, keys: Keys, scoring: Scoring, *, block: int = QUERY_BLOCK
) -> Float[Array, "B T H V"]:
    """softmax(scores) v over the visible keys among `cached`, if any, and `keys`, those of the queries' own T tokens.

    H is a multiple of G; head h reads group h // (H/G). Scores and softmax are at least float32. A query that sees
    nothing yields zero. Of more than 4 `block` queries only a block's scores are in memory at once; under causality a
    quarter of the queries sees the keys up to its own end, so that 5/8 of T^2 scores are computed.
    """
    length = queries.query.shape[1]
    pieces = lambda own: (own,) if cached is None else (cached, own)
    if length <= CAUSAL_SPANS * block:
        return softmax_mean(_partial(queries, pieces(keys), scoring)).astype(queries.query.dtype)
    span = -(-length // CAUSAL_SPANS) if scoring.causal else length
    parts = []
    for start in range(0, length, span):
        some = jax.tree.map(lambda x, start=start: x[:, start : start + span], queries)
        own = jax.tree.map(lambda x, start=start: x[:, : start + span], keys)
        parts.append(softmax_mean(_in_blocks(some, pieces(own), scoring, block)))
    return jnp.concatenate(parts, axis=1).astype(queries.query.dtype)


def attend_over_devices(
    queries: Queries,
    cached: Keys | None,
    keys: Keys,
    scoring: Scoring,
    axis_name: str,
    *,
    block: int = CAUSAL_SPANS * QUERY_BLOCK,
) -> Float[Array, "B T H V"]:
    """`attend` inside `shard_map`, with queries and `keys` divided along time over a mesh axis in order of its devices.

    Keys and values pass from device to device around the ring, and each merges the partial softmax of its queries over
    what comes by (ring attention, arXiv 2310.01889); with a causal window only as far as the window reaches. Every
    device needs the same `cached` keys; documents have the same numbers everywhere.
    """
    devices, length = jax.lax.axis_size(axis_name), queries.query.shape[1]
    hops = devices - 1
    if scoring.window is not None and scoring.causal:
        hops = min(hops, -(-(scoring.window - 1) // length))
    onwards = [(device, (device + 1) % devices) for device in range(devices)]

    def hop(carry: tuple[Keys, Softmax], _: None) -> tuple[tuple[Keys, Softmax], None]:
        keys, seen = carry
        keys = jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, onwards), keys)
        return (keys, merge_softmax(seen, _in_blocks(queries, (keys,), scoring, block))), None

    # What a ring hands on varies over it, also where these keys do not: without padding, `filled` is a constant.
    ring = compat.varying_axes(jax.lax.axis_index(axis_name))
    keys = jax.tree.map(lambda x: compat.vary_over(x, ring), keys)
    seen = _in_blocks(queries, (keys,) if cached is None else (cached, keys), scoring, block)
    (_, seen), _ = jax.lax.scan(jax.checkpoint(hop, prevent_cse=False), (keys, seen), length=hops)
    return softmax_mean(seen).astype(queries.query.dtype)


def attend_in_window(
    queries: Queries, cached: Keys | None, keys: Keys, scoring: Scoring, *, block: int = WINDOW_BLOCK
) -> Float[Array, "B T H V"]:
    """`attend` to `cached` keys, if any, and to T own keys in O(T window): a block of queries sees two of keys.

    Padding may stand between documents, not inside one (`Segments`): otherwise a window would span more blocks.
    """
    length = queries.query.shape[1]
    if scoring.window is None or not scoring.causal:
        raise ValueError(f"attend_in_window needs a causal window, not {scoring}; attend sees whole documents")
    block = max(scoring.window, block)
    if length <= block:
        return attend(queries, cached, keys, scoring, block=block)
    if cached is None:
        cached = jax.tree.map(lambda x: jnp.zeros_like(x[:, :1]), keys)
    before = jax.tree.map(lambda x: _padded(x, block), cached)
    rows = jax.tree.map(lambda c, x: jnp.concatenate([c.astype(x.dtype)[None], _blocked(x, block)]), before, keys)
    previous, own = jax.tree.map(lambda x: x[:-1], rows), jax.tree.map(lambda x: x[1:], rows)
    blocks = jax.tree.map(lambda x: _blocked(x, block), queries)
    of_block = lambda item: softmax_mean(_partial(item[0], item[1:], scoring))
    out = jax.lax.map(jax.checkpoint(of_block), (blocks, previous, own))
    return _unblocked(out, length).astype(queries.query.dtype)


def _in_blocks(queries: Queries, keys: Sequence[Keys], scoring: Scoring, block: int) -> Softmax:
    """`_partial`, its scores recomputed in the backward pass where there are more queries than `block`."""
    length = queries.query.shape[1]
    if length <= block:
        return _partial(queries, keys, scoring)
    blocks = jax.tree.map(lambda x: _blocked(x, block), queries)
    seen = jax.lax.map(jax.checkpoint(lambda q: _partial(q, keys, scoring)), blocks)
    return jax.tree.map(lambda x: _unblocked(x, length), seen)


def _partial(queries: Queries, keys: Sequence[Keys], scoring: Scoring) -> Softmax:
    """The softmax over the visible keys, before it is divided by its total; leading axes [B, T, H]."""
    return functools.reduce(merge_softmax, [_piece(queries, piece, scoring) for piece in keys])


def _piece(queries: Queries, piece: Keys, scoring: Scoring) -> Softmax:
    batch, length, heads, size = queries.query.shape
    groups = piece.key.shape[2]
    wide = jnp.promote_types(queries.query.dtype, jnp.float32)
    # One matrix of rows (head of the group, time) for every group, before and after both products. In any other order
    # scores are transposed on their way, and on CPUs masks and exponentials are then evaluated in strided order.
    rows = lambda x: x.reshape(batch, groups, -1, x.shape[-1])
    query = rows(jnp.moveaxis(queries.query, 1, 2))
    filled = piece.filled[:, :, None, None]
    # Unfilled slots may hold anything, NaN included: 0 * NaN is NaN, so masking the scores is not enough.
    key, value = (jnp.moveaxis(jnp.where(filled, x, 0), 1, 2).astype(query.dtype) for x in (piece.key, piece.value))
    scores = compat.wide_einsum("bgqk,bgsk->bgqs", query, key) * size**-0.5
    scores = scores.reshape(batch, groups, heads // groups, length, -1)
    if scoring.logits_cap is not None:
        scores = scoring.logits_cap * jnp.tanh(scores / scoring.logits_cap)
    distance = queries.position[:, :, None] - piece.position[:, None, :]
    seen = (queries.document[:, :, None] == piece.document[:, None, :]) & piece.filled[:, None, :]
    if scoring.causal:
        seen &= distance >= 0
    if scoring.window is not None:
        seen &= distance < scoring.window
    if scoring.slopes is not None:
        slope = jnp.asarray(scoring.slopes, wide).reshape(1, groups, heads // groups, 1, 1)
        scores -= slope * jnp.abs(distance)[:, None, None].astype(wide)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    maximum = jax.lax.stop_gradient(jnp.max(scores, axis=-1))  # as in `Softmax`
    weights, total = softmax_of(scores, maximum)
    weighted = compat.wide_einsum("bgqs,bgsv->bgqv", rows(weights.astype(value.dtype)), value)
    per_query = lambda x: jnp.moveaxis(x.reshape(batch, heads, length, -1), 2, 1)
    return Softmax(per_query(maximum)[..., 0], per_query(total)[..., 0], per_query(weighted))


def _padded(x: Array, length: int) -> Array:
    """Zeros (unfilled, for keys) after the rows of `[B, S, ...]`, up to `length`."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _blocked(x: Array, block: int) -> Array:
    """`[B, T, ...]` as `[N, B, block, ...]`, padded with zeros."""
    count = -(-x.shape[1] // block)
    x = _padded(x, count * block)
    return jnp.moveaxis(x.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)


def _unblocked(x: Array, length: int) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
