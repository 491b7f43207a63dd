"""Checks of the laws that a `Recurrence` must keep, for any operator, the user's own included."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.scan import Recurrence, empty_counter, scan
from seqmodels.scan.recurrence import Tree, act, advance, cast_like, element_of, settle, settle_element, take


class Tolerance(NamedTuple):
    """How far two sides of a law may be apart: `relative` to each entry, plus `floor` times the leaf's largest one."""

    relative: float
    floor: float


# Laws are checked in float64, where rounding stays near 1e-13 and any error of 1e-3 shows even in a term that is a
# thousandth of the whole. Where the operator itself computes in float32, its rounding (1e-7 a step) sets the limit.
FLOAT64 = Tolerance(1e-6, 1e-10)
FLOAT32 = Tolerance(2e-4, 5e-6)


def check_recurrence(
    recurrence: Recurrence, inputs: Tree, state: Tree | None = None, *, reference: tuple[Tree, Tree] | None = None
) -> None:
    """Checks every law of a recurrence on inputs `[T, ...]`, T >= 4; AssertionError names the law that fails.

    Associativity, identity, action; `update`, `neutral`, `fold`, `emit` and `sweep` where given (with resets at every
    kind of place); for a non-associative recurrence, that the static tree equals the counter. Catches errors of one
    part in a thousand. What no law can see (wrong `elements`, `read` or `initial`) needs `reference`: the outputs and
    the final state that an independent computation gives from `state`.
    """
    length = jax.tree.leaves(inputs)[0].shape[0]
    if length < 4:
        raise ValueError(f"the laws need inputs of at least 4 steps to show, not {length}")
    with jax.enable_x64(True):
        inputs, state = jax.tree.map(_wide, (inputs, state))
        tolerance = FLOAT64 if _computes_wide(recurrence, inputs, state) else FLOAT32
        if recurrence.associative:
            _check_laws(recurrence, inputs, state, length, tolerance)
        else:
            _check_tree(recurrence, inputs, length, tolerance)
        if reference is not None:
            method = "sequential" if recurrence.associative else "tree"
            got = scan(recurrence, inputs, state, method=method)
            _equal("reference", "scan's (outputs, final state) != the reference", got, reference, FLOAT32)


def _wide(x: Any) -> jax.Array:
    x = np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.asarray(x)
    return jnp.asarray(x.astype(np.complex128 if np.iscomplexobj(x) else np.float64))


def _computes_wide(recurrence: Recurrence, inputs: Tree, state: Tree | None) -> bool:
    """Whether every number that the operator computes from float64 inputs is itself float64."""
    reset = jnp.zeros(jax.tree.leaves(inputs)[0].shape[:1], bool)

    if recurrence.associative:  # outside of what is traced: a start of float32 zeros rounds nothing
        state, _ = settle(recurrence, take(inputs, 0), state)

    def everything(inputs: Tree, state: Tree | None) -> Any:
        if not recurrence.associative:
            element = recurrence.elements(take(inputs, 0))
            return recurrence.combine(element, element)
        element = element_of(recurrence, take(inputs, 0))
        after = act(recurrence, recurrence.combine(element, element), state)
        folded = recurrence.fold(inputs, reset) if recurrence.fold else None
        emitted = recurrence.emit(inputs, state, reset) if recurrence.emit else None
        return advance(recurrence, take(inputs, 0), after), recurrence.read(after, take(inputs, 0)), folded, emitted

    narrow = (jnp.float32, jnp.float16, jnp.bfloat16, jnp.complex64)
    outputs = (v for equation in _equations(jax.make_jaxpr(everything)(inputs, state).jaxpr) for v in equation.outvars)
    return not any(getattr(v.aval, "dtype", None) in narrow for v in outputs)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a program, those of the programs inside it (jit, scan, cond) included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


class _Jitted(NamedTuple):
    """The unbatched operations, each compiled once per shape: the laws call them many times."""

    element: Callable[[Tree], Tree]
    combine: Callable[[Tree, Tree], Tree]
    identity: Callable[[Tree], Tree]
    act: Callable[[Tree, Tree], Tree]
    read: Callable[[Tree, Tree], Tree]

    @classmethod
    def of(cls, recurrence: Recurrence) -> _Jitted:
        def like(f: Callable[..., Tree], which: int) -> Callable[..., Tree]:
            return jax.jit(lambda *args: cast_like(f(*args), args[which]))

        return cls(
            jax.jit(lambda x: element_of(recurrence, x)),
            like(recurrence.combine, 0),
            like(recurrence.identity, 0),
            like(lambda e, s: act(recurrence, e, s), 1),
            jax.jit(recurrence.read),
        )


def _check_laws(recurrence: Recurrence, inputs: Tree, state: Tree | None, length: int, tolerance: Tolerance) -> None:
    start, initial = settle(recurrence, take(inputs, 0), state)
    run = _Jitted.of(recurrence)
    steps = [take(inputs, t) for t in range(length)]
    elements = [run.element(x) for x in steps]
    states = list(itertools.accumulate(elements, lambda s, e: run.act(e, s), initial=start))

    def law(name: str, claim: str, left: Tree, right: Tree) -> None:
        _equal(name, claim, left, right, tolerance)

    for a, b, c in _neighbours(elements, run.combine):
        ab = run.combine(a, b)
        law(
            "associativity",
            "combine(combine(a, b), c) != combine(a, combine(b, c))",
            run.combine(ab, c),
            run.combine(a, run.combine(b, c)),
        )
        nothing = run.identity(a)
        law("identity", "combine(identity(a), a) != a", run.combine(nothing, a), a)
        law("identity", "combine(a, identity(a)) != a", run.combine(a, nothing), a)
        for s in (start, states[1], states[-1]):
            law("action", "act(combine(a, b), s) != act(b, act(a, s))", run.act(ab, s), run.act(b, run.act(a, s)))
            law("action", "act(identity(a), s) != s", run.act(nothing, s), s)
    for x, e, before in zip(steps, elements, states, strict=False):
        for s in (before, states[-1]):
            if recurrence.update is not None:
                law("update", "update(x, s) != act(elements(x), s)", recurrence.update(x, s), run.act(e, s))
            if recurrence.neutral is not None:
                idle = run.element(recurrence.neutral(x))
                law("neutral", "act(elements(neutral(x)), s) != s", run.act(idle, s), s)
    for begin, end, reset in _spans(length):
        where = f"on steps {begin} to {end - 1} with resets at {[begin + int(i) for i in np.flatnonzero(reset)]}"
        _check_chunk(recurrence, run, inputs, (start, states[-1]), initial, (begin, end, reset, where), law)


def _check_chunk(
    recurrence: Recurrence, run: _Jitted, inputs: Tree, states: Any, initial: Tree, span: Any, law: Callable[..., None]
) -> None:
    begin, end, reset, where = span
    chunk, flags = jax.tree.map(lambda x: x[begin:end], inputs), jnp.asarray(reset)
    steps = [take(chunk, t) for t in range(end - begin)]
    if recurrence.fold is not None:
        last = max(np.flatnonzero(reset), default=0)
        expected = functools.reduce(run.combine, [run.element(x) for x in steps[last:]])
        folded = settle_element(recurrence, recurrence.fold(chunk, flags))
        law("fold", f"fold(inputs, reset) != the combine of the steps since the last reset {where}", folded, expected)
    if recurrence.emit is not None:
        for before_steps in states:
            s = before_steps
            emitted, outputs = recurrence.emit(chunk, s, flags), []
            for x, starts in zip(steps, reset, strict=True):
                before = initial if starts else s
                s = run.act(run.element(x), before)
                outputs.append(run.read(before if recurrence.read_before else s, x))
            read = jax.tree.map(lambda *y: jnp.stack(y), *outputs)
            law("emit", f"emit(inputs, state, reset) != the reads of the steps {where}", emitted, read)
            if recurrence.sweep is not None:
                swept = recurrence.sweep(chunk, before_steps, flags)
                law("sweep", f"sweep(inputs, state, reset) != the steps {where}", swept, (s, read))


def _neighbours(elements: list[Tree], combine: Callable[[Tree, Tree], Tree]) -> Iterator[list[Tree]]:
    """Triples of neighbouring spans: single steps, and longer ones."""
    n = len(elements)
    cuts = [(t, t + 1, t + 2, t + 3) for t in range(n - 2)]
    cuts += [(0, n // 3, 2 * n // 3, n), (0, 1, 2, n), (0, n - 2, n - 1, n), (0, 1, n - 1, n)]
    for cut in cuts:
        yield [functools.reduce(combine, elements[i:j]) for i, j in itertools.pairwise(cut)]


def _spans(length: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Chunks `(begin, end, reset)` with no reset, one at either end or inside, several, and one at every step."""
    for begin, end in ((0, length), (1, 2), (1, 4)):
        size = end - begin
        patterns: list[list[int]] = [[], [0], [size - 1], [size // 2], [size // 3, size // 2 + 1], list(range(size))]
        for places in [p for i, p in enumerate(patterns) if p not in patterns[:i]]:
            reset = np.zeros(size, bool)
            reset[[p for p in places if p < size]] = True
            yield begin, end, reset


def _check_tree(recurrence: Recurrence, inputs: Tree, length: int, tolerance: Tolerance) -> None:
    outputs, counter = scan(recurrence, inputs)
    streamed, counter_streamed = scan(recurrence, inputs, empty_counter(recurrence, take(inputs, 0)))
    _equal("tree", "the static tree's outputs != the counter's", outputs, streamed, tolerance)
    full = jnp.flatnonzero((length >> jnp.arange(32)) & 1)
    roots = [take(c.roots, full) for c in (counter, counter_streamed)]
    _equal("tree", "the static tree's counter != the streamed one", roots[0], roots[1], tolerance)


def _equal(law: str, claim: str, left: Tree, right: Tree, tolerance: Tolerance) -> None:
    left_leaves, right_leaves = jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right)
    if len(left_leaves) != len(right_leaves):
        raise AssertionError(f"{law}: {claim}: {len(left_leaves)} leaves against {len(right_leaves)}")
    for (path, x), y in zip(left_leaves, right_leaves, strict=True):
        x, y, name = np.asarray(x), np.asarray(y), jax.tree_util.keystr(path) or "the value"
        if x.shape != y.shape:
            raise AssertionError(f"{law}: {claim}: {name} has shape {x.shape} against {y.shape}")
        inexact = np.issubdtype(x.dtype, np.inexact) or np.issubdtype(y.dtype, np.inexact)
        with np.errstate(invalid="ignore"):
            near = np.isfinite(x) & np.isfinite(y) & (np.abs(x - y) <= _allowed(x, y, tolerance))
            wrong = (x != y) & ~near if inexact else x != y
        if np.any(wrong):
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"{law}: {claim}: {name}{list(place)} is {x[place]!r} against {y[place]!r} "
                f"({int(wrong.sum())} of {wrong.size} entries differ)"
            )


def _allowed(x: np.ndarray, y: np.ndarray, tolerance: Tolerance) -> np.ndarray:
    size = np.maximum(np.abs(x), np.abs(y))
    finite = size[np.isfinite(size)]
    return tolerance.relative * size + tolerance.floor * (finite.max() if finite.size else 0.0)
