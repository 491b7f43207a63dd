"""The hot scans at the shapes of real models, against two floors: what the machine needs for the products, and for the
bytes. Every implementation passes `kernels_gate` first. What is left out or fails has a row with a `note`, and the
others go on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.bench import memory
from experiments.bench.case import Function, Row
from experiments.bench.kernels_cases import Family, Shape, cases, of_all_steps, structs, with_gradients
from experiments.bench.kernels_gate import Alone, Gate, Results, loop_of, order
from experiments.bench.measure import Compiled, Quartiles, Work, compiled, rates, side_by_side, size_of
from seqmodels.host import return_freed_memory
from seqmodels.operators.kernels import on_hopper
from seqmodels.typing import Segments

STATES = 2e9  # bytes of elements that an associative scan may hold at once: with its copies several times that
SLOW = 1e7  # entries that the chunk form of a recurrence without products takes a minute for on a CPU
# XLA multiplies small matrices of a batch, and goes through the small steps of a loop, on one core: a device a core
# leaves none without work.
PER_CORE = ", a device a core"
HEADS = PartitionSpec(None, None, "heads")
Notes = dict[str, Row]


def rows(
    *, quick: bool, seed: int, shapes: Sequence[str] = (), peer: str | None = None, dtype: str | None = None
) -> Iterator[Row]:
    """One row a family, shape and implementation. `shapes`: those whose "family shape" has one of these in it."""
    kind = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    others = None
    if peer is not None:
        from experiments.bench import fla

        others = fla.implementations()
    found = cases(quick=quick)
    chosen = [(f, s) for f, s in found if not shapes or any(part in f"{f.name} {s}" for part in shapes)]
    if not chosen:
        told = "; ".join(f"{family.name} {shape}" for family, shape in found)
        raise ValueError(f"no shape contains any of {', '.join(shapes)}: there are {told}")
    memory.there()  # before anything is taken
    rates(kind)  # some gigabytes on an accelerator
    for family, shape in chosen:
        return_freed_memory()  # in pieces of other sizes, and not all of it can be taken again
        yield from _measured(family, shape, kind, seed, {} if others is None else others.get(family.name, {}))


def _measured(family: Family, shape: Shape, kind: str, seed: int, peers: Mapping[str, Any]) -> Iterator[Row]:
    about = {"family": family.name, "shape": str(shape), "dtype": kind}
    given = structs(family, shape, kind)
    out, states = jax.eval_shape(functools.partial(family.xla, method="auto"), *given)
    weights = jax.ShapeDtypeStruct(out.shape, jnp.promote_types(out.dtype, jnp.float32))
    notes: Notes = {}
    programs = _programs(family, _functions(family, shape), (*given, weights), size_of((out, states, given)), notes)

    times: dict[str, Quartiles] = {}
    errors: dict[str, tuple[float, float | None]] = {}
    makers = {name: functools.partial(_ours, family, name, pair) for name, pair in programs.items()}
    theirs = {name: peer for name, peer in peers.items() if not isinstance(peer, str)}
    notes.update({name: {"note": why} for name, why in peers.items() if isinstance(why, str)})
    makers |= {name: functools.partial(_theirs, peer) for name, peer in theirs.items()}
    with _noting(notes, *makers):
        check = loop_of(family, shape, (*given, weights))
        left_out = memory.too_much(size_of((given, weights)) + (check.peak_bytes or 0))
        if left_out:
            notes.update({name: {"note": left_out} for name in makers})
        else:
            gate = Gate(family, shape, kind, _arrays(family, shape, given, weights, seed), check)
            runs = _runs(makers, theirs, gate, errors, notes)
            del gate
            times = side_by_side(runs, budget=1.0, least=3) if runs else {}
    work = Work(
        float(size_of(given) + out.size * given[0].dtype.itemsize), family.operations(shape), family.taken(shape)
    )
    for name in (name for name in makers if name in errors and times):
        error, difference = errors[name]
        peak = programs[name][1].peak_bytes if name in programs else None
        row = _row(work, kind, times[f"{name}/forward"], times[f"{name}/both"])
        row |= {"error": error, "difference": difference, "peak_bytes": peak}
        yield about | {"implementation": name, **row}
    for name, note in notes.items():
        yield about | {"implementation": name, **note}


@contextlib.contextmanager
def _noting(notes: Notes, *names: str) -> Iterator[None]:
    """Whatever is raised becomes the note of `names`, so that nothing else is lost."""
    try:
        yield
    except Alone as why:
        notes.update({name: {"note": str(why)} for name in names})
    except Exception as error:
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        notes.update({name: {"note": told, "failed": True} for name in names if name not in notes})


def _functions(family: Family, shape: Shape) -> dict[str, Function | str]:
    """All that could run here, outputs and final states (or None), or why it does not."""
    start = np.zeros((shape.batch, shape.length), bool)
    start[:, shape.starts()] = True
    segments = Segments(jnp.asarray(start), jnp.ones_like(start)) if shape.documents > 1 else None
    xla = lambda method: functools.partial(family.xla, method=method, segments=segments)
    pallas = functools.partial(family.ours, method="pallas", segments=segments)
    on_cpu, cores = jax.default_backend() == "cpu", jax.device_count()
    kernels = jax.default_backend() == "tpu" or on_hopper()
    found: dict[str, Function | str] = {
        "Pallas": pallas if kernels else "left out: needs a TPU or a Hopper GPU",
        **{f"XLA {method}": xla(method) for method in family.methods},
    }
    if on_cpu and not family.products and shape.batch * shape.length * shape.size > SLOW:
        found["XLA chunked"] = "left out: without products a chunk form takes minutes on a CPU"
    if on_cpu:
        parts = shape.heads if family.products else shape.size
        why = "there is one device" if cores == 1 else "takes no documents" if segments else ""
        why = why or (f"{parts} heads or channels on {cores} cores" if parts % cores else "")
        spread = lambda: jax.shard_map(
            xla(family.methods[0]), mesh=_mesh(), in_specs=_specs(family, structs(family, shape, "float32")),
            out_specs=(HEADS, PartitionSpec(None, "heads")),
        )  # fmt: skip
        found[f"XLA {family.methods[0]}{PER_CORE}"] = f"left out: {why}" if why else spread()
    found["associative_scan"] = _associative(family, shape)
    return found


def _associative(family: Family, shape: Shape) -> Function | str:
    """Without final states."""
    held = of_all_steps(family, shape)
    if family.associative is None:
        return f"left out: needs K x K transitions of all steps and their products, {2 * held / 1e9:.1f} GB with states"
    if held > STATES:
        return f"left out: the states of all steps alone are {held / 1e9:.1f} GB"
    return "left out: takes no documents" if shape.documents > 1 else lambda *x: (family.associative(*x), None)


def _programs(
    family: Family,
    functions: Mapping[str, Function | str],
    given: Sequence[jax.ShapeDtypeStruct],
    held: int,
    notes: Notes,
) -> dict[str, tuple[Compiled, Compiled]]:
    """Forward and with gradients, of those that compile and fit into memory beside the arrays they are given.

    `held`: bytes of the results that are kept for the comparison, from the first in `order` on.
    """
    programs = {}
    first = min((name for name in functions if not isinstance(functions[name], str)), key=order, default="")
    for name, function in functions.items():
        if isinstance(function, str):
            notes[name] = {"note": function}
            continue
        places, spread = _placed(family, name, given), name.endswith(PER_CORE)
        devices = jax.device_count() if spread else 1
        with _noting(notes, name):
            try:
                pair = compiled(function, *places[:-1]), compiled(with_gradients(function, len(given) - 1), *places)
            except ValueError as error:  # a named backend that cannot serve says why
                notes[name] = {"note": str(error).splitlines()[0]}
                continue
            pair = tuple(p._replace(peak_bytes=p.peak_bytes and devices * p.peak_bytes) for p in pair)
            # the output of the forward program is kept until both are checked; a copy of the arrays is placed anew
            beside = size_of(given) * spread + held * (name != first)
            left_out = memory.too_much(beside + size_of(given[-1]) + (pair[1].peak_bytes or 0))
            if left_out:
                notes[name] = {"note": left_out}
            else:
                programs[name] = pair
    return programs


def _mesh() -> Mesh:
    """All devices, over which heads are divided."""
    return jax.make_mesh((jax.device_count(),), ("heads",), axis_types=(AxisType.Auto,))


def _specs(family: Family, given: Sequence[Any]) -> tuple[PartitionSpec, ...]:
    """Of [B, T, H, ...] or [B, T, D], of parameters [H, K] or [D, N], and of what all heads share."""
    spec = lambda x: HEADS if len(x.shape) > 2 else PartitionSpec("heads")
    return tuple(PartitionSpec() if number in family.shared else spec(x) for number, x in enumerate(given))


def _placed(family: Family, name: str, given: Sequence[Any]) -> tuple[Any, ...]:
    """Arrays, or their shapes, where an implementation takes them from."""
    if not name.endswith(PER_CORE):
        return tuple(given)
    places = [NamedSharding(_mesh(), spec) for spec in _specs(family, given)]
    if isinstance(given[0], jax.ShapeDtypeStruct):
        return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to) for x, to in zip(given, places, strict=True))
    return jax.device_put(tuple(given), tuple(places))


def _ours(
    family: Family, name: str, programs: tuple[Compiled, Compiled], inputs: Sequence[Any], weights: Any, bounds: Any
) -> Any:
    """A forward pass, one with gradients, and what both compute."""
    given = _placed(family, name, (*inputs, weights))
    forward, both = functools.partial(programs[0].run, *given[:-1]), functools.partial(programs[1].run, *given)
    return forward, both, Results(*forward(), both())


def _theirs(peer: Any, inputs: Sequence[Any], weights: Any, bounds: Any) -> Any:
    """The same of a `fla.Peer`, which is asked for no states."""
    forward, both, (out, gradients) = peer.made(peer.inputs(*inputs), weights, bounds)
    return forward, both, Results(out, None, gradients)


def _arrays(family: Family, shape: Shape, given: Sequence[Any], weights: Any, seed: int) -> tuple[jax.Array, ...]:
    """The inputs, and weights of the output."""
    random = np.random.default_rng(seed)
    inputs = (jnp.asarray(x, to.dtype) for x, to in zip(family.inputs(random, shape), given, strict=True))
    weigh = random.standard_normal(weights.shape, np.float32)
    if jnp.issubdtype(weights.dtype, jnp.complexfloating):
        weigh = weigh + 1j * random.standard_normal(weights.shape, np.float32)
    return (*inputs, jnp.asarray(weigh, weights.dtype))


def _runs(
    makers: Mapping[str, Callable[..., Any]], peers: Mapping[str, Any], gate: Gate,
    errors: dict[str, tuple[float, float | None]], notes: Notes,
) -> dict[str, Callable[[], Any]]:  # fmt: skip
    """What is timed, of those that are right."""
    runs = {}
    bounds = np.append(gate.shape.starts(), gate.shape.length)
    for name in sorted(makers, key=order):
        return_freed_memory()  # what the one before took lies in pieces, and this one takes others
        with _noting(notes, name):
            forward, both, results = makers[name](gate.arrays[:-1], gate.arrays[-1], bounds)
            errors[name] = gate.errors(name, results, peers.get(name))
            runs[f"{name}/forward"], runs[f"{name}/both"] = forward, both
        results = None  # or they stay while the next one runs
    return_freed_memory()
    return runs


def _row(work: Work, kind: str, forward: Quartiles, both: Quartiles) -> Row:
    machine = rates(kind)
    # the backward pass reads inputs and cotangents and writes gradients; its products are twice the forward ones
    floors = machine.floors(work), machine.floors(Work(3 * work.moved, 3 * work.operations))
    least, times = [max(found.values()) for found in floors], [forward.median, both.median]
    per_second = lambda amount: [n * amount / t for n, t in zip((1, 3), times, strict=True)]
    return {
        "ms_forward": 1e3 * times[0], "ms_forward_backward": 1e3 * times[1],
        "floor_ms": 1e3 * least[0], "floor_ms_forward_backward": 1e3 * least[1],
        "ratio": times[0] / least[0], "ratio_forward_backward": times[1] / least[1],
        "exponentials_ms": 1e3 * machine.exponentials(work) if work.exponentials else None,
        "shares": {name: [found[name] / t for found, t in zip(floors, times, strict=True)] for name in floors[0]},
        "tflops": [rate / 1e12 for rate in per_second(work.operations)] if work.operations else None,
        "gb_per_s": [rate / 1e9 for rate in per_second(work.moved)],
        "seconds": {"forward": forward._asdict(), "forward_backward": both._asdict()},
        "copy_gb_s": machine.copy / 1e9, "product_gop_s": machine.product / 1e9,
        "exponential_g_s": machine.exponential / 1e9,
    }  # fmt: skip
