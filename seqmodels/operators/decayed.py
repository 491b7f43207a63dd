"""Decayed queries and keys, their products inside a chunk and with the state before it; no exponent is a difference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels import compat
from seqmodels.operators.diagonal import sums_between


def wide(x: Array) -> Array:
    """In at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def exact(subscripts: str, a: Array, b: Array) -> Array:
    """A sum of products, without what accelerators round in matrix products. In a loop on a CPU it is ten times as fast
    as `jnp.sum(a * b)`."""
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)


def read_decayed(query: Float[Array, "C K"], reach: Float[Array, "C #K"], state: Float[Array, "K V"]) -> Array:
    """query^T Diag(exp(reach)) state of every step. A scalar decay is put on the outcome: one product then serves
    all heads that share their queries.

    As a query's entry comes with its decay, the gradient of `reach` is query * d_query, without another product.
    """
    return _read(*compat.vary_alike((query, reach, state)))  # decays may be constants, whose gradients are not


@jax.custom_vjp
def _read(query: Array, reach: Array, state: Array) -> Array:
    if reach.shape[1] == 1:
        return (wide(query) @ state) * jnp.exp(reach)
    return (wide(query) * jnp.exp(reach)) @ state


def _read_forward(*inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    return _read(*inputs), inputs


def _read_backward(inputs: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    query, reach, state = inputs
    decay, decayed = jnp.exp(reach), wide(query)
    if reach.shape[1] == 1:
        gradient = gradient * decay
        d_query = jnp.einsum("iv,kv->ik", gradient, state)
    else:
        decayed = decayed * decay
        d_query = jnp.einsum("iv,kv->ik", gradient, state) * decay
    d_state = jnp.einsum("ik,iv->kv", decayed, gradient)
    return d_query.astype(query.dtype), _of_decay(wide(query), d_query, reach), d_state.astype(state.dtype)


_read.defvjp(_read_forward, _read_backward)


def write_decayed(key: Float[Array, "C K"], value: Float[Array, "C V"], rest: Float[Array, "C #K"]) -> Array:
    """sum_j Diag(exp(rest_j)) key_j value_j^T, [K, V]; as in `read_decayed`, a scalar decay goes to the values, and the
    gradient of `rest` is key * d_key."""
    return _write(*compat.vary_alike((key, value, rest)))


@jax.custom_vjp
def _write(key: Array, value: Array, rest: Array) -> Array:
    key, value = _decayed(key, value, rest)
    return compat.wide_einsum("ck,cv->kv", key, value)


def _decayed(key: Array, value: Array, rest: Array) -> tuple[Array, Array]:
    both, weight = jnp.result_type(key, value), jnp.exp(rest)
    if rest.shape[1] == 1:
        return key, (wide(value) * weight).astype(both)
    return (wide(key) * weight).astype(both), value


def _write_forward(*inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    return _write(*inputs), inputs


def _write_backward(inputs: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    key, value, rest = inputs
    weight = jnp.exp(rest)
    decayed_key, decayed_value = _decayed(key, value, rest)
    d_key = jnp.einsum("jv,kv->jk", wide(decayed_value), gradient)
    d_value = jnp.einsum("jk,kv->jv", wide(decayed_key), gradient)
    if rest.shape[1] == 1:
        d_value = d_value * weight
    else:
        d_key = d_key * weight
    return d_key.astype(key.dtype), d_value.astype(value.dtype), _of_decay(wide(key), d_key, rest)


_write.defvjp(_write_forward, _write_backward)


def _of_decay(x: Float[Array, "C K"], gradient: Float[Array, "C K"], log: Float[Array, "C #K"]) -> Array:
    """The gradient of the logs of the decays that `x` comes with."""
    found = exact("ik,ik->i", x, gradient)[:, None] if log.shape[1] == 1 else x * gradient
    return found.astype(log.dtype)


def weigh(x: Float[Array, "*C K"], weight: Float[Array, "*C"]) -> Float[Array, "*C K"]:
    """Every row times its weight, as an outer product with ones: the gradient of the weight is then a product too."""
    return x * exact("...,k->...k", weight, jnp.ones(x.shape[-1], x.dtype))


def decayed_scores(
    query: Float[Array, "C K"],
    key: Float[Array, "C K"],
    log_decay: Float[Array, "C #K"],
    *,
    inclusive: bool = True,
) -> Float[Array, "C C"]:
    """scores[i, j] = sum_k q_ik k_jk exp(sum of log_decay_sk over j < s <= i) for j <= i, and 0 above the diagonal.

    `inclusive` False leaves step i itself out: s < i, and j < i. Blocks are merged pairwise: what leads from j to
    i is the sum from j to its block's end and from i's block's start to i, so every exponent is a sum of logs <= 0 and
    nothing is subtracted: exact to rounding and free of overflow for any decay, where exp(-cumsum) overflows. A scalar
    decay takes one product for all scores, which heads with the same queries and keys share.
    """
    length = query.shape[0]
    if log_decay.shape[1] == 1:
        decay = jnp.exp(sums_between(log_decay[:, 0], inclusive=inclusive))
        return compat.wide_einsum("ik,jk->ij", query, key) * decay
    padded = 1 << (length - 1).bit_length()
    fill = lambda x: jnp.pad(x, ((0, padded - length), (0, 0)))[:, None]
    query, key, log_decay = fill(query), fill(key), fill(log_decay)
    scores = jnp.sum(wide(query) * wide(key), axis=2, keepdims=True)
    scores = scores if inclusive else jnp.zeros_like(scores)
    reach = log_decay if inclusive else jnp.zeros_like(log_decay)  # from the block's start to each step
    rest = jnp.zeros_like(log_decay)  # from after each step to the block's end
    total = log_decay
    while scores.shape[0] > 1:
        first, second = (lambda x: x[0::2]), (lambda x: x[1::2])
        late = (second(query) * jnp.exp(second(reach))).astype(query.dtype)
        early = (first(key) * jnp.exp(first(rest))).astype(key.dtype)
        across = compat.wide_einsum("nik,njk->nij", late, early)
        upper = jnp.concatenate([first(scores), jnp.zeros_like(across)], axis=2)
        lower = jnp.concatenate([across, second(scores)], axis=2)
        scores = jnp.concatenate([upper, lower], axis=1)
        reach = jnp.concatenate([first(reach), first(total) + second(reach)], axis=1)
        rest = jnp.concatenate([first(rest) + second(total), second(rest)], axis=1)
        total = first(total) + second(total)
        query, key = (x.reshape(-1, 2 * x.shape[1], x.shape[2]) for x in (query, key))
    return scores[0, :length, :length]
