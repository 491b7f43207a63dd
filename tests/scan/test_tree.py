"""Non-associative prefixes: the schedule on strings, then arrays against it; streaming, resets, padding, gradients."""

from __future__ import annotations

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from seqmodels.scan import Recurrence, counter_prefixes, empty_counter, scan, step, tree_prefixes

pytestmark = pytest.mark.optimised
MODULUS = 1_000_003


def bracket(a: str, b: str) -> str:
    return f"({a}{b})"


def mix(a: Any, b: Any) -> Any:
    """Neither associative nor commutative, and exact in integers."""
    return (a * 31 + b * 17 + 1) % MODULUS


MIX = Recurrence(
    elements=lambda x: x,
    combine=mix,
    identity=jnp.zeros_like,
    read=lambda prefix, x: jnp.stack([jnp.where(prefix[1], prefix[0], -1), x]),
    associative=False,
)


def test_the_parenthesisation_is_the_published_one() -> None:
    """Exclusive prefixes of eight items as listed for prefix-scannable models (2506.10918)."""
    listed = [None, "0", "(01)", "((01)2)", "((01)(23))", "(((01)(23))4)", "(((01)(23))(45))", "((((01)(23))(45))6)"]
    assert tree_prefixes(bracket, [str(i) for i in range(8)]) == listed
    assert list(counter_prefixes(bracket, (str(i) for i in range(8)))) == listed


@pytest.mark.parametrize("length", range(65))
def test_the_static_tree_equals_the_counter_for_every_length(length: int) -> None:
    items = [chr(ord("0") + i) for i in range(length)]
    prefixes = tree_prefixes(bracket, items)
    assert prefixes == list(counter_prefixes(bracket, items))
    for n, prefix in enumerate(prefixes):  # the left fold of complete aligned blocks, largest first
        blocks, done = [], 0
        while done < n:
            size = 1 << ((n - done).bit_length() - 1)
            while size > 1 and (done % size or done + size > n):
                size //= 2
            block = items[done : done + size]
            while len(block) > 1:
                block = [bracket(*pair) for pair in zip(block[::2], block[1::2], strict=True)]
            blocks.append(block[0])
            done += size
        assert prefix == (functools.reduce(bracket, blocks) if blocks else None)


def _oracle(items: np.ndarray, reset: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Each document's valid items by the plain Python schedule; an invalid step outputs zero."""
    document: list[int] = []
    outputs = []
    for x, starts, counts in zip(items, reset, valid, strict=True):
        document = [] if starts else document
        if counts:
            prefix = tree_prefixes(mix, [*document, int(x)])[-1]
            outputs.append([-1 if prefix is None else prefix, int(x)])
            document = [*document, int(x)]
        else:
            outputs.append([0, 0])
    return np.array(outputs), document


@pytest.mark.parametrize("length", [1, 2, 7, 8, 33])
def test_arrays_follow_the_schedule_with_resets_and_padding(length: int) -> None:
    rng = np.random.default_rng(length)
    items = rng.integers(0, 1000, length).astype(np.int32)
    static, one = (jax.jit(functools.partial(run, MIX)) for run in (scan, step))
    none, full = np.zeros(length, bool), np.ones(length, bool)
    some, most = rng.random(length) < 0.3, rng.random(length) < 0.7
    for reset, valid in ((none, full), (some, full), (none, most), (some, most)):
        expected, document = _oracle(items, reset, valid)
        counters = []
        for state in (None, empty_counter(MIX, items[0])):
            outputs, counter = static(items, state, reset=reset, valid=valid)
            np.testing.assert_array_equal(outputs, expected)
            assert counter.size == len(document)
            counters.append(counter)
        rest = rng.integers(0, 1000, 5).astype(np.int32)
        expected = _oracle(
            np.array([*document, *rest]), none[:1].repeat(len(document) + 5), full[:1].repeat(len(document) + 5)
        )
        expected = expected[0][len(document) :]
        for counter in counters:  # both go on in the same way, by scan and by step
            np.testing.assert_array_equal(static(rest, counter)[0], expected)
            outputs, _ = one(rest[0], counter)
            np.testing.assert_array_equal(outputs, expected[0])


def test_the_plain_form_without_masks_is_the_same() -> None:
    items = np.arange(21, dtype=np.int32)
    expected = _oracle(items, np.zeros(21, bool), np.ones(21, bool))[0]
    rows = jax.jit(jax.vmap(lambda x: scan(MIX, x)[0]))(jnp.stack([items, items[::-1]]))
    np.testing.assert_array_equal(rows[0], expected)


def _smooth() -> Recurrence:
    return Recurrence(
        elements=lambda x: x,
        combine=lambda a, b: jnp.tanh(a @ jnp.array([[0.9, 0.2], [-0.3, 0.8]], a.dtype) + 0.7 * b),
        identity=jnp.zeros_like,
        read=lambda prefix, x: prefix[0] * x,
        associative=False,
    )


def test_gradients_of_tree_and_counter_agree_and_reach_the_state() -> None:
    rng = np.random.default_rng(0)
    recurrence = _smooth()
    inputs = jnp.asarray(rng.normal(size=(11, 2)), jnp.float32)
    valid = jnp.arange(11) != 4

    @functools.partial(jax.jit, static_argnums=1)
    @jax.value_and_grad
    def split(inputs: jax.Array, cut: int | None) -> jax.Array:
        poisoned = jnp.where(valid[:, None], inputs, jnp.nan)
        if cut is None:
            outputs, counter = scan(recurrence, poisoned, valid=valid)
        else:
            first, counter = scan(recurrence, poisoned[:cut], valid=valid[:cut])
            second, counter = scan(recurrence, poisoned[cut:], counter, valid=valid[cut:])
            outputs = jnp.concatenate([first, second])
        return jnp.sum(jnp.sin(outputs)) + jnp.sum(step(recurrence, jnp.ones(2), counter)[0])

    whole = split(inputs, None)
    chex.assert_tree_all_finite(whole)
    chex.assert_trees_all_close(split(inputs, 6), whole, rtol=1e-5, atol=1e-6)


def test_unused_lanes_of_the_tree_leave_no_trace_in_gradients() -> None:
    """A combine that is singular at zero: sqrt(w a b)."""
    items = jnp.asarray([1.0, 2.0, 3.0, 4.0])

    @jax.jit
    @jax.value_and_grad
    def by(w: jax.Array, state: Any) -> jax.Array:
        recurrence = MIX._replace(combine=lambda a, b: jnp.sqrt(w * a * b), read=lambda p, x: jnp.where(p[1], p[0], x))
        return jnp.sum(scan(recurrence, items, state)[0])

    counter = empty_counter(MIX._replace(combine=lambda a, b: a), items[0])
    chex.assert_trees_all_close(by(2.0, None), by(2.0, counter), rtol=1e-6)


def test_a_counter_past_its_levels_says_nan() -> None:
    recurrence = _smooth()
    ones = jnp.ones((9, 2))
    outputs, _ = scan(recurrence, ones, empty_counter(recurrence, ones[0], levels=3))
    assert jnp.isfinite(outputs[:8]).all(), "three levels hold seven items"
    assert jnp.isnan(outputs[8]).all()
    with pytest.raises(ValueError, match="1 to 32 levels, not 0"):
        empty_counter(recurrence, ones[0], levels=0)


def test_a_tree_over_n_items_aggregates_fewer_than_2n_times() -> None:
    """Work of the static tree: the rows that pass through `combine`, read off the traced program."""
    marked = MIX._replace(combine=lambda a, b: lax.optimization_barrier(mix(a, b)))
    program = str(jax.make_jaxpr(lambda x: scan(marked, x))(jnp.arange(64)))
    rows = [int(n or 1) for n in re.findall(r":i32\[(\d*)\] = optimization_barrier", program)]
    assert 64 < sum(rows) < 2 * 64, rows
