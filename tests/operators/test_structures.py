"""Affine recurrences from a declared structure, their laws, and how the chunk forms look when compiled."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.operators import Diagonal, Outer, affine_recurrence
from seqmodels.operators.affine import Dense
from seqmodels.scan import scan
from seqmodels.testing import check_recurrence

# float32 rounding over 9 steps.
ROUNDING = 1e-5
T, K, V = 9, 4, 3
NOISE = [jax.random.normal(k, (T, K)) for k in jax.random.split(jax.random.key(0), 4)]
VALUE = jax.random.normal(jax.random.key(1), (T, V))
DECAY = -jnp.exp(NOISE[0])

# structure -> (inputs, the float64 loop's (transition, drive, read) of a step)
CASES = {
    ("identity", "vector"): (Diagonal(jnp.zeros((T, K)), NOISE[1]), lambda x: (1.0, x.drive)),
    ("scalar", "vector"): (Diagonal(DECAY[:, 0], NOISE[1]), lambda x: (np.exp(x.log_decay), x.drive)),
    ("diagonal", "vector"): (Diagonal(DECAY, NOISE[1]), lambda x: (np.exp(x.log_decay), x.drive)),
    ("identity", "outer"): (Outer(*NOISE[1:3], VALUE, None), lambda x: (1.0, np.outer(x.key, x.value))),
    ("scalar", "outer"): (
        Outer(*NOISE[1:3], VALUE, DECAY[:, 0]),
        lambda x: (np.exp(x.log_decay), np.outer(x.key, x.value)),
    ),
    ("diagonal", "outer"): (
        Outer(*NOISE[1:3], VALUE, DECAY),
        lambda x: (np.exp(x.log_decay)[:, None], np.outer(x.key, x.value)),
    ),
    ("dense", "vector"): (Dense(jnp.stack([jnp.outer(a, a) / 8 for a in NOISE[0]]), NOISE[1]), None),
}


def _loop(name: tuple[str, str], inputs: object, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, step = CASES[name]
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
    outputs = []
    for t in range(T):
        x = jax.tree.map(lambda leaf, t=t: leaf[t], wide)
        if step is None:
            state = x.matrix @ state + x.drive
        else:
            decay, drive = step(x)
            state = decay * state + drive
        outputs.append(x.query @ state if isinstance(x, Outer) else state)
    return np.stack(outputs), state


@pytest.mark.parametrize("name", CASES, ids="-".join)
def test_a_declared_structure_runs_in_every_form(name: tuple[str, str]) -> None:
    inputs, _ = CASES[name]
    recurrence = affine_recurrence(*name)
    shape = (K, V) if name[1] == "outer" else (K,)
    state = jax.random.normal(jax.random.key(2), shape)
    expected = _loop(name, inputs, np.asarray(state, np.float64))
    for options in ({"method": "sequential"}, {"method": "associative"}, {"method": "chunked", "chunk": 4}):
        got = jax.jit(lambda x, s, o=options: scan(recurrence, x, s, **o))(inputs, state)
        chex.assert_trees_all_close(got, expected, rtol=ROUNDING, atol=ROUNDING)
    assert (recurrence.emit is None) == (name[0] == "dense"), "a dense transition has no cheaper form than its elements"


@pytest.mark.parametrize("name", CASES, ids="-".join)
def test_every_structure_keeps_the_laws(name: tuple[str, str]) -> None:
    inputs, _ = CASES[name]
    check_recurrence(affine_recurrence(*name), jax.tree.map(lambda x: x[:5], inputs))


def test_reading_before_keeps_the_laws_too() -> None:
    inputs = jax.tree.map(lambda x: x[:5], CASES["diagonal", "outer"][0])
    check_recurrence(affine_recurrence("diagonal", "outer", read_before=True), inputs, jnp.ones((K, V)))


def test_an_unknown_structure_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="transitions are identity, scalar, diagonal, dense; drives are vector, outer"):
        affine_recurrence("rank-one", "outer")
    with pytest.raises(ValueError, match="read_before belongs to outer drives"):
        affine_recurrence("diagonal", "vector", read_before=True)


def test_the_chunked_form_holds_no_state_per_token() -> None:
    """The compiled gradient has no [T, K, V] array, and no [C, C, K] one either."""
    length, size = 256, 32
    recurrence = affine_recurrence("diagonal", "outer")
    inputs = Outer(*(jnp.ones((length, size)) for _ in range(3)), -jnp.ones((length, size)))
    loss = lambda x: jnp.sum(scan(recurrence, x, method="chunked", chunk=64)[0])
    text = jax.jit(jax.grad(loss)).lower(inputs).as_text()
    assert f"tensor<4x{size}x{size}xf32>" in text, "the carry of every chunk"
    for shape in ((length, size, size), (64, 64, size), (4, 64, 64, size)):
        assert f"tensor<{'x'.join(map(str, shape))}xf32>" not in text
