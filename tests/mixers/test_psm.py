"""What is a PSM's own: its parenthesisation, static tree against counter, alignment, levels, and what it refuses."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from seqmodels import params
from seqmodels.mixers import AttentionConfig, Mamba2Config, PrefixScan
from seqmodels.scan import tree_prefixes
from seqmodels.scan.tree import prefix
from seqmodels.typing import Context, Segments
from tests.mixers.properties import float64, layout

WIDTH, CHUNK = 8, 2
ATTEND = (((AttentionConfig(heads=2),), 1),)
MODULUS = 1009  # 48 * 1009 is exact in float32
# float64 in another order of summation, through a few hundred terms.
EXACT = 1e-11


def mix(left: Any, right: Any) -> Any:
    """Neither associative nor commutative, and exact in floats."""
    return (left * 31 + right * 17 + 1) % MODULUS


class Made:
    """A PSM, its parameters, and one compiled function of them."""

    def __init__(self, **fields: Any) -> None:
        config = PrefixScan(**{"aggregator": ATTEND, "inference": ATTEND, "chunk": CHUNK, **fields})
        self.mixer = config.make(WIDTH, layer=0, depth=1, rngs=nnx.Rngs(0))
        self.definition, self.params = params.split(self.mixer)
        self.run = jax.jit(self.__call__)

    def __call__(self, arrays: Any, x: Any, state: Any, segments: Segments) -> Any:
        return params.merge(self.definition, arrays)(x, state, Context(segments, segments.positions()[0]))


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, length, WIDTH)).astype(np.float32)


def test_prefixes_have_the_published_parenthesisation() -> None:
    """After n chunks and one token the prefix is that of `tree_prefixes`, exactly, by tree and by counter."""
    made, chunks = Made(aggregator=mix), 9
    items = np.random.default_rng(0).integers(0, MODULUS, (chunks, CHUNK, WIDTH)).astype(np.float32)
    expected = tree_prefixes(mix, list(items))
    x = np.broadcast_to(items.reshape(1, -1, WIDTH), (chunks, chunks * CHUNK, WIDTH))
    at, rows = np.arange(chunks * CHUNK)[None], np.arange(chunks)[:, None]
    segments = Segments((at == 0) & (rows >= 0), at <= rows * CHUNK)  # row n: n chunks and one token
    states = []
    for state in (None, made.mixer.init_state(chunks)):
        _, after = made.run(made.params, x, state, segments)
        found, present = jax.vmap(prefix)(after.counter)
        np.testing.assert_array_equal(after.counter.size, np.arange(chunks))
        np.testing.assert_array_equal(present, np.arange(chunks) > 0)
        for n in range(1, chunks):
            np.testing.assert_array_equal(found[n], expected[n])
        np.testing.assert_array_equal(after.chunk[:, 0], items[:, 0])
        states.append(after)
    chex.assert_trees_all_equal(states[0].counter, states[1].counter)


ALIGNED = layout(
    "+-----------------",
    "+--.+-..+---+--...",
    "..+------.........",
)


@pytest.mark.slow
def test_static_tree_and_counter_agree(x64: None) -> None:
    """Outputs, the whole state, and gradients to parameters and tokens, with NaN in the padding."""
    made = Made()
    random = np.random.default_rng(1)
    arrays, x, fresh = float64((made.params, tokens(3, 18), made.mixer.init_state(3)))
    arrays = jax.tree.map(lambda leaf: leaf + 0.1 * random.standard_normal(leaf.shape), arrays)
    weights = random.standard_normal((19, *x.shape))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(arrays: Any, x: Any, state: Any) -> Any:
        y, after = made(arrays, jnp.where(ALIGNED.valid[..., None], x, jnp.nan), state, ALIGNED)
        inexact = [leaf for leaf in jax.tree.leaves(after) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        return jnp.sum(y * weights[0]) + sum(jnp.sum(jnp.sin(leaf)) for leaf in inexact), (y, after)

    static, streamed = loss(arrays, x, None), loss(arrays, x, fresh)
    chex.assert_tree_all_finite(static)
    chex.assert_trees_all_close(static, streamed, rtol=EXACT, atol=EXACT)


@pytest.mark.slow
def test_a_fresh_state_takes_the_tree_and_any_other_the_counter() -> None:
    """A long call from given states: rows that start here, aligned or not, a row that goes on, an empty one."""
    made, x = Made(), tokens(3, 36)
    start = np.zeros((3, 36), bool)
    start[:, 0] = start[1, 10] = True
    aligned = Segments(start, np.ones((3, 36), bool))
    aligned.valid[2] = aligned.start[2] = False
    moved = Segments(start.copy(), aligned.valid)
    moved.start[1, 10:12] = False, True
    fresh = made.mixer.init_state(3)
    _, warm = made.run(made.params, x[:, :3], fresh, layout("---", "---", "---"))

    @jax.jit
    def by_tokens(x: Any, state: Any, segments: Segments) -> Any:
        def body(state: Any, token: Any) -> Any:
            y, state = made(made.params, *jax.tree.map(lambda leaf: leaf[:, None], token[:1]), state, token[1])
            return state, y[:, 0]

        over_time = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), (x, segments))
        wide = (over_time[0], jax.tree.map(lambda leaf: leaf[:, :, None], over_time[1]))
        state, y = lax.scan(body, state, wide)
        return jnp.moveaxis(y, 0, 1), state

    goes_on = Segments(aligned.start & (np.arange(3) != 0)[:, None], aligned.valid)
    for state, segments in ((warm, aligned), (fresh, aligned), (warm, goes_on), (fresh, moved)):
        found = made.run(made.params, x, state, segments)
        chex.assert_trees_all_close(found, by_tokens(x, state, segments), rtol=1e-5, atol=1e-5)
    static = made.run(made.params, x, None, aligned)
    chex.assert_trees_all_close(static[0], made.run(made.params, x, warm, aligned)[0], rtol=1e-5, atol=1e-5)


def test_a_start_inside_a_chunk_answers_with_nan() -> None:
    """Without a state: that row alone, and its state too, until another document starts."""
    made, x = Made(aggregator=mix), tokens(2, 18)
    y, after = made.run(made.params, x, None, layout("+----+------------", "+-----------+-----"))
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()
    one = x[:, :1]
    assert np.isnan(made.run(made.params, one, after, layout("-", "-"))[0][0]).all()
    chex.assert_tree_all_finite(made.run(made.params, one, after, layout("+", "-")))


def test_a_counter_past_its_levels_answers_with_nan() -> None:
    """Two levels hold three chunks: the fourth has its prefix, the fifth none, by tree and by counter."""
    made, x = Made(aggregator=mix), tokens(1, 36)
    small = made.mixer.init_state(1, capacity=7)
    assert small.counter.roots.shape == (1, 2, CHUNK, WIDTH)
    assert made.mixer.init_state(1).counter.roots.shape[1] == 32
    whole = Segments.whole(1, 36, fresh=True)
    first = Segments.whole(1, 18, fresh=True)
    for y, after in (made.run(made.params, x, small, whole), made.run(made.params, x[:, :18], small, first)):
        assert np.isfinite(y[:, :8]).all()
        assert np.isnan(y[:, 8:]).all()
        following = made.run(made.params, x[:, :1], after, Segments.whole(1, 1, fresh=False))[0]
        assert np.isnan(following).all()


def test_rows_that_agree_aggregate_twice_a_chunk_at_most() -> None:
    calls = []

    def counted(left: Any, right: Any) -> Any:
        jax.debug.callback(lambda: calls.append(1))
        return mix(left, right)

    made = Made(aggregator=counted)
    state = made.mixer.init_state(2)
    bounds = []
    for piece in range(2):
        _, state = made.run(made.params, tokens(2, 32), state, Segments.whole(2, 32, fresh=piece == 0))
        jax.effects_barrier()
        bounds.append(len(calls))
    assert 31 - 5 <= bounds[1] <= 2 * 31, bounds  # 31 chunks are closed after 64 tokens
    _, apart = made.run(made.params, tokens(2, 1), state, layout("+", "-"))
    chex.assert_trees_all_equal(apart.counter.size, np.array([0, 32], np.uint32))


def test_aggregators_of_your_own() -> None:
    """A config that makes a module; a function that forgets a chunk is told so."""

    class Gate(nnx.Module):
        def __init__(self, width: int, rngs: nnx.Rngs) -> None:
            axes = ("embed",)
            self.gate = params.param(rngs, (width,), jax.nn.initializers.ones, group=params.Group.DYNAMICS, axes=axes)

        def __call__(self, left: Any, right: Any) -> Any:
            return left * self.gate[...].reshape(1, 1, -1) + right

    class GateConfig:
        def make(self, width: int, *, layer: int, depth: int, rngs: nnx.Rngs) -> Gate:
            return Gate(width, rngs)

    made = Made(aggregator=GateConfig())
    x, segments = tokens(1, 6), Segments.whole(1, 6, fresh=True)
    other = {**made.params, "aggregator": {"gate": np.full(WIDTH, 0.5, np.float32)}}
    y, moved = (made.run(arrays, x, None, segments)[0] for arrays in (made.params, other))
    different = np.any(np.asarray(y != moved), axis=(0, 2))
    np.testing.assert_array_equal(different, np.arange(6) >= 2 * CHUNK)  # from the first aggregate on
    short = Made(aggregator=lambda left, right: (left + right)[:, :1])
    with pytest.raises(ValueError, match=r"turns two elements .* into .*: keep shapes"):
        jax.eval_shape(short, short.params, x, None, segments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk": 0}, "chunk=0 vectors"),
        ({"aggregator": (((Mamba2Config(),), 1),)}, "Mamba2Config has no non-causal form: with causal_aggregator=True"),
        ({"aggregator": (((AttentionConfig(window=4),), 1),)}, "window=4 looks back only"),
        ({"inference": (((AttentionConfig(causal=False),), 1),)}, "inference must not see later tokens"),
        ({"inference": (((PrefixScan(ATTEND, ATTEND, 1),), 1),)}, "cannot be part of another one's inference"),
    ],
)
def test_a_config_that_cannot_work_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixScan(**{"aggregator": ATTEND, "inference": ATTEND, "chunk": CHUNK, **fields})


def test_non_causal_attention_has_no_state() -> None:
    mixer = AttentionConfig(heads=2, causal=False).make(WIDTH, layer=0, depth=1, rngs=nnx.Rngs(0))
    causal = AttentionConfig(heads=2).make(WIDTH, layer=0, depth=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="causal=False sees a whole document"):
        mixer.init_state(1, 4)
    with pytest.raises(ValueError, match="set causal=True to generate"):
        mixer(tokens(1, 4), causal.init_state(1, 4), Context.whole(1, 4))
