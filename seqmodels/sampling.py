"""Sampling a token from logits: temperature, top-k, top-p."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Sampling(NamedTuple):
    """Traced settings, so that changing them recompiles nothing."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


def restrict(
    logits: Float[Array, "B V"], *, top_k: int | Int[Array, ""], top_p: float | Float[Array, ""]
) -> Float[Array, "B V"]:
    """Logits with -inf outside the `top_k` likeliest tokens and, of those, outside the nucleus of mass `top_p`.

    The nucleus is the smallest set of likeliest tokens whose probabilities, renormalised over the top k, reach `top_p`
    (Holtzman et al., 1904.09751). Equal logits rank by token id; the likeliest token always stays.
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])[None]
    ranked = jnp.where(rank < top_k, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # from top_p = 1 on nothing is cut, whatever the rounding of the sum
    keep = (before < top_p) | (jnp.asarray(top_p) >= 1.0) | (rank == 0)
    ranked = jnp.where(keep, ranked, -jnp.inf)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros_like(logits).at[rows, order].set(ranked)


def draw(key: Array, logits: Float[Array, "B V"], sampling: Sampling, *, restricted: bool) -> Int[Array, "B"]:
    """One token per row, the temperature applied before the restriction."""
    logits = logits / sampling.temperature
    if restricted:
        logits = restrict(logits, top_k=sampling.top_k, top_p=sampling.top_p)
    return jax.random.categorical(key, logits, axis=-1)


def check_settings(temperature: float, top_k: int | None, top_p: float | None, key: Any) -> None:
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it has to be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it has to be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it has to be in (0, 1]")
    if key is None and temperature > 0:
        raise ValueError("sampling needs a key, such as key=jax.random.key(0); temperature=0 does without")
    if key is not None and not isinstance(key, jax.Array):
        raise TypeError(f"key is {key!r}; make one with jax.random.key({key!r})")
