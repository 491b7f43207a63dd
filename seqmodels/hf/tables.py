"""Rules between the tensors of a checkpoint and our parameters: each with a transform and its exact inverse.

Transforms only move numbers (transpose, reshape, join, part), so a round trip changes no bit, and gradients convert by
the same rules as weights do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Transform(NamedTuple):
    """`load` makes our array of a tensor, `save` the tensor of our array."""

    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda tensor: tensor, lambda array: array)
TRANSPOSED = Transform(lambda tensor: tensor.T, lambda array: array.T)
"""torch keeps the weight of a linear map as [out, in], we as [in, out]."""
TAPS = Transform(lambda tensor: tensor[:, 0].T, lambda array: array.T[:, None])
"""A depthwise convolution: torch's [channels, 1, width] and our [width, channels]; the last tap is the present."""


def shaped(ours: Sequence[int], theirs: Sequence[int]) -> Transform:
    """The same numbers in the same order, in another shape."""
    return Transform(lambda tensor: tensor.reshape(tuple(ours)), lambda array: array.reshape(tuple(theirs)))


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors of a checkpoint and the parameters of ours that hold the same numbers.

    `load(*tensors)` returns the parameters, `save(*parameters)` the tensors, each a tuple of arrays.
    """

    tensors: tuple[str, ...]
    parameters: tuple[str, ...]
    load: Callable[..., tuple[np.ndarray, ...]]
    save: Callable[..., tuple[np.ndarray, ...]]


def rule(tensor: str, parameter: str, transform: Transform = SAME) -> Rule:
    """One tensor, one parameter."""
    return Rule((tensor,), (parameter,), lambda t: (transform.load(t),), lambda p: (transform.save(p),))


def linear(tensor: str, parameter: str, *, bias: bool = False) -> tuple[Rule, ...]:
    """The `weight`, and with `bias` the `bias`, of a linear map."""
    weight = rule(f"{tensor}.weight", f"{parameter}.kernel", TRANSPOSED)
    return (weight, rule(f"{tensor}.bias", f"{parameter}.bias")) if bias else (weight,)


def convolution(tensor: str, parameter: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """The taps, and with `bias` the bias, of a short depthwise convolution."""
    weight = rule(f"{tensor}.weight", f"{parameter}.kernel", TAPS)
    return (weight, rule(f"{tensor}.bias", f"{parameter}.bias")) if bias else (weight,)


def norm(tensor: str, parameter: str, *, bias: bool = False) -> tuple[Rule, ...]:
    """The scale, and with `bias` the bias, of a norm; `zero_centred` norms store what they add to 1, as we do."""
    weight = rule(f"{tensor}.weight", f"{parameter}.scale")
    return (weight, rule(f"{tensor}.bias", f"{parameter}.bias")) if bias else (weight,)


def joined(tensors: Sequence[str], parameter: str, *, axis: int, each: Transform = TRANSPOSED) -> Rule:
    """Tensors of one shape side by side along our `axis` in one parameter."""
    return Rule(
        tuple(tensors),
        (parameter,),
        lambda *parts: (np.concatenate([each.load(part) for part in parts], axis),),
        lambda whole: tuple(each.save(part) for part in np.split(whole, len(tensors), axis)),
    )


def parted(
    tensor: str, parameters: Sequence[str], sizes: Sequence[int], *, axis: int, each: Transform = TRANSPOSED
) -> Rule:
    """One tensor that holds several parameters side by side along our `axis`, of the given sizes there."""
    ends = np.cumsum(sizes)[:-1]
    return Rule(
        (tensor,),
        tuple(parameters),
        lambda whole: tuple(np.split(each.load(whole), ends, axis)),
        lambda *parts: (each.save(np.concatenate(parts, axis)),),
    )


def stacked(tensors: Sequence[str], parameter: str, *, each: Transform = TRANSPOSED) -> Rule:
    """Tensors of one shape (experts) as one parameter with a leading axis over them."""
    return Rule(
        tuple(tensors),
        (parameter,),
        lambda *parts: (np.stack([each.load(part) for part in parts]),),
        lambda whole: tuple(each.save(part) for part in whole),
    )
