"""What every property test of the mixers stands on: a mixer under test, layouts of documents, and how arrays compare.

A mixer is observed through one compiled function, `Subject.run`: its outputs, what can be told of the state after them,
and the gradients of a weighted sum of both. Most properties are calls of that function with other values of the same
shapes, so that a mixer is compiled a handful of times, not once a test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from seqmodels import params
from seqmodels.mixers import examples
from seqmodels.typing import Context, MixerConfig, Segments

BATCH, LENGTH, WIDTH = 4, 16, 64
CAPACITY = 4 * LENGTH  # of a full attention's cache: a carried prefix, a span and a few more tokens
TIME = "time"  # the mesh axis of the sharded tests

# Reassociated float32 sums of a few hundred terms differ by a few units of 2^-24, relative to the largest entry of an
# array (1e-6 was the worst seen); gradients pass through two such sums and more.
FLOAT32 = 1e-5
FLOAT32_GRADIENT = 3e-5

CONFIGS: dict[str, MixerConfig] = dict(examples())
ATTENTION = {"attention", "sliding_attention"}  # their states are caches, some of whose slots nobody ever reads
TREES = {"psm"}  # as many levels as the capacity asks for, and attention inside
RECURRENT = [name for name in CONFIGS if name not in ATTENTION | TREES]
# Mixers whose time cannot be sharded (a nonlinear cell's span has no element, a PSM's tree is not re-associated): they
# raise ValueError under `Context.sequence_axis`, with the word "shard" and what follows "because".
SEQUENTIAL = {"gru", "lstm", "slstm", "psm"}
# Those of them that run `sequential` and `newton`, and no other method.
NONLINEAR = {"gru", "lstm", "slstm"}


class Carry(NamedTuple):
    """A state and how many tokens of each row's carried document it has seen."""

    state: Any
    position: Any


class Weights(NamedTuple):
    """The loss is the sum of `Result.y` and of the inexact leaves of `Result.after`, each times its weight."""

    y: np.ndarray
    after: list[np.ndarray]


class Gradients(NamedTuple):
    params: Any
    x: Any
    state: Any


class Result(NamedTuple):
    """`after` is what can be told of the final state: the state itself, or what one more token reads in a cache."""

    loss: Any
    y: Any
    after: Any
    carry: Carry
    gradients: Gradients


def is_inexact(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def both_parts(leaf: Any) -> Any:
    """A real array that depends on the real and on the imaginary part of a complex one; a real one as it is."""
    return leaf.real + 0.5 * leaf.imag if jnp.iscomplexobj(leaf) else leaf


def inexact(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]


class Subject:
    """A mixer under test, with every parameter moved away from its initial value: zero biases would hide errors."""

    def __init__(self, config: MixerConfig, *, caches: bool, capacity: int = CAPACITY) -> None:
        self.caches, self.capacity = caches, capacity

        @jax.jit
        def make() -> Any:  # jitted: one program instead of one a parameter
            self.definition, arrays = params.split(config.make(WIDTH, layer=1, depth=4, rngs=nnx.Rngs(0)))
            return arrays

        random = np.random.default_rng(1)
        self.params = jax.tree.map(lambda p: np.asarray(p) + normal(random, *p.shape, scale=0.05), make())
        self.mixer = params.merge(self.definition, self.params)
        self.compiled_forward = jax.jit(self._forward)
        self._compiled_run = jax.jit(self._run, static_argnames=("mesh", "check_vma", "steps"))

    def launch(
        self,
        x: Any,
        carry: Carry,
        segments: Segments,
        *,
        arrays: Any = None,
        weights: Weights | None = None,
        **how: Any,
    ) -> Result:
        """Outputs, the state after them, and the gradients; the subject's parameters unless others are given.

        `steps=True` calls the mixer on one token at a time; `mesh` shards time over its devices.
        """
        arrays = self.params if arrays is None else arrays
        weights = self.weights(segments.valid) if weights is None else weights
        return self._compiled_run(arrays, x, carry, segments, weights, **how)

    def run(self, *inputs: Any, **options: Any) -> Result:
        """`launch`, as numpy arrays: every slice of a jax array would be compiled."""
        return jax.device_get(self.launch(*inputs, **options))

    def forward(self, arrays: Any, x: Any, carry: Carry, segments: Segments) -> tuple[np.ndarray, Carry]:
        """Outputs and the state after them, as numpy arrays."""
        return jax.device_get(self.compiled_forward(arrays, x, carry, segments))

    def trace(self, x: Any, carry: Carry, segments: Segments) -> Any:
        """The program of `run`, traced and not yet lowered."""
        return self._compiled_run.trace(self.params, x, carry, segments, self.weights(segments.valid))

    def after(self, carry: Carry) -> Any:
        """As `Result.after`."""
        return self._after(self.forward, self.params, carry)

    @functools.cached_property
    def fresh(self) -> Carry:
        """What a document starts from, as numpy arrays."""
        state = jax.tree.map(np.asarray, self.mixer.init_state(BATCH, capacity=self.capacity))
        return Carry(state, np.zeros(BATCH, np.int32))

    @functools.cached_property
    def warm(self) -> Carry:
        """A state that has seen tokens: another number of them in every row."""
        before = layout("----------------", "-------------...", "---------+-.....", "+---+---+---+---")
        return jax.tree.map(np.asarray, self.run(tokens(7), self.fresh, before).carry)

    def weights(self, valid: np.ndarray, *, after: bool = True) -> Weights:
        """Random weights of the outputs at `valid: [B, T]`, zero elsewhere, and of what can be told of the state."""
        random = np.random.default_rng(5)
        y = normal(random, *valid.shape, WIDTH) * valid[..., None]
        shapes = [(BATCH, 1, WIDTH)] if self.caches else [leaf.shape for leaf in inexact(self.fresh.state)]
        return Weights(y, [normal(random, *shape) * after for shape in shapes])

    def _after(self, forward: Callable[..., Any], arrays: Any, carry: Carry) -> Any:
        if not self.caches:
            return carry.state
        dtype = jax.tree.leaves(arrays)[0].dtype
        return forward(arrays, tokens(99, BATCH, 1).astype(dtype), carry, Segments.whole(BATCH, 1, fresh=False))[0]

    def _forward(
        self, arrays: Any, x: Any, carry: Carry, segments: Segments, *, mesh: Any = None, **check: bool
    ) -> Any:
        positions, position = segments.positions(carry.position)

        def mix(arrays: Any, x: Any, state: Any, segments: Segments, positions: Any) -> Any:
            context = Context(segments, positions, sequence_axis=None if mesh is None else TIME)
            return params.merge(self.definition, arrays)(x, state, context)

        if mesh is not None:
            along = P(None, TIME)
            specs = {"in_specs": (P(), along, P(), along, along), "out_specs": (along, P())}
            mix = jax.shard_map(mix, mesh=mesh, **specs, **check)
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
        steps: bool = False,
        **sharding: Any,
    ) -> Result:
        forward = self._steps if steps else functools.partial(self._forward, **sharding)
        leaves, structure = jax.tree.flatten(carry.state)

        def loss(arrays: Any, x: Any, given: list[Any]) -> Any:
            rest = iter(given)
            state = jax.tree.unflatten(structure, [next(rest) if is_inexact(leaf) else leaf for leaf in leaves])
            y, carried = forward(arrays, x, Carry(state, carry.position), segments)
            after = self._after(self._forward, arrays, carried)
            total = jnp.sum(jnp.where(weights.y != 0, weights.y * y, 0))
            total += sum(jnp.sum(w * both_parts(leaf)) for w, leaf in zip(weights.after, inexact(after), strict=True))
            return total, (y, after, carried)

        (total, aux), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(arrays, x, inexact(carry.state))
        return Result(total, *aux, Gradients(*gradients))


@functools.cache
def subject(name: str) -> Subject:
    """One example, made and compiled once for all tests."""
    return Subject(CONFIGS[name], caches=name in ATTENTION)


def normal(random: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * random.normal(size=shape)).astype(np.float32)


def tokens(seed: int, batch: int = BATCH, length: int = LENGTH) -> np.ndarray:
    return normal(np.random.default_rng(seed), batch, length, WIDTH)


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


def row_of(tree: Any, row: int) -> Any:
    """One row of every leaf."""
    return jax.tree.map(lambda leaf: leaf[row], tree)


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
    """Floating leaves in float64, complex ones in complex128; used under `jax.enable_x64`."""
    wide = lambda x: np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
    return jax.tree.map(lambda x: wide(x) if is_inexact(x) else np.asarray(x), tree)


def assert_close(actual: Any, expected: Any, tolerance: float, *, floor: float = 0.0) -> None:
    """Leaf by leaf, errors below `tolerance` times the leaf's largest entry, or times `floor` where that is larger."""

    def real(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return np.stack([x.real, x.imag]).astype(np.float64) if np.iscomplexobj(x) else x.astype(np.float64)

    def scaled(x: Any, like: Any) -> np.ndarray:
        x, like = real(x), real(like)
        largest = np.max(np.abs(like), initial=floor, where=np.isfinite(like))
        return x / (largest if largest > 0 else 1.0)

    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_close(
        jax.tree.map(scaled, actual, expected), jax.tree.map(scaled, expected, expected), rtol=0, atol=tolerance
    )


def assert_valid_close(actual: Any, expected: Any, valid: np.ndarray, tolerance: float = FLOAT32) -> None:
    """As `assert_close`, for `[B, T, ...]` arrays at the positions that hold tokens."""
    assert_close(np.asarray(actual)[valid], np.asarray(expected)[valid], tolerance)
