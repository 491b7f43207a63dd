"""The slow tier: every method and chunk of the mixers that leave the choice open.

Each mixer runs all methods at one length, one of each kind (`FAMILIES`) every chunk, another length, types and scales
and with gradients: operators have such tests of their own, and what is around them is that of all methods.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.typing import Segments
from tests.mixers.properties import (
    BATCH,
    CONFIGS,
    FLOAT32,
    FLOAT32_GRADIENT,
    NONLINEAR,
    Carry,
    Gradients,
    Subject,
    assert_close,
    assert_valid_close,
    draw,
    float64,
    tokens,
)
from tests.mixers.test_lengths import AMPLIFIED, FAMILIES, ODD
from tests.mixers.test_numerics import AMPLIFIED as ROUNDED
from tests.mixers.test_numerics import BFLOAT16_99, EXTREME, SENSITIVE

pytestmark = pytest.mark.slow

OPEN = {name: {field.name for field in dataclasses.fields(config)} for name, config in CONFIGS.items()}
OPEN = {name: fields for name, fields in OPEN.items() if "method" in fields}
CHUNKS = (1, 3, 16, 64)
SOME_CHUNKS = (16,)  # with the whole length: several, the last one of one token, or one alone
SOME = [name for name in OPEN if name in FAMILIES]


def variants(name: str, length: int, chunks: Sequence[int] | None = CHUNKS) -> list[dict[str, Any]]:
    """Of methods, and with some chunks and the whole length as one, unless `chunks` is None."""
    if name in NONLINEAR:
        return [{"method": "newton"}]
    chosen = [{"method": "associative"}, {"method": "chunked"}]
    if "chunk" in OPEN[name] and chunks is not None:
        chosen += [{"method": "chunked", "chunk": chunk} for chunk in (*chunks, length)]
    if name in ("s4", "s4d", "s5", "lru"):
        chosen.append({"method": "convolution"})
    return chosen


@functools.cache
def subject(name: str, **changes: Any) -> Subject:
    return Subject(dataclasses.replace(CONFIGS[name], **changes), caches=False)


@functools.cache
def warm(name: str) -> Carry:
    """A state that has seen tokens; `Subject.warm` would compile gradients for it."""
    loop = subject(name, method="sequential")
    start = np.random.default_rng(0).random((BATCH, ODD)) < 0.05
    return loop.forward(loop.params, tokens(7, BATCH, ODD), loop.fresh, Segments(start, np.ones_like(start)))[1]


def assert_equals_the_loop(name: str, length: int) -> None:
    """Outputs and state of a random layout, from a state that has seen tokens, against one token at a time."""
    loop = subject(name, method="sequential")
    start = warm(name)
    x, segments = tokens(length, BATCH, length), draw(np.random.default_rng(length), BATCH, length)
    expected, after = loop.forward(loop.params, x, start, segments)
    for changes in variants(name, length, CHUNKS if name in FAMILIES else None):
        s = subject(name, **changes)
        y, carry = s.forward(s.params, x, start, segments)
        try:
            assert_valid_close(y, expected, segments.valid, AMPLIFIED.get(name, 1) * FLOAT32)
            assert_close(carry, after, FLOAT32)
        except AssertionError as error:
            raise AssertionError(f"{changes}: {error}") from error


@pytest.mark.parametrize("name", OPEN)
def test_every_method_and_chunk(name: str) -> None:
    assert_equals_the_loop(name, ODD)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("length", [128])
def test_every_method_and_chunk_at_other_lengths(name: str, length: int) -> None:
    assert_equals_the_loop(name, length)


@pytest.mark.parametrize("name", SOME)
def test_gradients_of_every_method(name: str) -> None:
    loop, x = subject(name, method="sequential"), tokens(1, BATCH, ODD)
    segments = draw(np.random.default_rng(2), BATCH, ODD)
    weights = loop.weights(segments.valid)
    expected = loop.run(x, loop.warm, segments, weights=weights).gradients
    for changes in variants(name, ODD, SOME_CHUNKS):
        found = subject(name, **changes).run(x, loop.warm, segments, weights=weights).gradients
        for ours, theirs, part in zip(found, expected, Gradients._fields, strict=True):
            try:
                assert_close(ours, theirs, AMPLIFIED.get(name, 1) * FLOAT32_GRADIENT)
            except AssertionError as error:
                raise AssertionError(f"gradient to {part}, {changes}: {error}") from error


@pytest.mark.parametrize("name", SOME)
def test_extreme_gates_and_bfloat16_of_every_chunk(name: str) -> None:
    """Gates at their ends stay finite and are what float64 says; bfloat16 stays near float32."""
    loop, x = subject(name, method="sequential"), tokens(1, BATCH, ODD)
    segments = draw(np.random.default_rng(2), BATCH, ODD)
    large = np.float32(1e2) * x
    with jax.enable_x64(True):
        arrays, wide, warm = float64((loop.params, large, loop.warm))
        exact, state = jax.tree.map(np.asarray, loop.forward(arrays, wide, warm, segments))
    usual = np.asarray(loop.forward(loop.params, x, loop.fresh, segments)[0])
    size = np.sqrt(np.mean(usual[segments.valid] ** 2))
    for changes in variants(name, ODD):
        s = subject(name, **changes)
        y, after = s.forward(s.params, large, loop.warm, segments)
        chex.assert_tree_all_finite(jax.tree.map(np.asarray, (y, after)))
        assert_valid_close(y, exact, segments.valid, SENSITIVE.get(name, 1) * EXTREME)
        assert_close(after, state, SENSITIVE.get(name, 1) * EXTREME)
        carry = Carry(s.mixer.init_state(BATCH, dtype=jnp.bfloat16), np.zeros(BATCH, np.int32))
        narrow = np.asarray(s.forward(s.params, x.astype(jnp.bfloat16), carry, segments)[0], np.float32)
        error = np.abs(narrow - usual)[segments.valid] / size
        assert np.quantile(error, 0.99) < ROUNDED.get(name, 1) * BFLOAT16_99, changes
