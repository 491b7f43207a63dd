"""The hot scans at the shapes of real models, against two floors: what the machine needs for the products, and for the
bytes. Every implementation is verified on one head and one document against a loop over tokens in float64 first."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.bench import by_hand
from experiments.bench.case import Function, Row, over_heads
from experiments.bench.measure import Compiled, Quartiles, Work, compiled, rates, side_by_side, verify
from seqmodels.operators import delta_rule, diagonal_scan, gated_linear_attention, mlstm_scan, selective_scan
from seqmodels.operators.kernels import on_hopper
from seqmodels.typing import Segments

# relative to an array's largest entry; bfloat16 rounds to 2^-9, and sums of rounded products add up
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
STATES = 2e9  # bytes of elements that an associative scan may hold at once: with its copies several times that
SLOW = 1e7  # entries that the chunk form of a recurrence without products takes a minute for on a CPU
# XLA multiplies small matrices of a batch one after the other, on one core: a device a core leaves none without work.
PER_CORE = "XLA chunked, a device a core"
HEADS = PartitionSpec(None, None, "heads")


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

    `inputs(random, shape)` are arrays [B, T, ...], or parameters. `ours(*inputs, method=, segments=)` gives the output,
    `loop` that of one document and head (or of a few channels), to which `piece(array, number of the input)` cuts
    arrays [T, ...].
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


def _exponential(random: np.random.Generator, shape: Shape) -> tuple[np.ndarray, ...]:
    return (*_matrices(random, shape), random.standard_normal(shape[:3], np.float32), _gate(random, *shape[:3]))


def _diagonal(random: np.random.Generator, shape: Shape) -> tuple[np.ndarray, ...]:
    sizes = (shape.batch, shape.length, shape.size)
    return _gate(random, *sizes), random.standard_normal(sizes, np.float32)


def _selective(random: np.random.Generator, shape: Shape) -> tuple[np.ndarray, ...]:
    sizes = (shape.batch, shape.length, shape.size)
    x, dt = random.standard_normal(sizes, np.float32), -_gate(random, *sizes)
    b, c = (random.standard_normal((*sizes[:2], shape.state), np.float32) for _ in range(2))
    return x, dt, -np.tile(np.arange(1, shape.state + 1, dtype=np.float32), (shape.size, 1)), b, c


_diagonal_loop = lambda *x: by_hand.diagonal(*(y[None] for y in x))[0]
_associative = over_heads(by_hand.associative_outer)
_outer = lambda *x, **options: gated_linear_attention(*x, **options)[0]
_head = lambda x, number: x[:, 0]
FAMILIES = (
    Family("outer, a decay per head", MATRICES, _scalar, _outer, by_hand.outer, _head, 4, _associative, products=2),
    Family("diagonal", (Shape(8, 8192, 1, 4096),), _diagonal, lambda *x, **o: diagonal_scan(*x, **o)[0],
           _diagonal_loop, lambda x, number: x[:, :8], 2, by_hand.associative_diagonal,
           ("auto", "sequential", "chunked")),
    Family("outer, a decay per key", MATRICES, _keys, _outer, by_hand.outer, _head, 4, _associative, products=2),
    Family("delta, gated", MATRICES, _delta, lambda *x, **o: delta_rule(*x, **o)[0], by_hand.delta, _head, 5,
           products=3),
    Family("exponential", MATRICES, _exponential, lambda *x, **o: mlstm_scan(*x, eps=0.0, **o)[0], by_hand.mlstm,
           _head, 5, products=2),
    Family("selective", (Shape(1, 4096, 1, 4096, state=16),), _selective, lambda *x, **o: selective_scan(*x, **o)[0],
           by_hand.selective, lambda x, number: x[:8] if number == 2 else x if number > 2 else x[:, :8], 2,
           methods=("auto", "chunked")),
)  # fmt: skip
QUICK = {"diagonal": (Shape(2, 256, 1, 32),), "selective": (Shape(1, 256, 1, 32, state=4),)}


def rows(
    *, quick: bool, seed: int, shapes: Sequence[str] = (), peer: str | None = None, dtype: str | None = None
) -> Iterator[Row]:
    """One row a family, shape and implementation. `shapes`: those whose "family shape" has one of these in it."""
    kind = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    others = None
    if peer is not None:
        from experiments.bench import fla

        others = fla.implementations()
    found = [(f, s) for f in FAMILIES for s in (QUICK.get(f.name, SMALL) if quick else f.shapes)]
    chosen = [(f, s) for f, s in found if not shapes or any(part in f"{f.name} {s}" for part in shapes)]
    if not chosen:
        told = "; ".join(f"{family.name} {shape}" for family, shape in found)
        raise ValueError(f"no shape contains any of {', '.join(shapes)}: there are {told}")
    for family, shape in chosen:
        yield from _measured(family, shape, kind, seed, {} if others is None else others.get(family.name, {}))


def _measured(family: Family, shape: Shape, kind: str, seed: int, peers: dict[str, Any]) -> Iterator[Row]:
    random = np.random.default_rng(seed)
    made = enumerate(family.inputs(random, shape))
    kinds = lambda number: kind if family.products and number < 3 else jnp.float32  # gates are float32 in any case
    inputs = tuple(jnp.asarray(x, kinds(number)) for number, x in made)
    out = jax.eval_shape(lambda *x: family.ours(*x, method="auto", segments=None), *inputs)
    weights = jnp.asarray(random.standard_normal(out.shape, np.float32))
    start = np.zeros((shape.batch, shape.length), bool)
    start[:, shape.starts()] = True
    segments = Segments(jnp.asarray(start), jnp.ones_like(start)) if shape.documents > 1 else None
    exact = _exact(family, shape, inputs, weights)

    runs: dict[str, Callable[[], Any]] = {}
    programs: dict[str, tuple[Compiled, Compiled]] = {}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name, function in _functions(family, shape, segments).items():
        try:
            both, given = _with_gradients(function, len(inputs)), _placed(name, inputs, weights)
            programs[name] = compiled(function, *given[:-1]), compiled(both, *given)
        except ValueError as error:  # a named backend that cannot serve says why
            notes[name] = str(error)
            continue
        results = programs[name][0].run(*given[:-1]), programs[name][1].run(*given)
        errors[name] = _verified(f"{family.name} {shape}, {name}", family, shape, results, exact, TOLERANCE[kind])
        runs[f"{name}/forward"] = functools.partial(programs[name][0].run, *given[:-1])
        runs[f"{name}/both"] = functools.partial(programs[name][1].run, *given)
        del results
    for name, peer in peers.items():
        if isinstance(peer, str):
            notes[name] = peer
            continue
        given = peer.inputs(*inputs)
        own = exact
        if peer.loop is not None:
            own = _exact(dataclasses.replace(family, loop=peer.loop), shape, given, weights)
        try:
            forward, both, results = peer.made(given, weights, np.append(shape.starts(), shape.length))
        except Exception as error:  # a kernel that fails at a shape or on a device leaves the others their time
            notes[name] = f"{type(error).__name__}: {error}"
            continue
        errors[name] = _verified(f"{family.name} {shape}, {name}", family, shape, results, own, TOLERANCE[kind])
        runs[f"{name}/forward"], runs[f"{name}/both"] = forward, both
    times = side_by_side(runs, budget=1.0, least=3)
    work = Work(float(sum(x.nbytes for x in inputs) + out.size * inputs[0].dtype.itemsize), _operations(family, shape))
    for name in errors:
        forward, backward = times[f"{name}/forward"], times[f"{name}/both"]
        peak = [program.peak_bytes for program in programs[name]] if name in programs else [None, None]
        yield _row(family, shape, name, kind, work, forward, backward, errors[name], peak[1])
    for name, note in notes.items():
        yield {"family": family.name, "shape": str(shape), "implementation": name, "dtype": kind, "note": note}


def _functions(family: Family, shape: Shape, segments: Segments | None) -> dict[str, Function]:
    ours = lambda method: lambda *x: family.ours(*x, method=method, segments=segments)
    large = jax.default_backend() == "cpu" and shape.batch * shape.length * shape.size > SLOW and not family.products
    methods = [method for method in family.methods if method != "chunked" or not large]
    found = {f"XLA {method}": ours(method) for method in methods}
    if jax.default_backend() == "tpu" or on_hopper():
        found = {"Pallas": ours("pallas"), **found}
    cores = jax.device_count() if jax.default_backend() == "cpu" and segments is None else 1
    if family.products and cores > 1 and shape.heads % cores == 0:
        found[PER_CORE] = jax.shard_map(ours("chunked"), mesh=_mesh(), in_specs=HEADS, out_specs=HEADS)
    elements = 4.0 * shape.batch * shape.length * shape.heads * shape.size * (shape.size if family.products else 2)
    if family.associative is not None and elements <= STATES and segments is None:
        found["associative_scan"] = family.associative
    return found


def _mesh() -> Mesh:
    """All devices, over which heads are divided."""
    return jax.make_mesh((jax.device_count(),), ("heads",), axis_types=(AxisType.Auto,))


def _placed(name: str, inputs: Sequence[jax.Array], weights: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays where an implementation takes them from."""
    given = (*inputs, weights)
    return jax.device_put(given, NamedSharding(_mesh(), HEADS)) if name == PER_CORE else given


def _with_gradients(function: Function, count: int) -> Function:
    weigh = lambda *x: jnp.sum(function(*x[:-1]).astype(jnp.float32) * x[-1])
    return jax.grad(weigh, tuple(range(count)))


def _cut(family: Family, shape: Shape, arrays: Sequence[Any], document: slice) -> list[Any]:
    """One row's document, of one head or a few channels."""
    of_row = lambda x: np.asarray(x[0, document], np.float64) if x.shape[:2] == shape[:2] else np.asarray(x, np.float64)
    return [family.piece(of_row(x), number) for number, x in enumerate(arrays)]


def _document(shape: Shape) -> slice:
    """The last, which is the longest."""
    return slice(int(shape.starts()[-1]), shape.length)


def _exact(family: Family, shape: Shape, inputs: Sequence[Any], weights: Any) -> tuple[Any, list[Any]]:
    cut = _cut(family, shape, inputs, _document(shape))
    weight = _cut(family, shape, (weights,), _document(shape))[0]
    with jax.enable_x64(True):
        gradients = jax.jit(_with_exact_gradients(family, weight))
        out, found = jax.tree.map(np.asarray, gradients(*map(jnp.asarray, cut)))
    return out, list(found)


def _with_exact_gradients(family: Family, weight: np.ndarray) -> Function:
    def both(*x: Any) -> Any:
        out, back = jax.vjp(family.loop, *x)
        return out, back(jnp.asarray(weight))[: family.compared]

    return both


def _verified(
    name: str, family: Family, shape: Shape, results: tuple[Any, Any], exact: tuple[Any, list[Any]], tolerance: float
) -> float:
    out = _cut(family, shape, (results[0],), _document(shape))[0]
    gradients = _cut(family, shape, results[1], _document(shape))[: family.compared]
    return verify(name, [out, *gradients], [exact[0], *exact[1]], tolerance)


def _operations(family: Family, shape: Shape) -> float:
    """Of the products with the state, forward: those inside a chunk, which a form may choose, are not counted."""
    return 2.0 * family.products * shape.batch * shape.length * shape.heads * shape.size**2


def _row(
    family: Family, shape: Shape, name: str, kind: str, work: Work, forward: Quartiles, both: Quartiles, error: float,
    peak: int | None,
) -> Row:  # fmt: skip
    machine = rates(kind)
    # the backward pass reads inputs and cotangents and writes gradients; its products are twice the forward ones
    floors = [1e3 * max(n * work.moved / machine.copy, n * work.operations / machine.product) for n in (1, 3)]
    times = [1e3 * forward.median, 1e3 * both.median]
    return {
        "family": family.name, "shape": str(shape), "implementation": name, "dtype": kind,
        "ms_forward": times[0], "ms_forward_backward": times[1],
        "floor_ms": floors[0], "floor_ms_forward_backward": floors[1],
        "ratio": times[0] / floors[0], "ratio_forward_backward": times[1] / floors[1],
        "tflops": [n * work.operations / t / 1e9 for n, t in zip((1, 3), times, strict=True)],
        "gb_per_s": [n * work.moved / t / 1e6 for n, t in zip((1, 3), times, strict=True)],
        "seconds": {"forward": forward._asdict(), "forward_backward": both._asdict()},
        "error": error, "peak_bytes": peak, "product_rate": machine.product,
    }  # fmt: skip
