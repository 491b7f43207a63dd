"""Recurrent memory: every mixer says what of its state it is, and a drawn one is a state to start from."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from seqmodels.typing import Memory
from tests.mixers.properties import (
    BATCH,
    CONFIGS,
    FLOAT32,
    Carry,
    assert_valid_close,
    is_inexact,
    layout,
    normal,
    subject,
    tokens,
)

# Inputs of the last tokens, which short convolutions, token shifts and the trapezoidal rule look back at.
INPUTS = {"conv", "last", "key", "value"}
# What is bound to positions of its own document: caches, and counters over chunks or powers of two.
BOUND = {
    "attention": {"key", "value"},
    "sliding_attention": {"key", "value"},
    "log_linear": {"memory"},
    "psm": {"counter", "chunk", "inference"},
}
RECURRENT = [name for name in CONFIGS if name not in BOUND]


def leaves(state) -> dict[str, np.ndarray]:
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in flat}


def declared(name: str) -> Memory:
    return getattr(subject(name).mixer, "recurrent_memory", Memory(()))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_float_of_a_state_is_declared_or_left_out_on_purpose(name: str) -> None:
    memory, found = declared(name), leaves(subject(name).fresh.state)
    told = {*memory.leaves, *memory.companions}
    assert set(memory.leaves).isdisjoint(memory.companions)
    assert told <= set(found)
    left_out = {field for field, leaf in found.items() if is_inexact(leaf)} - told
    assert {field.split(".")[0] for field in left_out} <= INPUTS | BOUND.get(name, set())
    assert bool(memory.leaves) == (name in RECURRENT)
    for field in memory.leaves:
        assert is_inexact(found[field])


@pytest.mark.parametrize("name", RECURRENT)
def test_heads_are_the_axis_after_the_batch(name: str) -> None:
    s, memory = subject(name), declared(name)
    heads = getattr(s.mixer, "heads", None) or getattr(CONFIGS[name], "heads", None)
    assert memory.heads == (heads is not None)
    for field in memory.leaves:
        leaf = leaves(s.fresh.state)[field]
        assert leaf.shape[0] == BATCH
        assert not memory.heads or (leaf.ndim > 2 and leaf.shape[1] == heads)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_drawn_memory_is_read_and_forgets_at_a_start(name: str) -> None:
    """Beside its companions' neutral values noise gives finite outputs of another size than zeros, and no NaN."""
    s, memory, x, random = subject(name), declared(name), tokens(0, BATCH, 1), np.random.default_rng(3)
    found, structure = leaves(s.fresh.state), jax.tree.structure(s.fresh.state)
    for field in memory.leaves:
        found[field] = found[field] + normal(random, *found[field].shape)
    for field, value in memory.companions.items():
        found[field] = np.full_like(found[field], value)
    drawn = Carry(jax.tree.unflatten(structure, list(found.values())), s.fresh.position)
    segments = layout("-", "+", "-", ".")
    y = np.asarray(s.forward(s.params, x, drawn, segments)[0])
    zeros = np.asarray(s.forward(s.params, x, s.fresh, segments)[0])
    assert np.isfinite(y).all()
    assert np.abs(y).max() < 100 * np.abs(zeros).max()
    for row in (0, 2):
        assert np.abs(y[row] - zeros[row]).max() > 1e-3 * np.abs(zeros[row]).max()
    assert_valid_close(y[1:2], zeros[1:2], segments.valid[1:2], FLOAT32)
