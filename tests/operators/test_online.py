"""RTRL of the LRU equals backpropagation through the whole sequence, and its memory does not grow with time."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqmodels import params
from seqmodels.mixers import LRUConfig
from seqmodels.operators.online import empty_traces, online_step
from seqmodels.typing import Context, Segments

BATCH, LENGTH, WIDTH, SIZE = 3, 12, 4, 5
# float64 sums in another order.
EXACT = 1e-11


def _layer() -> tuple[Any, Any]:
    definition, arrays = params.split(LRUConfig(state_size=SIZE).make(WIDTH, layer=0, depth=1, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    move = lambda leaf: np.asarray(leaf, np.float64) + 0.1 * random.standard_normal(leaf.shape)
    return definition, jax.tree.map(move, arrays)


def _losses(y: Any, target: Any) -> Any:
    return jnp.sum(jnp.sin(y - target) + jnp.square(y), axis=-1)


def _streamed(definition: Any, arrays: Any, x: Any, target: Any, segments: Segments, traces: Any) -> Any:
    """The sums of losses and gradients over time, a token at a time."""

    def body(carry: Any, token: Any) -> Any:
        total, gradient, traces = carry
        x, target, start, valid = token
        layer = lambda arrays: params.merge(definition, arrays)
        readout = lambda arrays, hidden, x: _losses(layer(arrays).read(hidden, x), target)
        unit = lambda arrays: layer(arrays).unit()
        loss, slope, traces = online_step(unit, readout, arrays, traces, x, reset=start, valid=valid)
        return (total + loss, jax.tree.map(jnp.add, gradient, slope), traces), None

    begin = jnp.zeros((), x.dtype), jax.tree.map(jnp.zeros_like, arrays), traces
    tokens = jax.tree.map(lambda leaf: jnp.moveaxis(jnp.asarray(leaf), 1, 0), (x, target, *segments))
    return jax.lax.scan(body, begin, tokens)[0]


def test_traces_give_the_gradient_of_backpropagation(x64: None) -> None:
    """To every parameter, over resets and padding, from the same parameters; the state is that of the scan."""
    definition, arrays = _layer()
    random = np.random.default_rng(1)
    x, target = random.standard_normal((2, BATCH, LENGTH, WIDTH))
    start, valid = np.zeros((BATCH, LENGTH), bool), np.ones((BATCH, LENGTH), bool)
    start[0, [0, 5, 6]], start[1, 7], valid[1, 4:7], valid[2, 9:] = True, True, False, False
    segments = Segments(start, valid)
    context = Context(Segments(jnp.asarray(start), jnp.asarray(valid)), jnp.zeros((BATCH, LENGTH), int))

    def loss(arrays: Any) -> Any:
        y, state = params.merge(definition, arrays)(jnp.asarray(x), None, context)
        return jnp.sum(jnp.where(valid, _losses(y, target), 0)), state

    (expected, state), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    traces = empty_traces(BATCH, WIDTH, SIZE, jnp.complex128)
    poisoned = np.where(valid[..., None], x, np.nan)
    total, streamed, traces = jax.jit(_streamed, static_argnums=0)(
        definition, arrays, poisoned, target, segments, traces
    )
    chex.assert_trees_all_close(total, expected, rtol=EXACT)
    chex.assert_trees_all_close(streamed, gradient, rtol=EXACT, atol=EXACT)
    chex.assert_trees_all_close(traces.hidden, state.hidden, rtol=EXACT, atol=EXACT)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradient))


def test_memory_does_not_grow_with_time() -> None:
    definition, arrays = _layer()
    arrays = jax.tree.map(np.float32, arrays)

    def scratch(length: int) -> int:
        x = np.zeros((BATCH, length, WIDTH), np.float32)
        segments = Segments.whole(BATCH, length, fresh=True)
        run = jax.jit(lambda arrays, x, segments: _streamed(definition, arrays, x, x, segments, traces))
        traces = empty_traces(BATCH, WIDTH, SIZE)
        # the inputs are laid out with time in front, once
        return run.lower(arrays, x, segments).compile().memory_analysis().temp_size_in_bytes - 2 * x.nbytes

    assert scratch(2048) < scratch(256) + 2048 * BATCH * 4
