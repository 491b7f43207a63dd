"""The recurrences that `python -m experiments.bench kernels` times, and the shapes of real models they are timed at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import by_hand
from experiments.bench.case import Function, over_heads
from kernels_pallas import exponential
from kernels_pallas.gpu import exponential as gpu_exponential
from seqmodels.operators import (
    ExponentialState,
    delta_rule,
    diagonal_scan,
    gated_linear_attention,
    kernels,
    mlstm_scan,
    selective_scan,
)
from seqmodels.scan import auto
from seqmodels.typing import Segments


class Shape(NamedTuple):
    """`documents` of mixed lengths in a row. For families without heads, `heads` is 1 and `size` the width."""

    batch: int
    length: int
    heads: int
    size: int
    documents: int = 1
    state: int = 0  # of a channel, where it is not the size

    def __str__(self) -> str:
        told = f"{self.batch}x{self.length}x{self.heads}x{self.size}"
        if self.heads == 1:
            told = f"{self.batch}x{self.length}x{self.size}" + (f", state {self.state}" if self.state else "")
        return told + (f", {self.documents} documents" if self.documents > 1 else "")

    def starts(self) -> np.ndarray:
        """Where documents begin; their lengths differ by up to a factor of sixteen."""
        share = np.cumsum(2.0 ** np.linspace(0, 4, self.documents))
        return np.concatenate([[0], np.round(self.length * share[:-1] / share[-1]).astype(int)])


MATRICES = (
    Shape(1, 8192, 96, 128), Shape(2, 16384, 16, 128), Shape(4, 2048, 16, 128), Shape(8, 1024, 8, 64),
    Shape(8, 2048, 32, 256), Shape(1, 8192, 16, 128, documents=16),
)  # fmt: skip
SMALL = (Shape(2, 256, 2, 32), Shape(1, 256, 2, 32, documents=4))


@dataclasses.dataclass(frozen=True)
class Family:
    """A recurrence: what it takes, what the library calls it, and the loop over tokens that it is compared with.

    `inputs(random, shape)` are arrays [B, T, ...], or parameters. `ours(*inputs, method=, segments=)` gives the output
    and the final states, `loop` the output of one document and head (or of a few channels), to which
    `piece(array, number of the input)` cuts arrays [T, ...].
    """

    name: str
    shapes: tuple[Shape, ...]
    inputs: Callable[[np.random.Generator, Shape], tuple[np.ndarray, ...]]
    ours: Function
    loop: Function
    piece: Callable[[Any, int], Any]
    compared: int
    """So many of the inputs, the first ones, have gradients that are the piece's alone."""
    associative: Function | None = None
    methods: tuple[str, ...] = ("chunked",)
    products: int = 0
    """Products of a key's by a value's size for each token and head."""
    shared: tuple[int, ...] = ()
    """Those of the inputs that belong to all channels."""
    exponentials: bool = False
    """Whether every token needs one for each channel (and entry of its state, where it has several)."""

    of_states: Function = lambda states: states
    """What is the same of final states, whatever an implementation scales them by."""

    def xla(self, *inputs: Any, method: str, segments: Segments | None = None) -> Any:
        """`ours` in one of XLA's forms: "auto" takes no kernel here, whichever the table has."""
        table, auto.KERNELS = auto.KERNELS, ()
        try:
            return self.ours(*inputs, method=method, segments=segments)
        finally:
            auto.KERNELS = table

    def operations(self, shape: Shape) -> float:
        """Of the products with the state, forward: those inside a chunk, which a form may choose, are not counted."""
        return 2.0 * self.products * shape.batch * shape.length * shape.heads * shape.size**2

    def taken(self, shape: Shape) -> float:
        """Exponentials, forward; those of a decay per head are too few to count, one of a complex number is one."""
        return float(self.exponentials * shape.batch * shape.length * shape.heads * shape.size * max(shape.state, 1))


def _matrices(random: np.random.Generator, shape: Shape) -> tuple[np.ndarray, ...]:
    sizes = (shape.batch, shape.length, shape.heads, shape.size)
    return tuple(random.standard_normal(sizes, np.float32) / shape.size**0.5 for _ in range(3))


def _gate(random: np.random.Generator, *sizes: int) -> np.ndarray:
    return -np.logaddexp(random.standard_normal(sizes, np.float32), 0) / 10


def _scalar(random: np.random.Generator, shape: Shape) -> tuple[np.ndarray, ...]:
    return (*_matrices(random, shape), _gate(random, *shape[:3]))


def _keys(random: np.random.Generator, shape: Shape) -> tuple[np.ndarray, ...]:
    return (*_matrices(random, shape), _gate(random, *shape[:4]))


def _delta(random: np.random.Generator, shape: Shape) -> tuple[np.ndarray, ...]:
    query, key, value = _matrices(random, shape)
    beta = 1 / (1 + np.exp(-random.standard_normal(shape[:3], np.float32)))
    return query, key / np.linalg.norm(key, axis=-1, keepdims=True), value, beta, _gate(random, *shape[:3])


def _bonus(random: np.random.Generator, shape: Shape) -> tuple[np.ndarray, ...]:
    return (*_keys(random, shape), random.standard_normal((shape.heads, shape.size), np.float32))


def _delta_keys(random: np.random.Generator, shape: Shape) -> tuple[np.ndarray, ...]:
    return (*_delta(random, shape)[:4], _gate(random, *shape[:4]))


def _exponential(random: np.random.Generator, shape: Shape) -> tuple[np.ndarray, ...]:
    """Queries and keys are positive, and input gates such that what the normaliser reads is above 1 in every other head
    and below in the rest: gradients jump at 1, where rounding would decide between two that are right."""
    query, key, value = _matrices(random, shape)
    gate = np.where(np.arange(shape.heads) % 2, -3, 3) + random.standard_normal(shape[:3], np.float32) / 10
    return np.abs(query), np.abs(key), value, gate.astype(np.float32), _gate(random, *shape[:3])


def _unscaled(state: ExponentialState) -> tuple[Any, Any]:
    """Normaliser and memory without the running maximum, which is another one in each form."""
    scale = jnp.exp(state.log_max)[..., None]
    return scale * state.normaliser, scale[..., None] * state.memory


def _sigmoid(random: np.random.Generator, shape: Shape) -> tuple[np.ndarray, ...]:
    return (*_matrices(random, shape), 10 * _gate(random, *shape[:3]), _gate(random, *shape[:3]))


def _weighed(query: Any, key: Any, value: Any, log_input: Any, log_forget: Any) -> tuple[Any, ...]:
    """mLSTM with input gates in (0, 1) and no normaliser is a decay per head of keys times these."""
    return query, (jnp.exp(log_input)[..., None] * key).astype(key.dtype), value, log_forget


def sigmoid_scan(*inputs: Any, method: str, segments: Segments | None = None, **options: Any) -> Any:
    """Inputs as of `mlstm_scan`; the kernel is one that no family calls."""
    if method != "pallas":
        return gated_linear_attention(*_weighed(*inputs), method=method, segments=segments, **options)
    batch, length, heads, size = inputs[1].shape
    state = jnp.zeros((batch, heads, size)), jnp.zeros((batch, heads, size, inputs[2].shape[3]))
    documents = jnp.zeros((batch, length), jnp.int32) if segments is None else segments.ids
    kernel = (gpu_exponential if kernels.on_hopper() else exponential).chunk_sigmoid
    heads_first = (jnp.swapaxes(x, 1, 2) for x in inputs)
    out, (_, memory) = kernel(*heads_first, state, documents, normalise=False, interpret=kernels.INTERPRET)
    return jnp.swapaxes(out, 1, 2), memory


def _diagonal(random: np.random.Generator, shape: Shape) -> tuple[np.ndarray, ...]:
    sizes = (shape.batch, shape.length, shape.size)
    return _gate(random, *sizes), random.standard_normal(sizes, np.float32)


def _complex(random: np.random.Generator, shape: Shape) -> tuple[np.ndarray, ...]:
    """Decays turn by any angle."""
    log_decay, drive = _diagonal(random, shape)
    other = lambda: random.standard_normal(drive.shape, np.float32)
    return (log_decay + 1j * other()).astype(np.complex64), (drive + 1j * other()).astype(np.complex64)


def _selective(random: np.random.Generator, shape: Shape) -> tuple[np.ndarray, ...]:
    sizes = (shape.batch, shape.length, shape.size)
    x, dt = random.standard_normal(sizes, np.float32), -_gate(random, *sizes)
    b, c = (random.standard_normal((*sizes[:2], shape.state), np.float32) for _ in range(2))
    return x, dt, -np.tile(np.arange(1, shape.state + 1, dtype=np.float32), (shape.size, 1)), b, c


_diagonal_loop = lambda *x: by_hand.diagonal(*(y[None] for y in x))[0]
_associative = over_heads(by_hand.associative_outer)
_outer = lambda *x, **options: gated_linear_attention(*x, **options)
_delta_rule = lambda *x, **options: delta_rule(*x, **options)
_scan = lambda *x, **options: diagonal_scan(*x, **options)
_head = lambda x, number: x[:, 0]
_few = lambda x, number: x[:, :8]
FAMILIES = (
    Family("outer, a decay per head", MATRICES, _scalar, _outer, by_hand.outer, _head, 4, _associative, products=2),
    Family("diagonal", (Shape(8, 8192, 1, 4096),), _diagonal, _scan, _diagonal_loop, _few, 2,
           by_hand.associative_diagonal, ("auto", "sequential", "chunked"), exponentials=True),
    Family("diagonal, complex", (Shape(8, 8192, 1, 4096),), _complex, _scan, _diagonal_loop, _few, 2,
           by_hand.associative_diagonal, ("auto", "sequential", "chunked"), exponentials=True),
    Family("outer, a decay per key", MATRICES, _keys, _outer, by_hand.outer, _head, 4, _associative, products=2,
           exponentials=True),
    Family("outer, a decay per key, a bonus", MATRICES, _bonus,
           lambda *x, **o: gated_linear_attention(*x[:4], bonus=x[4], **o), by_hand.bonus,
           lambda x, number: x[0] if number == 4 else x[:, 0], 4,
           lambda *x: over_heads(by_hand.associative_bonus)(*x[:4], jnp.broadcast_to(x[4], x[1].shape)), products=2,
           exponentials=True),
    Family("delta, gated", MATRICES, _delta, _delta_rule, by_hand.delta, _head, 5, products=3),
    Family("delta, a decay per key", MATRICES, _delta_keys, _delta_rule, by_hand.delta, _head, 5, products=3,
           exponentials=True),
    Family("exponential", MATRICES, _exponential, lambda *x, **o: mlstm_scan(*x, eps=0.0, **o), by_hand.mlstm, _head, 5,
           over_heads(by_hand.associative_mlstm), products=2, of_states=_unscaled),
    Family("exponential, sigmoid gates", MATRICES, _sigmoid, lambda *x, **o: sigmoid_scan(*x, **o),
           lambda *x: by_hand.outer(*_weighed(*x)), _head, 5, lambda *x: _associative(*_weighed(*x)), products=2),
    Family("selective", (Shape(1, 4096, 1, 4096, state=16),), _selective, lambda *x, **o: selective_scan(*x, **o),
           by_hand.selective, lambda x, number: x[:8] if number == 2 else x if number > 2 else x[:, :8], 2,
           by_hand.associative_selective, ("auto", "chunked"), shared=(3, 4), exponentials=True),
)  # fmt: skip
QUICK = {name: (Shape(2, 256, 1, 32),) for name in ("diagonal", "diagonal, complex")}
QUICK |= {"selective": (Shape(1, 256, 1, 32, state=4),)}


def cases(*, quick: bool) -> list[tuple[Family, Shape]]:
    """Everything that a whole run goes through."""
    return [(f, s) for f in FAMILIES for s in (QUICK.get(f.name, SMALL) if quick else f.shapes)]


def structs(family: Family, shape: Shape, kind: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and types of the inputs, without making them; gates and parameters are float32 in any case."""
    one = shape._replace(batch=1, length=1, documents=1)
    made = family.inputs(np.random.default_rng(0), one)
    size = lambda x: shape[:2] + x.shape[2:] if x.shape[:2] == (1, 1) else x.shape
    kinds = [kind if family.products and number < 3 else x.dtype for number, x in enumerate(made)]
    return tuple(jax.ShapeDtypeStruct(size(x), to) for x, to in zip(made, kinds, strict=True))


def of_all_steps(family: Family, shape: Shape) -> float:
    """Bytes of the elements of an associative scan."""
    itemsize = structs(family, shape, "float32")[-1].dtype.itemsize
    entries = shape.size if family.products else 2 * max(shape.state, 1)
    return float(itemsize) * shape.batch * shape.length * shape.heads * shape.size * entries


def with_gradients(function: Function, count: int) -> Function:
    """Gradients of the weighted sum of the first that `function` gives; the last argument are the weights."""
    weigh = lambda *x: jnp.sum((function(*x[:-1])[0].astype(x[-1].dtype) * x[-1]).real)
    return jax.grad(weigh, tuple(range(count)))
