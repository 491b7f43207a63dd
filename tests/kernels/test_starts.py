"""A document's start shuts out the state before it, be it infinite or NaN: what it leaves is that of an empty one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import delta, delta_keys, exponential, linear, outer, outer_keys, selective
from kernels_pallas.exponential_kernels import Form
from kernels_pallas.gpu import delta as gpu_delta
from kernels_pallas.gpu import exponential as gpu_exponential
from kernels_pallas.gpu import linear as gpu_linear
from kernels_pallas.gpu import outer as gpu_outer
from kernels_pallas.gpu import selective as gpu_selective
from tests.kernels.hopper import STRICT, interpreted

CHUNK, SIZE = 16, 8
H = 2
FORMS = {
    "exponential": Form("chunk_exponential", 1e-6),
    "sigmoid": Form("chunk_sigmoid", 0.0, stabilised=False),
}


class Case(NamedTuple):
    """`run(*arrays, *state, segment)` and the same a token at a time, and where arrays have their axis of time."""

    run: Callable[..., Any]
    recurrence: Callable[..., Any]
    times: tuple[int | None, ...]
    arrays: list[Any]
    state: list[Any]


def with_state(module: Any, form: Form, **options: Any) -> Callable[..., Any]:
    """`chunk_exponential` or `chunk_sigmoid` of a module, with the parts of its state one by one."""
    count = 3 if form.stabilised else 2
    kernel = functools.partial(getattr(module, form.name), eps=form.eps, **options)
    return lambda *a: kernel(*a[:5], a[5 : 5 + count], a[5 + count])


def case(name: str, length: int = 2 * CHUNK, size: int = SIZE) -> Case:
    normal = np.random.default_rng(0).standard_normal
    numbers = lambda *shape: jnp.asarray(normal((1, *shape)), jnp.float32)
    gates = lambda *shape: -jnp.abs(numbers(*shape)) / 8
    ones = lambda *shape: jnp.ones((1, *shape))
    heads, own = (H, length, size), dict[str, Any](chunk=CHUNK, interpret=True)
    keys = [numbers(*heads) / size**0.5 for _ in range(3)]
    state = [ones(H, size, size)]
    if name.startswith("outer"):
        bonus = [jnp.ones((H, size))] if name.endswith("bonus") else []
        log_decay = gates(*heads) if "key" in name or bonus else gates(H, length)
        if bonus:
            run = lambda q, k, v, g, u, s, docs: outer_keys.chunk_outer_keys(q, k, v, g, s, docs, bonus=u, **own)
            loop = lambda q, k, v, g, u, s, docs: outer_keys.reference(q, k, v, g, s, u, docs)
            return Case(run, loop, (2, 2, 2, 2, None), [*keys, log_decay, *bonus], state)
        kernel: Any = outer_keys.chunk_outer_keys if "key" in name else outer.chunk_outer
        return Case(functools.partial(kernel, **own), outer.reference, (2,) * 4, [*keys, log_decay], state)
    if name.startswith("delta"):
        log_decay = gates(*heads) if "key" in name else gates(H, length)
        kernel = delta_keys.chunk_delta_keys if "key" in name else delta.chunk_delta
        arrays = [*keys, jax.nn.sigmoid(numbers(H, length)), log_decay]
        return Case(functools.partial(kernel, **own), delta.reference, (2,) * 5, arrays, state)
    if name in FORMS:
        form = FORMS[name]
        parts = [ones(H), ones(H, size), ones(H, size, size)][0 if form.stabilised else 1 :]

        def loop(*a: Any) -> Any:
            first = a[5:-1] if form.stabilised else (ones(H), *a[5:-1])
            out, after = exponential.reference(*a[:5], *first, a[-1], form)
            return out, after if form.stabilised else after[1:]

        arrays = [*keys, gates(H, length), gates(H, length)]
        return Case(with_state(exponential, form, **own), loop, (2,) * 5, arrays, parts)
    if name.startswith("linear"):
        arrays, state = [gates(length, size), numbers(length, size)], [ones(size)]
        if name.endswith("complex"):
            arrays, state = ([jax.lax.complex(x, x) for x in part] for part in (arrays, state))
        return Case(functools.partial(linear.linear_scan, **own), linear.reference, (1, 1), arrays, state)
    arrays = [numbers(length, size), -gates(length, size), gates(size, size)[0], *(numbers(length, size),) * 2]
    run = functools.partial(selective.selective_scan, **own)
    return Case(run, selective.reference, (1, 1, None, 1, 1), arrays, [ones(size, size)])


def pulled(run: Callable[..., Any], given: list[Any], d_state: float = 1.0) -> Any:
    """Outputs, the state after them, and gradients, of the outputs by ones."""
    found, back = jax.vjp(run, *given)
    out, after = found
    return found, back((jnp.ones_like(out), jax.tree.map(lambda x: jnp.full_like(x, d_state), after)))


NAMES = [
    "outer", "outer per key", "outer with a bonus", "delta", "delta per key", *FORMS, "linear", "linear, complex",
    "selective",
]  # fmt: skip
each = pytest.mark.parametrize("name", NAMES)
ways = pytest.mark.parametrize("way", ["run", "recurrence"])


def assert_nothing_is_seen(of: Case, run: Callable[..., Any], length: int) -> None:
    """Of states that are infinite or NaN the same outputs, final state and gradients as from zeros, to the last bit."""
    segment = jnp.ones((1, length), jnp.int32)
    graded = jax.jit(lambda *given: pulled(lambda *a: run(*a, segment), list(given)))
    right, *found = (graded(*of.arrays, *(jnp.full_like(x, first) for x in of.state)) for first in (0, np.inf, np.nan))
    chex.assert_tree_all_finite(right)
    chex.assert_trees_all_equal(*found, right)


@each
@ways
def test_a_document_at_the_rows_start_does_not_see_the_state(name: str, way: str) -> None:
    of = case(name)
    assert_nothing_is_seen(of, getattr(of, way), 2 * CHUNK)


HOPPER: dict[str, tuple[int, Callable[..., Any]]] = {
    # steps of a chunk or a tile, kernel
    "outer": (64, gpu_outer.chunk_outer),
    "delta": (64, gpu_delta.chunk_delta),
    "exponential": (64, functools.partial(with_state, gpu_exponential, FORMS["exponential"])),
    "sigmoid": (64, functools.partial(with_state, gpu_exponential, FORMS["sigmoid"])),
    "linear": (16, gpu_linear.linear_scan),
    "linear, complex": (8, gpu_linear.linear_scan),
    "selective": (16, gpu_selective.selective_scan),
}


@interpreted
@pytest.mark.parametrize("name", HOPPER)
def test_nor_does_it_on_hopper_gpus(name: str) -> None:
    """Not so with decays per key, where one product adds up what is read of the state and of the chunk."""
    steps, kernel = HOPPER[name]
    matrices = steps == 64
    of = case(name, 2 * steps, 64 if matrices else SIZE)
    if matrices:
        of.arrays[:3] = [x.astype(jnp.bfloat16) for x in of.arrays[:3]]
    run = kernel(interpret=STRICT) if name in FORMS else functools.partial(kernel, interpret=STRICT)
    assert_nothing_is_seen(of, run, 2 * steps)


@pytest.mark.parametrize("name", [name for name in NAMES if "delta" not in name])
def test_a_document_in_a_chunk_does_not_see_the_state_that_another_reads(name: str) -> None:
    """Not so for `chunk_delta`, where steps of a chunk are solved for in one product."""
    start = 3
    of = case(name)
    segment = jnp.asarray(np.arange(2 * CHUNK)[None] >= start, jnp.int32)
    run = jax.jit(lambda *given: of.run(*given, segment))
    found, right = (run(*of.arrays, *(jnp.full_like(x, value) for x in of.state)) for value in (np.nan, 0))
    after = lambda x: jax.lax.slice_in_dim(x, start, None, axis=of.times[0] or 0)
    chex.assert_trees_all_equal((after(found[0]), found[1]), (after(right[0]), right[1]))


@each
def test_a_document_does_not_see_the_gradient_of_a_later_ones_state(name: str) -> None:
    """That of the first chunk's steps, where the later document begins within the second; or with it for `chunk_delta`,
    where gradients of a chunk's steps are solved for in one product."""
    of = case(name)
    segment = jnp.asarray(np.arange(2 * CHUNK)[None] >= CHUNK + (0 if "delta" in name else 3), jnp.int32)
    run = jax.jit(lambda value: pulled(lambda *a: of.run(*a, segment), [*of.arrays, *of.state], value)[1])
    found, right = run(np.nan), run(0.0)
    for x, y, time in zip(found, right, of.times, strict=False):
        if time is not None:
            first = lambda x, time=time: jax.lax.slice_in_dim(x, 0, CHUNK, axis=time)
            chex.assert_trees_all_equal(first(x), first(y))
    chex.assert_trees_all_equal(found[len(of.arrays) :], right[len(of.arrays) :])
