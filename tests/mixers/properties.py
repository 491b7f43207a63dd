"""What every property test of the mixers stands on: a mixer under test, layouts of documents, and how arrays compare.

A mixer is observed through one compiled function, `Subject.run`: a span of tokens, then one more token that looks at
the state (`probe`), and the gradients of a weighted sum of both. Two states are the same if whatever follows cannot
tell them apart, which holds for a matrix and for a ring buffer alike. Most properties are then calls of that function
with other values of the same shapes, so that a mixer is compiled a handful of times, not once a test.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from seqmodels import params
from seqmodels.mixers import examples
from seqmodels.typing import Context, MixerConfig, Segments

BATCH, LENGTH, WIDTH = 4, 16, 64
CAPACITY = 4 * LENGTH  # of a full attention's cache: a carried prefix, a span and a few more tokens
TIME = "time"  # the mesh axis of the sharded tests

# Reassociated float32 sums over a few hundred terms differ in the last three or four bits; relative to the largest
# entry of an array. An error of one part in a thousand stands out by a factor of ten and more.
FLOAT32 = 3e-5
# The same for sums that pass through a backward pass, and for float32 against float64.
FLOAT32_GRADIENT = 1e-4
# float64 against itself in another order: 2^-52, times the condition of the gates.
FLOAT64 = 1e-10

CONFIGS: dict[str, MixerConfig] = dict(examples())
ATTENTION = {"attention", "sliding_attention"}  # their states are caches; the other examples are recurrences
RECURRENT = [name for name in CONFIGS if name not in ATTENTION]


class Carry(NamedTuple):
    """A state and how many tokens of each row's carried document it has seen."""

    state: Any
    position: Any


class Weights(NamedTuple):
    """The loss is the sum of the outputs and of the probe's outputs, each times its weight."""

    y: np.ndarray
    probe: np.ndarray


class Gradients(NamedTuple):
    params: Any
    x: Any
    state: Any


class Result(NamedTuple):
    loss: Any
    y: Any
    probe: Any
    carry: Carry
    gradients: Gradients


def is_inexact(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


class Subject:
    """A mixer under test, with every parameter moved away from its initial value: zero biases would hide errors."""

    def __init__(self, config: MixerConfig, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.mixer = config.make(WIDTH, layer=1, depth=4, rngs=nnx.Rngs(0))
        self.definition, arrays = params.split(self.mixer)
        random = np.random.default_rng(1)
        self.params = jax.tree.map(lambda p: np.asarray(p) + normal(random, *p.shape, scale=0.05), arrays)
        self.forward = jax.jit(self._forward)
        self._compiled_run = jax.jit(self._run, static_argnames=("mesh", "steps"))

    def run(
        self,
        x: Any,
        carry: Carry,
        segments: Segments,
        *,
        arrays: Any = None,
        weights: Weights | None = None,
        **how: Any,
    ) -> Result:
        """Outputs, the carry after them, and the gradients; the subject's parameters unless others are given.

        `steps=True` calls the mixer on one token at a time; `mesh` shards time over its devices.
        """
        arrays = self.params if arrays is None else arrays
        weights = random_weights(segments.valid) if weights is None else weights
        probe = tokens(99, x.shape[0], 1)
        return self._compiled_run(arrays, x, carry, segments, weights, probe, **how)

    def trace(self, x: Any, carry: Carry, segments: Segments) -> Any:
        """The program of `run`, traced and not yet lowered."""
        weights, probe = random_weights(segments.valid), tokens(99, x.shape[0], 1)
        return self._compiled_run.trace(self.params, x, carry, segments, weights, probe)

    def fresh(self, batch: int = BATCH) -> Carry:
        """What a document starts from, as numpy arrays."""
        state = jax.tree.map(np.asarray, self.mixer.init_state(batch, capacity=self.capacity))
        return Carry(state, np.zeros(batch, np.int32))

    @functools.cached_property
    def warm(self) -> Carry:
        """A state that has seen tokens: another number of them in every row."""
        before = layout("----------------", "-------------...", "---------+-.....", "+---+---+---+---")
        return jax.tree.map(np.asarray, self.run(tokens(7), self.fresh(), before).carry)

    def _forward(self, arrays: Any, x: Any, carry: Carry, segments: Segments, mesh: Mesh | None = None) -> Any:
        positions, position = segments.positions(carry.position)

        def mix(arrays: Any, x: Any, state: Any, segments: Segments, positions: Any) -> Any:
            context = Context(segments, positions, sequence_axis=None if mesh is None else TIME)
            return params.merge(self.definition, arrays)(x, state, context)

        if mesh is not None:
            along = P(None, TIME)
            mix = jax.shard_map(mix, mesh=mesh, in_specs=(P(), along, P(), along, along), out_specs=(along, P()))
        y, state = mix(arrays, x, carry.state, segments, positions)
        return y, Carry(state, position)

    def _steps(self, arrays: Any, x: Any, carry: Carry, segments: Segments) -> Any:
        def body(carry: Carry, token: Any) -> Any:
            x, segments = jax.tree.map(lambda leaf: leaf[:, None], token)
            y, carry = self._forward(arrays, x, carry, segments)
            return carry, y[:, 0]

        over_time = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), (x, segments))
        carry, y = jax.lax.scan(body, carry, over_time)
        return jnp.moveaxis(y, 0, 1), carry

    def _run(
        self,
        arrays: Any,
        x: Any,
        carry: Carry,
        segments: Segments,
        weights: Weights,
        probe: Any,
        mesh: Mesh | None = None,
        steps: bool = False,
    ) -> Result:
        forward = self._steps if steps else functools.partial(self._forward, mesh=mesh)
        leaves, structure = jax.tree.flatten(carry.state)

        def loss(arrays: Any, x: Any, inexact: list[Any]) -> Any:
            given = iter(inexact)
            state = jax.tree.unflatten(structure, [next(given) if is_inexact(leaf) else leaf for leaf in leaves])
            y, after = forward(arrays, x, Carry(state, carry.position), segments)
            more = Segments.whole(x.shape[0], 1, fresh=False)
            seen, _ = self._forward(arrays, probe.astype(x.dtype), after, more)
            total = jnp.sum(jnp.where(weights.y != 0, weights.y * y, 0)) + jnp.sum(weights.probe * seen)
            return total, (y, seen, after)

        inexact = [leaf for leaf in leaves if is_inexact(leaf)]
        (total, aux), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(arrays, x, inexact)
        return Result(total, *aux, Gradients(*gradients))


@functools.cache
def subject(name: str) -> Subject:
    """One example, made and compiled once for all tests."""
    return Subject(CONFIGS[name])


def normal(random: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * random.normal(size=shape)).astype(np.float32)


def tokens(seed: int, batch: int = BATCH, length: int = LENGTH) -> np.ndarray:
    return normal(np.random.default_rng(seed), batch, length, WIDTH)


def random_weights(valid: np.ndarray, *, probe: bool = True) -> Weights:
    """Random weights at the positions `valid: [B, T]`, zero elsewhere."""
    random = np.random.default_rng(5)
    y = normal(random, *valid.shape, WIDTH) * valid[..., None]
    return Weights(y, normal(random, len(valid), 1, WIDTH) * probe)


def layout(*rows: str) -> Segments:
    """Segments from a drawing, one character a position: `+` starts a document, `-` goes on with it, `.` is padding."""
    drawn = np.array([list(row) for row in rows])
    return Segments(drawn == "+", drawn != ".")


def draw(random: np.random.Generator, batch: int, length: int) -> Segments:
    """A random layout in which documents of length 1, padding before a start and padding at row ends all occur."""
    start = random.random((batch, length)) < 0.2
    padding = random.random((batch, length)) < 0.3
    valid = np.ones((batch, length), bool)
    for t in reversed(range(length)):  # only where a start, more padding or the end of the row follows
        allowed = True if t == length - 1 else start[:, t + 1] | ~valid[:, t + 1]
        valid[:, t] = ~(padding[:, t] & allowed)
    return Segments(start & valid, valid)


MIXED = layout(
    "----++-----+----",  # goes on with the carried document; a document of one token
    "...+------..+...",  # padding before a start, and at the end
    "+++-------------",
    "-+--------......",
)
UNBROKEN = layout(*["-" * LENGTH] * BATCH)


class Document(NamedTuple):
    """A stretch of one row: `carried` goes on with the row's state, the others start fresh."""

    begin: int
    end: int
    carried: bool


def documents(start: np.ndarray, valid: np.ndarray) -> list[Document]:
    """The documents of one row."""
    number = np.cumsum(start)
    spans = ((index, np.flatnonzero((number == index) & valid)) for index in range(number[-1] + 1))
    return [Document(where[0], where[-1] + 1, index == 0) for index, where in spans if where.size]


def row_of(carry: Carry, row: int) -> Carry:
    """One row of every leaf."""
    return jax.tree.map(lambda leaf: leaf[row], carry)


def choose_rows(condition: np.ndarray, on_true: Carry, on_false: Carry) -> Carry:
    """Row by row one of two carries; every leaf of a state has the batch in front."""

    def leaf(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(leaf, on_true, on_false)


def right_padded(lengths: Sequence[int], length: int = LENGTH, *, start: bool) -> Segments:
    """One document a row, of the given lengths, at the beginning of its row."""
    valid = np.arange(length)[None, :] < np.asarray(lengths)[:, None]
    first = np.zeros_like(valid)
    first[:, 0] = start
    return Segments(first & valid, valid)


def float64(tree: Any) -> Any:
    """Floating leaves in float64; used under `jax.enable_x64`."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64) if is_inexact(x) else np.asarray(x), tree)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Leaf by leaf, errors below `tolerance` times the leaf's largest entry."""

    def scaled(x: Any, like: Any) -> np.ndarray:
        x, like = np.asarray(x, np.float64), np.asarray(like, np.float64)
        largest = np.max(np.abs(like), initial=0.0, where=np.isfinite(like))
        return x / (largest if largest > 0 else 1.0)

    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_close(
        jax.tree.map(scaled, actual, expected), jax.tree.map(scaled, expected, expected), rtol=0, atol=tolerance
    )


def assert_valid_close(actual: Any, expected: Any, valid: np.ndarray, tolerance: float = FLOAT32) -> None:
    """As `assert_close`, for `[B, T, ...]` arrays at the positions that hold tokens."""
    assert_close(np.asarray(actual)[valid], np.asarray(expected)[valid], tolerance)
