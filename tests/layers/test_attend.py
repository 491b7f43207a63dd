"""Blocked attention against the direct form, and what may stand in keys that nobody may see."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.layers import Keys, Positions, Queries, Scoring, alibi_slopes, attend, attend_in_window, rope
from seqmodels.layers.positions import rotated_size

# float32 sums of a few dozen terms in another order, and one softmax.
ROUNDING = 2e-6

BATCH, LENGTH, HEADS, GROUPS, SIZE = 2, 37, 4, 2, 6


def tokens(window: int | None) -> tuple[Queries, Keys, Keys]:
    """Three documents with padding before the last, of which the first goes on from the cached keys."""
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    document = jnp.asarray(np.repeat([0, 1, 2], [9, 17, 11])[None].repeat(BATCH, 0))
    position = jnp.asarray(np.concatenate([np.arange(9) + 5, np.arange(17), np.arange(11)])[None].repeat(BATCH, 0))
    filled = jnp.ones((BATCH, LENGTH), bool).at[:, 23:26].set(False)
    own = Keys(normal(BATCH, LENGTH, GROUPS, SIZE), normal(BATCH, LENGTH, GROUPS, SIZE), document, position, filled)
    slots = 5 if window is None else window
    order = jnp.asarray(np.arange(slots)[None].repeat(BATCH, 0))
    order = order if window is None else order + 5 - window
    cached = Keys(
        normal(BATCH, slots, GROUPS, SIZE),
        normal(BATCH, slots, GROUPS, SIZE),
        jnp.zeros_like(order),
        order,
        (order >= 0) & (order < 5),
    )
    return Queries(normal(BATCH, LENGTH, HEADS, SIZE), document, position), cached, own


@pytest.mark.parametrize(
    ("scoring", "block"),
    [(Scoring(), 4), (Scoring(slopes=tuple(alibi_slopes(HEADS)), logits_cap=2.0), 8), (Scoring(causal=False), 8)],
)
def test_blocks_of_queries_equal_all_at_once(scoring: Scoring, block: int) -> None:
    queries, cached, own = tokens(None)

    def loss(queries, cached, own, block):
        out = attend(queries, cached, own, scoring, block=block)
        return jnp.sum(jnp.sin(out)), out

    grad = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True, allow_int=True), static_argnums=3)
    inexact = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype == jnp.float32]
    found, expected = (inexact(grad(queries, cached, own, n)) for n in (block, LENGTH))
    chex.assert_trees_all_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize(("window", "with_cache"), [(1, True), (3, False), (8, True)])
def test_window_in_blocks_equals_masked_attention(window: int, with_cache: bool) -> None:
    queries, cached, own = tokens(window)
    scoring = Scoring(window)
    cache = cached if with_cache else None
    both = jax.jit(
        lambda queries, cache, own: (
            attend_in_window(queries, cache, own, scoring, block=8),
            attend(queries, cache, own, scoring),
        )
    )
    blocked, direct = both(queries, cache, own)
    chex.assert_trees_all_close(blocked, direct, rtol=ROUNDING, atol=ROUNDING)
    # The direct form sees the window: more keys give other outputs.
    wider = attend(queries, None, own, Scoring(window + 1))
    assert float(jnp.max(jnp.abs(wider - direct))) > 0.01


@pytest.mark.parametrize("form", [attend, attend_in_window])
def test_unfilled_keys_may_hold_anything(form) -> None:
    queries, cached, own = tokens(4)
    scoring = Scoring(4)

    def run(query, cached, own):
        return form(queries._replace(query=query), cached, own, scoring)

    def poison(keys):
        mask = keys.filled[..., None, None]
        return keys._replace(key=jnp.where(mask, keys.key, jnp.nan), value=jnp.where(mask, keys.value, jnp.inf))

    def value_and_gradient(cached, own):
        y, pull = jax.vjp(lambda query: run(query, cached, own), queries.query)
        return y, pull(y)

    both = jax.jit(value_and_gradient)
    chex.assert_trees_all_equal(both(poison(cached), poison(own)), both(cached, own))


def test_a_query_that_sees_nothing_yields_zero_and_no_gradient() -> None:
    queries, _, own = tokens(None)
    alone = own._replace(filled=jnp.zeros_like(own.filled))
    y, pull = jax.vjp(lambda query: attend(queries._replace(query=query), None, alone, Scoring()), queries.query)
    chex.assert_trees_all_equal((y, pull(jnp.ones_like(y))[0]), (jnp.zeros_like(y), jnp.zeros_like(queries.query)))


def test_scores_of_any_size_neither_overflow_nor_vanish() -> None:
    queries, _, own = tokens(None)
    y = attend(queries._replace(query=1e4 * queries.query), None, own, Scoring())
    chex.assert_tree_all_finite(y)
    own = own._replace(filled=jnp.ones_like(own.filled))
    y = attend(queries._replace(query=1e4 * queries.query), None, own, Scoring(1))
    chex.assert_trees_all_close(y, jnp.repeat(own.value, HEADS // GROUPS, axis=2), rtol=ROUNDING, atol=ROUNDING)


def test_rope_depends_on_differences_and_leaves_the_rest_alone() -> None:
    random = np.random.default_rng(1)
    query, key = (jnp.asarray(random.standard_normal((1, 4, 1, 8)), jnp.float32) for _ in range(2))
    positions = jnp.asarray([[0, 3, 4, 90]])
    scores = []
    for shift in (0, 17):
        turned = [rope(x, positions + shift, fraction=0.5, base=100.0) for x in (query, key)]
        chex.assert_trees_all_equal(turned[0][..., 4:], query[..., 4:])
        scores.append(jnp.einsum("bthk,bshk->bts", *turned))
    # Angles of about 100 radians carry a float32 error of 1e-5.
    chex.assert_trees_all_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)
    assert float(jnp.max(jnp.abs(scores[0] - jnp.einsum("bthk,bshk->bts", query, key)))) > 0.1


@pytest.mark.parametrize(
    ("heads", "expected"),
    [(1, [2.0**-8]), (2, [2.0**-4, 2.0**-8]), (3, [2.0**-4, 2.0**-8, 2.0**-2]), (8, [2.0**-n for n in range(1, 9)])],
)
def test_alibi_slopes(heads: int, expected: list[float]) -> None:
    np.testing.assert_allclose(alibi_slopes(heads), expected, rtol=1e-12)
    assert len(alibi_slopes(12)) == 12


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\], not 1.5"):
        rotated_size(8, 1.5)
    with pytest.raises(ValueError, match="no pair of channels"):
        rotated_size(8, 0.1)
    with pytest.raises(ValueError, match="needs a causal window"):
        attend_in_window(*tokens(None), Scoring())
    assert [str(p) for p in Positions] == ["rope", "nope", "alibi"]
