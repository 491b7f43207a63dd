"""`chunk_exponential` and `chunk_sigmoid` for GPUs; `kernels_pallas/exponential.py` has the recurrence, its equations.

The running maximum is of the gates alone. A scan over [B, H, T] makes it before the kernels do anything, and with

    g_t = log f_t + m_{t-1} - m_t <= 0       u_t = exp(log i_t - m_t) <= 1

what is left is C_t = exp(g_t) C_{t-1} + u_t k_t v_t^T, and n_t the same with 1 for v_t: `chunk_outer` with a weight for
each key and one more value. Where m_t comes from before, g_t is 0 as it stands, not the rounding of a difference. No
weight is lost but what float32 cannot hold: that of key j in step i is u_j times decays, and none is above 1.

The walks (`exponential_walk.py`) are those of `chunk_outer`: the output, dQ, dK and dV, with the same copies. What is
new goes along: u into the decays of scores, the normaliser as a vector beside the state, r into the output while that
is in registers, r and dd into the scores of dO V^T. A column of ones among the values would be 64 columns to a program,
that is half as many programs again where V = 128; a division after the kernel would read and write outputs once more,
and numerators and sums would be rounded to bfloat16 before it. New in memory: q^T n of every step, n of every chunk.

Backward, d log i_j = k_j . dk_j and d log f as in `chunk_outer`, as if m were given; then the gradient mu of m itself,
which is that of eps and of the last state, goes back the way that each m_t came from.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.chunks import whole_chunks
from kernels_pallas.exponential import State, check
from kernels_pallas.exponential_kernels import Form
from kernels_pallas.gpu.common import CHUNK, LOWEST, chunks_of, refused, shared_bytes, starts_of
from kernels_pallas.gpu.exponential_walk import D_KEY, D_QUERY, D_VALUE, OUT, more_of, scratch
from kernels_pallas.gpu.walk import WEIGHT, Walk, gates_of, walk


def chunk_exponential(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_input: jax.Array,
    log_forget: jax.Array,
    state: State,
    segment: jax.Array,
    eps: float = 1e-6,
    interpret: Any = False,
) -> tuple[jax.Array, State]:
    """`kernels_pallas.exponential.chunk_exponential` for bfloat16 and heads of 64, 128 or 256: the same arrays, the
    same results.

    Chunks are of 64 steps, and there are no states to save; orders of axes and `interpret` are as for the `chunk_outer`
    beside it. Raises ValueError on shapes, types and sizes that the kernel does not take.
    """
    form = Form("chunk_exponential", eps)
    return _checked(form, interpret, query, key, value, log_input, log_forget, *state, segment)


def chunk_sigmoid(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_input: jax.Array,
    log_forget: jax.Array,
    state: tuple[jax.Array, jax.Array],
    segment: jax.Array,
    eps: float = 0.0,
    normalise: bool = True,
    interpret: Any = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The same for `kernels_pallas.exponential.chunk_sigmoid`."""
    normaliser, memory = state
    log_max = jnp.zeros(memory.shape[:2], jnp.float32)
    form = Form("chunk_sigmoid", eps, stabilised=False, normalised=normalise)
    arrays = (query, key, value, log_input, log_forget, log_max, normaliser, memory, segment)
    out, (_, normaliser, memory) = _checked(form, interpret, *arrays)
    return out, (normaliser, memory)


def shared_memory(key_size: int, value_size: int) -> dict[str, int]:
    """Bytes of shared memory that a program of each walk has."""
    sizes = {OUT: key_size, D_QUERY: value_size, D_KEY: value_size, D_VALUE: key_size}
    return {kind.name: shared_bytes(scratch(kind, size, key_size).values()) for kind, size in sizes.items()}


def _checked(form: Form, interpret: Any, *arrays: Any) -> tuple[jax.Array, State]:
    check(form.name, *arrays)
    if told := refused(*arrays[:3]):
        raise ValueError(f"{form.name}: {told}")
    out, state = _run(form, interpret, *(jnp.swapaxes(x, 1, 2) for x in arrays[:3]), *arrays[3:])
    return jnp.swapaxes(out, 1, 2), state


class _Steps(NamedTuple):
    """Of every step [B, H, T]: log_max, the logs of the decay and of the key's weight, and whether m came from m."""

    log_max: jax.Array
    decay: jax.Array
    weight: jax.Array
    carried: jax.Array


def _steps(form: Form, log_input: Any, log_forget: Any, log_max: Any, segment: Any) -> _Steps:
    i, f = (x.astype(jnp.float32) for x in (log_input, log_forget))
    if not form.stabilised:
        return _Steps(jnp.zeros_like(i), f, i, jnp.zeros(i.shape, bool))
    f = jnp.where(starts_of(segment)[:, None], -jnp.inf, f)
    first = log_max.astype(jnp.float32)[..., None]
    kept = lambda f, m: jnp.where(f == -jnp.inf, f, f + m)
    over = lambda a, b: (a[0] + b[0], jnp.maximum(kept(b[0], a[1]), b[1]))
    largest = jnp.maximum(i, jnp.concatenate([kept(f[..., :1], first), jnp.full_like(i[..., 1:], -jnp.inf)], axis=-1))
    m = lax.associative_scan(over, (f, largest), axis=2)[1]
    reach = kept(f, jnp.concatenate([first, m[..., :-1]], axis=-1))
    base = jnp.where(m == -jnp.inf, 0, m)
    return _Steps(m, jnp.where(m > i, 0, jnp.minimum(reach - base, 0)), i - base, (m > i) | (reach >= i))


def _whole(steps: _Steps, segment: Any, rows: Any, *arrays: Any) -> tuple[jax.Array, list[jax.Array]]:
    """The gates [B, H, N, 7, CHUNK] and arrays, up to whole chunks: steps that are added write and change nothing."""
    segment = jnp.pad(segment, ((0, 0), (0, -segment.shape[1] % CHUNK)), mode="edge")
    decay, weight, *rows = whole_chunks(CHUNK, steps.decay, jnp.exp(steps.weight), *rows, axis=2)
    gates = gates_of(decay, segment).at[..., WEIGHT, :].multiply(chunks_of(weight))
    more = jnp.stack([chunks_of(x) for x in (weight, *rows)], axis=-2)
    return jnp.concatenate([gates, more], axis=-2), whole_chunks(CHUNK, *arrays, axis=1)


def _bounds(log_max: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(min(m, 0)), and 1 or exp(-m) times that."""
    return jnp.exp(jnp.minimum(log_max, 0)), jnp.exp(-jnp.maximum(log_max, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(form: Form, interpret: Any, *arrays: jax.Array) -> tuple[jax.Array, State]:
    return _forward(form, interpret, *arrays)[0]


def _walk(form: Form, interpret: Any, kind: Walk, x: Any, y: Any, z: Any, gates: Any, state: Any, **late: Any) -> Any:
    normaliser, memory = state
    more = more_of(form, kind, z, gates.shape[2], normaliser)
    return walk(kind, interpret, x, y, z, gates, memory, more, **late)


def _forward(form: Form, interpret: Any, *arrays: Any) -> Any:
    query, key, value, log_input, log_forget, log_max, normaliser, memory, segment = arrays
    steps = _steps(form, log_input, log_forget, log_max, segment)
    gates, (q, k, v) = _whole(steps, segment, _bounds(steps.log_max), query, key, value)
    found = _walk(form, interpret, OUT, q, k, v, gates, (normaliser, memory))
    out = found["out"][:, : value.shape[1]]
    last = (steps.log_max[..., -1], found["last_normaliser"][:, :, 0], found["last"])
    return (out, last), (*arrays, out, found["sums"][:, :, 0], last)


def _backward(form: Form, interpret: Any, residuals: Any, gradients: Any) -> Any:
    query, key, value, log_input, log_forget, log_max, normaliser, memory, segment, out, sums, last = residuals
    d_out, (d_log_max, d_normaliser, d_memory) = gradients
    length = query.shape[1]
    steps = _steps(form, log_input, log_forget, log_max, segment)
    flat = lambda x: x.reshape(*x.shape[:2], -1)[:, :, :length]
    of_out = jnp.swapaxes(jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=3), 1, 2)
    ratio, tilt = jnp.ones_like(of_out), jnp.zeros_like(of_out)
    if form.normalised:
        (scale, floor), sums = _bounds(steps.log_max), flat(sums)
        size = jnp.abs(sums) * scale
        ratio = scale / (jnp.maximum(size, floor) + form.eps * scale)
        tilt = jnp.where(size > floor, -of_out * ratio * jnp.sign(sums), 0)
    gates, (q, k, v, do) = _whole(steps, segment, (ratio, tilt), query, key, value, d_out)
    swap = lambda x: jnp.swapaxes(x, 2, 3)
    run = functools.partial(_walk, form, interpret)
    of_query = run(D_QUERY, do, v, k, gates, (normaliser, swap(memory)), beside=q)
    of_key = run(D_KEY, v, do, q, gates, (d_normaliser, swap(d_memory)), beside=k, kept=of_query["states"])
    of_value = run(D_VALUE, k, q, do, gates, (d_normaliser, d_memory))

    written = jnp.sum(of_key["sums"], axis=2)  # k . dk
    before = jnp.concatenate([of_key["normalisers"][:, :, 1:], d_normaliser[:, :, None].astype(jnp.float32)], axis=2)
    crossed = jnp.sum(of_key["crossed"], axis=(2, 4)) + jnp.sum(of_query["normalisers"] * before, axis=3)
    through = lax.cumsum(jnp.sum(of_query["sums"], axis=2) - written, axis=3, reverse=True) + crossed[..., None]
    d_input = flat(written)
    d_forget = jnp.where(starts_of(segment)[:, None] | (steps.decay <= LOWEST), 0, flat(through))
    d_first, dn, dc = jnp.zeros_like(d_log_max), of_key["normalisers"][:, :, 0], of_value["last"]
    if form.stabilised:
        flowing = lambda n, c, dn, dc: jnp.sum(n * dn, axis=2) + jnp.sum(c * dc, axis=(2, 3))
        d_last = d_log_max - flowing(last[1], last[2], d_normaliser, d_memory)
        d_max = (-form.eps * ratio * of_out).at[..., -1].add(d_last)
        d_max = _from_later(jnp.where(steps.log_max == -jnp.inf, 0, d_max), steps.carried)
        d_before = jnp.where(steps.carried, d_max, 0)
        d_input += d_max - d_before
        d_forget += d_before
        d_first = jnp.where(starts_of(segment)[:, :1], 0, flowing(normaliser, memory, dn, dc)) + d_before[..., 0]
    given = (query, key, value, log_input, log_forget, log_max, normaliser, memory)
    steps_of = [x["out"][:, :length] for x in (of_query, of_key, of_value)]
    found = (*steps_of, d_input, d_forget, d_first, dn, dc)
    return (*(x.astype(like.dtype) for x, like in zip(found, given, strict=True)), None)


def _from_later(d_max: jax.Array, carried: jax.Array) -> jax.Array:
    """The gradients of maxima [B, H, T], with those of all that came from each."""
    after = jnp.concatenate([carried[..., 1:], jnp.zeros_like(carried[..., :1])], axis=-1)
    over = lambda a, b: (a[0] & b[0], b[1] + jnp.where(b[0], a[1], 0))
    return lax.associative_scan(over, (after, d_max), axis=2, reverse=True)[1]


_run.defvjp(_forward, _backward)
