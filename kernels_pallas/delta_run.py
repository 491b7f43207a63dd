"""What `chunk_delta` and `chunk_delta_keys` share about their kernels: checks, memory, launches, and the gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import outer
from kernels_pallas.chunks import check_shapes, documents_of, lanes, whole_chunks
from kernels_pallas.outer import Blocks, Form


def memory(
    key_size: int, value_size: int, chunk: int, dtype: Any, gates: int, d_gates: int, paired: int
) -> dict[str, int]:
    """`vmem_bytes` with those of the gates, of their gradients, and what is live in a form's `pairs`."""
    key_size, value_size = lanes(key_size), lanes(value_size)
    item, state = jnp.dtype(dtype).itemsize, 4 * key_size * value_size
    keys, values, square = chunk * key_size, chunk * value_size, 4 * chunk * chunk
    wide, readers = 4 * (keys + values), 2 * keys * (4 + item)
    if item == 4:  # an operand of an exact product: three parts of bfloat16, and what remains after two of them
        paired += 14 * 2 * (key_size * value_size + keys + values)
    forward = 2 * ((2 * keys + 2 * values) * item + gates + square) + 6 * state + readers + 2 * wide + 6 * square
    backward = 2 * ((2 * keys + 2 * values) * item + 4 * (2 * keys + values) + gates + d_gates + square)
    backward += 9 * state + 2 * readers + 4 * wide + 9 * square
    return {"forward": forward + paired, "backward": backward + paired}


def check(name: str, query: Any, key: Any, value: Any, beta: Any, *others: Any) -> None:
    """As `outer.check`, and beta beside it."""
    outer.check(name, query, key, value, *others)
    check_shapes(f"{name} with query {query.shape}", {"beta": (beta.shape, value.shape[:3])})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def run(form: Form, chunk: int, save_states: bool, interpret: Any, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The arrays of `chunk_delta`, checked, through the kernels of a form."""
    return _forward(form, chunk, save_states, interpret, *arrays)[0]


class _Blocks(Blocks):
    """Those of `chunk_outer`, with the rows of beta and the inverses of the chunks."""

    def __init__(self, query: Any, value: Any, beta: Any, log_decay: Any, chunk: int, *, backward: bool = False):
        super().__init__(query, value, log_decay, chunk, backward=backward)
        self.rows = Blocks(query, value, beta, chunk, backward=backward).gates
        self.inverses = pl.BlockSpec((None, None, None, chunk, chunk), self.states.index_map)

    def kept(self) -> list[Any]:
        states = self.shape(self.chunks, self.key_size, self.value_size)
        return [(self.states, states), (self.inverses, self.shape(self.chunks, self.chunk, self.chunk))]


def _whole(chunk: int, given: Any) -> list[jax.Array]:
    """Whole chunks of all that steps have; what is one number a step becomes float32 rows [B, H, 1, T]."""
    arrays = whole_chunks(chunk, *given, axis=2)
    return [x[:, :, None].astype(jnp.float32) if x.ndim == 3 else x for x in arrays]


def _forward(form: Form, chunk: int, save: bool, interpret: Any, *arrays: Any) -> Any:
    *given, state, segment = arrays
    found = _launch(form, _whole(chunk, given), state, documents_of(segment, chunk), chunk, save, interpret)
    out, after, *kept = found
    return (out[:, :, : given[0].shape[2]], after), (*arrays, kept)


def _launch(form: Form, given: Any, state: Any, documents: Any, chunk: int, save: bool, interpret: Any) -> Any:
    q, _, v, beta, g = given
    blocks = _Blocks(q, v, beta, g, chunk)
    outputs = [(blocks.values, jax.ShapeDtypeStruct(v.shape, v.dtype))]
    outputs += [(blocks.state, blocks.shape(blocks.key_size, blocks.value_size)), *(blocks.kept() if save else [])]
    inputs = [blocks.shared, blocks.shared, blocks.values, blocks.rows, blocks.gates, blocks.documents, blocks.state]
    return blocks.call(form.forward, f"{form.name}_forward", inputs, outputs, interpret)(
        *given, documents, state.astype(jnp.float32)
    )


def _backward(form: Form, chunk: int, save: bool, interpret: Any, residuals: Any, gradients: Any) -> Any:
    *arrays, state, segment, kept = residuals
    d_out, d_last = gradients
    query, log_decay = arrays[0], arrays[4]
    length, groups = query.shape[2], query.shape[1]
    given, documents = _whole(chunk, arrays), documents_of(segment, chunk)
    if not kept:
        kept = _launch(form, given, state, documents, chunk, True, interpret)[2:]
    q, _, v, b, g = given
    blocks = _Blocks(q, v, b, g, chunk, backward=True)
    inputs = [blocks.shared, blocks.shared, blocks.values, blocks.rows, blocks.gates, blocks.documents]
    inputs += [*(spec for spec, _ in blocks.kept()), blocks.values, blocks.state]
    keys = (blocks.keys, blocks.shape(q.shape[2], blocks.key_size))
    outputs = [keys, keys, (blocks.values, jax.ShapeDtypeStruct(v.shape, v.dtype))]
    outputs += [(blocks.rows, blocks.shape(*b.shape[2:])), (blocks.gates, blocks.shape(*g.shape[2:]))]
    outputs += [(blocks.state, blocks.shape(blocks.key_size, blocks.value_size))]
    launch = blocks.call(form.backward, f"{form.name}_backward", inputs, outputs, interpret)
    dq, dk, dv, d_beta, dg, d_state = launch(
        *given, documents, *kept, *whole_chunks(chunk, d_out, axis=2), d_last.astype(jnp.float32)
    )
    over_heads = lambda x: jnp.sum(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), axis=2)
    dg = dg[:, :, 0] if log_decay.ndim == 3 else dg
    found = (over_heads(dq), over_heads(dk), dv, d_beta[:, :, 0], dg)
    cut = (x[:, :, :length].astype(like.dtype) for x, like in zip(found, arrays, strict=True))
    return (*cut, d_state.astype(state.dtype), None)


run.defvjp(_forward, _backward)
