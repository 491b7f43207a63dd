"""What an implementation has to agree with before it is timed: a loop over tokens in float64, on one head's longest
document, and an XLA form that agreed with that, on all rows and heads, in outputs, final states and gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.kernels_cases import Family, Shape
from experiments.bench.measure import Compiled, allowed, compiled, verify

# relative to an array's largest entry; bfloat16 rounds to 2^-9, and sums of rounded products add up
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
# of each row and head: two results within TOLERANCE of what is exact are within twice of it of one another
ALIKE = {kind: 2 * tolerance for kind, tolerance in TOLERANCE.items()}


class Results(NamedTuple):
    """Outputs [B, T, ...], final states (None where they are not given) and gradients of all inputs."""

    out: Any
    states: Any
    gradients: Sequence[Any]


class Alone(Exception):
    """There is nothing that all rows and heads could be compared with."""


def order(name: str) -> tuple[bool, bool]:
    """Sorts what others are compared with before them."""
    return name != "XLA chunked", not name.startswith("XLA")


@dataclasses.dataclass
class Gate:
    """For one family and shape; `arrays` are the inputs and the weights of the output, `check` is from `loop_of`."""

    family: Family
    shape: Shape
    kind: str
    arrays: Sequence[jax.Array]
    check: Compiled
    reference: Results | None = None

    @functools.cached_property
    def exact(self) -> list[np.ndarray]:
        return _exact(self.family, self.shape, self.arrays, self.check)

    def errors(self, name: str, results: Results, peer: Any = None) -> tuple[float, float | None]:
        """From the loop and from the first XLA form that passed, which has no such difference itself.

        `peer`: a `fla.Peer`, whose arguments may not be ours. Raises AssertionError on what is wrong, and Alone where
        no XLA form has passed.
        """
        told, exact, reference = f"{self.family.name} {self.shape}, {name}", self.exact, self.reference
        if peer is not None and peer.to_ours is not None:
            given = peer.inputs(*self.arrays[:-1])
            own = dataclasses.replace(self.family, loop=lambda *x: self.family.loop(*peer.to_ours(*x)))
            arrays = (*given, self.arrays[-1])
            exact = _exact(own, self.shape, arrays, loop_of(own, self.shape, arrays))
            reference = reference and _of_arguments(peer.to_ours, given, reference)
        error = verify(told, self._cut(results), exact, TOLERANCE[self.kind])
        if reference is None and name.startswith("XLA"):
            self.reference = results
            return error, None
        if reference is None:
            raise Alone("left out: no XLA form was right here, with which all rows and heads could be compared")
        return error, self._difference(told, results, reference)

    def _cut(self, results: Results) -> list[Any]:
        gradients = _cut(self.family, self.shape, results.gradients)[: self.family.compared]
        return [*_cut(self.family, self.shape, [results.out]), *gradients]

    def _difference(self, told: str, results: Results, reference: Results) -> float:
        """The largest of any array, row and head; raises AssertionError on the first array that is too far off."""
        names = ["outputs", "final states", *(f"gradients of input {n}" for n in range(len(reference.gradients)))]
        states = lambda x: None if x.states is None else self.family.of_states(x.states)
        flat = lambda x: [x.out, states(x), *x.gradients]
        found = []
        for name, actual, expected in zip(names, flat(results), flat(reference), strict=True):
            if actual is None:
                continue
            pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
            off = float(np.max([_off(self.shape, *pair) for pair in pairs]))
            found.append(allowed(f"{told}, {name} of all rows and heads beside XLA's,", off, ALIKE[self.kind]))
        return max(found)


def _off(shape: Shape, actual: Any, expected: Any) -> float:
    """The largest difference relative to the largest entry of its row and head, where the array has such."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{actual.shape} where {expected.shape} is expected")
    whole = {shape[:3]: (0, 2), shape[:2]: (0,), (shape.batch, shape.heads): (0, 1)}
    kept = next((axes for sizes, axes in whole.items() if expected.shape[: len(sizes)] == sizes), ())
    axes = tuple(axis for axis in range(expected.ndim) if axis not in kept)
    return float(_largest(*jax.device_put((actual, expected), jax.devices()[0]), axes))  # some are spread over devices


@functools.partial(jax.jit, static_argnums=2)
def _largest(actual: Any, expected: Any, axes: tuple[int, ...]) -> Any:
    actual, expected = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (actual, expected))
    largest = jnp.maximum(jnp.max(jnp.abs(expected), axes), np.finfo(np.float32).tiny)
    return jnp.max(jnp.max(jnp.abs(actual - expected), axes) / largest)


def _of_arguments(to_ours: Any, given: Sequence[Any], reference: Results) -> Results:
    """With gradients of a peer's own arguments, which `to_ours` makes into ours."""
    made, back = jax.vjp(to_ours, *given)
    gradients = back(tuple(x.astype(to.dtype) for x, to in zip(reference.gradients, made, strict=True)))
    return reference._replace(gradients=gradients)


def _cut(family: Family, shape: Shape, arrays: Sequence[Any]) -> list[Any]:
    """One row's last document, which is the longest, of one head or a few channels."""
    document = slice(int(shape.starts()[-1]), shape.length)
    of_row = lambda x: x[0, document] if x.shape[:2] == shape[:2] else x
    return [family.piece(of_row(x), number) for number, x in enumerate(arrays)]


def _wide(x: Any) -> Any:
    return np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64


def loop_of(family: Family, shape: Shape, given: Sequence[Any]) -> Compiled:
    """The loop over tokens and its gradients in float64, for arrays, or shapes, of inputs and weights."""

    def both(*x: Any) -> Any:
        out, back = jax.vjp(family.loop, *x[:-1])
        return [out, *back(x[-1])[: family.compared]]

    def cut(*x: Any) -> Any:
        return [*_cut(family, shape, x[:-1]), *_cut(family, shape, x[-1:])]

    with jax.enable_x64(True):
        narrow = jax.eval_shape(cut, *given)
        return compiled(both, *(jax.ShapeDtypeStruct(x.shape, _wide(x)) for x in narrow))


def _exact(family: Family, shape: Shape, arrays: Sequence[jax.Array], check: Compiled) -> list[np.ndarray]:
    narrow = [*_cut(family, shape, arrays[:-1]), *_cut(family, shape, arrays[-1:])]
    wide = [np.asarray(x, _wide(x)) for x in narrow]
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, check.run(*map(jnp.asarray, wide)))
