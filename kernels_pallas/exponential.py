"""`chunk_exponential`: mLSTM's C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t under a running maximum.

    m_t = max(log f_t + m_{t-1}, log i_t)    out_t = q_t^T C_t / (max(|q_t^T n_t|, exp(-m_t)) + eps)

where C and n stand for exp(-m) times the above (2405.04517). Forward, for a chunk of L steps from the state (m, n, C),
with E_ij the sum of log f over j < s <= i plus log i_j, for j <= i of one document, else -inf (2503.14376):

    m_i = max(R_i, max over j of E_ij)       R_i = log f_1 + .. + log f_i + m while the document of C goes on, else -inf
    S_ij = (q_i . k_j) W_ij                  W_ij = exp(E_ij - m_i), a_i = exp(R_i - m_i)
    O = r * (S V + a * (Q C))                r_i = 1 / (max(|d_i|, exp(-m_i)) + eps), d = S 1 + a * (Q n)
    C' = b C + (w * K)^T V                   n' = b n + K^T w, w_j = W_Lj, b = a_L, m' = m_L

Backward, with (dm', dn', dC') from the chunk after it, and dd_i = -(dO_i . O_i) r_i sign(d_i), or 0 where exp(-m_i) is
the larger:

    dA = r * (dO V^T) + dd 1^T               dV = S^T (r * dO) + w * (K dC')
    dQ = (dA * W) K + a * Y                  dC = Q^T (a r * dO) + b dC'
    dK = (dA * W)^T Q + X                    dn = Q^T (a * dd) + b dn'
    Y = r * (dO C^T) + dd n^T                X = w * (V dC'^T + 1 dn'^T)

and the logs dE = S * dA, dE_Lj += k_j . X_j, dR_i = a_i q_i . Y_i, dR_L += b <(n, C), (dn', dC')>. The maximum cancels
in the true C, n and out but for eps and for what the state is given back under: its gradient

    mu_i = -eps r_i (dO_i . O_i), and dm' - <n', dn'> - <C', dC'> more for i = L

goes to that one of E_i1 .. E_ii and R_i which is m_i. Then log i_j takes the sum of dE_ij over i, log f_s that of dE_ij
over j < s <= i and of dR_i over i >= s, m that of dR. These are summed as they stand, no sum taken from another.

`chunk_sigmoid` is the same with log i <= 0 (2503.14376: an input gate in (0, 1)), where nothing overflows and m_t is 0.

The grid goes through the chunks of a head in turn, the state stays in VMEM: one pass over the inputs each way. States
before the chunks are computed again in the backward pass, or kept in the forward one (`save_states`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import exponential_kernels
from kernels_pallas.chunks import CHUNK, check_shapes, documents_of, lanes, whole_chunks
from kernels_pallas.exponential_kernels import Form
from kernels_pallas.outer import Blocks

State = tuple[jax.Array, jax.Array, jax.Array]  # log_max [B, H], normaliser [B, H, K], memory [B, H, K, V]


def reference(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_input: jax.Array,
    log_forget: jax.Array,
    log_max: jax.Array,
    normaliser: jax.Array,
    memory: jax.Array,
    segment: jax.Array,
    form: Form,
) -> tuple[jax.Array, State]:
    """The recurrence a token at a time, in the type of the memory."""
    before = jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]
    log_forget = jnp.where((segment == before)[:, None], log_forget, -jnp.inf)

    def body(state: State, step: Any) -> Any:
        q, k, v, i, f, goes_on = step
        m, n, c = (jnp.where(jnp.expand_dims(goes_on, range(1, x.ndim)), x, 0) for x in state)
        after, base = jnp.zeros_like(m), jnp.zeros_like(m)
        if form.stabilised:
            after = jnp.where(f + m >= i, f + m, i)
            base = jnp.where(after == -jnp.inf, 0, after)
        old, new = jnp.exp(f + m - base)[..., None], jnp.exp(i - base)[..., None]
        n = old * n + new * k
        c = old[..., None] * c + (new * k)[..., None] * v[..., None, :]
        out = jnp.einsum("bhk,bhkv->bhv", q, c)
        if form.normalised:  # both sides times exp(min(m, 0)): exp(-m) overflows
            scale, floor = jnp.exp(jnp.minimum(after, 0)), jnp.exp(-jnp.maximum(after, 0))
            below = jnp.maximum(jnp.abs(jnp.sum(q * n, axis=-1)) * scale, floor) + form.eps * scale
            out = out * (scale / below)[..., None]
        return (after, n, c), out

    moved = [jnp.moveaxis(x, 2, 0).astype(memory.dtype) for x in (query, key, value, log_input, log_forget)]
    state, out = jax.lax.scan(body, (log_max, normaliser, memory), (*moved, (segment == before).T))
    return jnp.moveaxis(out, 0, 2), state


def chunk_exponential(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_input: jax.Array,
    log_forget: jax.Array,
    state: State,
    segment: jax.Array,
    eps: float = 1e-6,
    chunk: int = CHUNK,
    save_states: bool = False,
    interpret: Any = False,
) -> tuple[jax.Array, State]:
    """`(out [B, H, T, V], state)` of query and key [B, H, T, K], value [B, H, T, V], float32 log_input (any number, or
    -inf) and log_forget (at most 0, or -inf) [B, H, T], and the float32 state `(log_max [B, H], normaliser [B, H, K],
    memory [B, H, K, V])`, of which the true ones are exp(log_max) times what is kept: -inf and zeros before any token.

    `segment` [B, T] int32 counts the documents of a row: `state` goes on where it is 0, and every change starts from
    nothing. Inputs are bfloat16 or float32, products gather in float32; the output has the type of `value`.
    `interpret`: as `pallas_call` takes it. Raises ValueError on shapes that do not fit.
    """
    form = Form("chunk_exponential", eps)
    return _checked(form, chunk, save_states, interpret, query, key, value, log_input, log_forget, *state, segment)


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
    chunk: int = CHUNK,
    save_states: bool = False,
    interpret: Any = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """`chunk_exponential` with log_input at most 0 too, and no maximum: the state is `(normaliser, memory)`, zeros
    before any token, and out = q^T C / (max(|q^T n|, 1) + eps), or q^T C where `normalise` is False."""
    normaliser, memory = state
    log_max = jnp.zeros(memory.shape[:2], jnp.float32)
    arrays = (query, key, value, log_input, log_forget, log_max, normaliser, memory, segment)
    form = Form("chunk_sigmoid", eps, stabilised=False, normalised=normalise)
    out, (_, normaliser, memory) = _checked(form, chunk, save_states, interpret, *arrays)
    return out, (normaliser, memory)


def vmem_bytes(key_size: int, value_size: int, chunk: int, dtype: Any) -> dict[str, int]:
    """What the forward and the backward kernel hold: blocks twice (one is copied while one is used), temporaries."""
    key_size, value_size = lanes(key_size), lanes(value_size)
    item, state = jnp.dtype(dtype).itemsize, 4 * key_size * value_size
    keys, values, scores = chunk * key_size, chunk * value_size, 4 * chunk * chunk
    gates = 2 * 8 * chunk * 4  # a row fills eight sublanes
    forward = 2 * (2 * keys + 2 * values) * item + 3 * gates + 9 * state + 6 * scores + 4 * (2 * keys + 2 * values)
    backward = 2 * (4 * keys + 3 * values) * item + 5 * gates + 9 * state + 8 * scores + 4 * (5 * keys + 3 * values)
    return {"forward": forward, "backward": backward}


def _checked(form: Form, chunk: int, save: bool, interpret: Any, *arrays: Any) -> tuple[jax.Array, State]:
    check(form.name, *arrays)
    return _run(form, chunk, save, interpret, *arrays)


def check(name: str, *arrays: Any) -> None:
    """Raises ValueError on arrays, in the order of `reference`, of shapes that do not fit."""
    query, key, value, log_input, log_forget, log_max, normaliser, memory, segment = arrays
    batch, heads, length, size = query.shape
    shapes = {
        "key": (key.shape, query.shape),
        "value": (value.shape[:3], (batch, heads, length)),
        "log_input": (log_input.shape, (batch, heads, length)),
        "log_forget": (log_forget.shape, (batch, heads, length)),
        "log_max": (log_max.shape, (batch, heads)),
        "normaliser": (normaliser.shape, (batch, heads, size)),
        "memory": (memory.shape, (batch, heads, size, value.shape[3])),
        "segment": (segment.shape, (batch, length)),
    }
    check_shapes(f"{name} with query {query.shape}", shapes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _run(form: Form, chunk: int, save: bool, interpret: Any, *arrays: jax.Array) -> tuple[jax.Array, State]:
    return _forward(form, chunk, save, interpret, *arrays)[0]


class _Blocks(Blocks):
    """Those of `chunk_outer`, and of a state in three parts."""

    def __init__(self, query: Any, value: Any, rows: Any, chunk: int, *, backward: bool = False):
        super().__init__(query, value, rows, chunk, backward=backward)
        last = self.chunks - 1
        at = (lambda n: last - n) if backward else (lambda n: n)
        sizes = ((1, 1), (1, self.key_size), (self.key_size, self.value_size))
        self.inputs = [self.keys, self.keys, self.values, self.gates, self.gates, self.documents]
        self.parts = [pl.BlockSpec((None, None, *size), lambda b, h, n: (b, h, 0, 0)) for size in sizes]
        self.kept = [pl.BlockSpec((None, None, None, *size), lambda b, h, n: (b, h, at(n), 0, 0)) for size in sizes]
        self.part_shapes = [self.shape(*size) for size in sizes]
        self.kept_shapes = [self.shape(self.chunks, *size) for size in sizes]

    @property
    def scratch(self) -> list[Any]:
        return [pltpu.VMEM(shape.shape[2:], jnp.float32) for shape in self.part_shapes]


def _padded(chunk: int, query: Any, key: Any, value: Any, log_input: Any, log_forget: Any) -> list[Any]:
    """Whole chunks; steps after the last write nothing and forget nothing. Gates are rows [B, H, 1, T]."""
    q, k, v, f = whole_chunks(chunk, query, key, value, log_forget, axis=2)
    more = q.shape[2] - query.shape[2]
    i = jnp.pad(log_input, ((0, 0), (0, 0), (0, more)), constant_values=-jnp.inf)
    return [q, k, v, *(row[:, :, None].astype(jnp.float32) for row in (i, f))]


def _rows(log_max: Any, normaliser: Any, memory: Any) -> list[Any]:
    wide = [x.astype(jnp.float32) for x in (log_max, normaliser, memory)]
    return [wide[0][..., None, None], wide[1][..., None, :], wide[2]]


def _forward(form: Form, chunk: int, save: bool, interpret: Any, *arrays: Any) -> Any:
    *given, segment = arrays
    padded, state = _padded(chunk, *given[:5]), _rows(*given[5:])
    out, m, n, c, *states = _outputs(form, padded, documents_of(segment, chunk), state, chunk, save, interpret)
    return (out[:, :, : given[0].shape[2]], (m[..., 0, 0], n[..., 0, :], c)), (*arrays, states if save else None)


def _outputs(form: Form, padded: Any, documents: Any, state: Any, chunk: int, save: bool, interpret: Any) -> Any:
    q, _, v, i, _ = padded
    blocks = _Blocks(q, v, i, chunk)
    outputs = [(blocks.values, jax.ShapeDtypeStruct(v.shape, v.dtype))]
    outputs += zip(blocks.parts, blocks.part_shapes, strict=True)
    outputs += zip(blocks.kept, blocks.kept_shapes, strict=True) if save else ()
    kernel = functools.partial(exponential_kernels.forward_kernel, form)
    launch = blocks.call(kernel, f"{form.name}_forward", [*blocks.inputs, *blocks.parts], outputs, interpret)
    return launch(*padded, documents, *state)


def _backward(form: Form, chunk: int, save: bool, interpret: Any, residuals: Any, gradients: Any) -> Any:
    *given, segment, states = residuals
    d_out, d_last = gradients
    length = d_out.shape[2]
    padded, documents = _padded(chunk, *given[:5]), documents_of(segment, chunk)
    if states is None:
        states = _outputs(form, padded, documents, _rows(*given[5:]), chunk, True, interpret)[4:]
    q, _, v, i, _ = padded
    blocks = _Blocks(q, v, i, chunk, backward=True)
    inputs = [*blocks.inputs, *blocks.kept, blocks.values, *blocks.parts]
    specs = [*blocks.inputs[:5], *blocks.parts]
    shapes = [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in padded), *blocks.part_shapes]
    outputs = list(zip(specs, shapes, strict=True))
    kernel = functools.partial(exponential_kernels.backward_kernel, form)
    launch = blocks.call(kernel, f"{form.name}_backward", inputs, outputs, interpret)
    d_out = whole_chunks(chunk, d_out, axis=2)[0]
    dq, dk, dv, di, df, dm, dn, dc = launch(*padded, documents, *states, d_out, *_rows(*d_last))
    found = (*(x[:, :, :length] for x in (dq, dk, dv, di[:, :, 0], df[:, :, 0])), dm[..., 0, 0], dn[..., 0, :], dc)
    return (*(x.astype(like.dtype) for x, like in zip(found, given, strict=True)), None)


_run.defvjp(_forward, _backward)
