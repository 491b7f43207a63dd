"""The language model as a whole: a hybrid of every mixer, its documents, states, head and errors."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqmodels import params
from seqmodels.layers import Block, MLPConfig, NormConfig
from seqmodels.mixers import ELAPSED, AttentionConfig, Mamba2Config, RGLRUConfig, S5Config
from seqmodels.models import LanguageModel, LMState, ModelConfig
from seqmodels.typing import Context, Segments

VOCAB, WIDTH, LENGTH = 19, 16, 12
# float32 through four layers, with sums in another order.
ROUNDING = 2e-5

A = AttentionConfig(heads=2, kv_heads=1)
W = AttentionConfig(heads=2, window=3)
W1 = AttentionConfig(heads=2, window=1)
R = RGLRUConfig(blocks=2)
S = Mamba2Config(head_size=8, state_size=4)
MLP = MLPConfig(expansion=2)
HYBRID = (((R, W), 2), ((Block(S, MLP), A), 1))


def make(layers: Any = HYBRID, **options: Any) -> LanguageModel:
    return ModelConfig(VOCAB, WIDTH, layers, **options).make(rngs=nnx.Rngs(0))


def random_tokens(seed: int = 0, batch: int = 2, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length))


@pytest.fixture(scope="module")
def hybrid() -> Any:
    """The hybrid model as one compiled function of (tokens, state, segments), and the module."""
    model = make(learned_positions=LENGTH)
    definition, arrays = params.split(model)
    run = jax.jit(lambda *inputs: params.merge(definition, arrays)(*inputs))
    return run, model


def test_prefill_then_steps_equal_one_call_and_compile_once_each(hybrid: Any) -> None:
    run, model = hybrid
    tokens = random_tokens()
    whole, after = run(tokens, None, None)
    state = model.init_state(2, LENGTH)
    logits, state = run(tokens[:, :5], state, None)
    pieces = [logits]
    before = run._cache_size()
    for t in range(5, LENGTH):
        logits, state = run(tokens[:, t : t + 1], state, None)
        pieces.append(logits)
    assert run._cache_size() == before + 1
    chex.assert_trees_all_close(jnp.concatenate(pieces, 1), whole, rtol=ROUNDING, atol=ROUNDING)
    chex.assert_trees_all_close(state, after, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_array_equal(state.position, [LENGTH, LENGTH])


def test_packed_and_padded_documents_equal_separate_ones(hybrid: Any) -> None:
    run, _ = hybrid
    tokens = random_tokens(1)
    start, valid = np.zeros((2, LENGTH), bool), np.ones((2, LENGTH), bool)
    spans = [(0, 0, 1), (0, 1, 8), (0, 8, 12), (1, 2, 9)]
    for row, begin, _ in spans:
        start[row, begin] = True
    valid[1] = np.isin(np.arange(LENGTH), np.arange(2, 9))
    tokens = np.where(valid, tokens, [[-1] * 6 + [10**6] * 6])  # padding holds anything
    logits, state = run(tokens, None, Segments(start, valid))
    chex.assert_tree_all_finite(logits)
    np.testing.assert_array_equal(state.position, [4, 7])
    for row, begin, end in spans:
        padded = np.zeros((2, LENGTH), int)
        padded[row, : end - begin] = tokens[row, begin:end]
        alone = Segments(np.arange(LENGTH)[None].repeat(2, 0) == 0, np.arange(LENGTH)[None].repeat(2, 0) < end - begin)
        expected, _ = run(padded, None, alone)
        chex.assert_trees_all_close(logits[row, begin:end], expected[row, : end - begin], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize(
    ("pattern", "carries"),
    [((R, S), True), *(pytest.param(*x, marks=pytest.mark.slow) for x in [((W, W1), True), ((A,), False)])],
)
def test_time_sharded_over_devices_equals_one_device(pattern: Any, carries: bool) -> None:
    """Fresh, without segments, and from a carried state (not a full cache, which has no room)."""
    model = make(((pattern, 1),), learned_positions=48)
    tokens = random_tokens(2, length=24)
    mesh = jax.make_mesh((8,), ("time",), axis_types=(AxisType.Auto,))
    definition, arrays = params.split(model)

    def run(arrays: Any, tokens: Any, state: Any, axis: str | None) -> Any:
        model = params.merge(definition, arrays).on_mesh(sequence_axis=axis)
        hidden, state, _ = model.forward(tokens, state)
        return hidden, state

    along = P(None, "time")
    sharded = jax.shard_map(
        lambda *inputs: run(*inputs, "time"), mesh=mesh, in_specs=(P(), along, P()), out_specs=(along, P())
    )
    state = run(arrays, tokens, None, None)[1]
    for given in (None, state) if carries else (None,):
        found, expected = jax.jit(sharded)(arrays, tokens, given), run(arrays, tokens, given, None)
        chex.assert_trees_all_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


def test_logits_from_embedding_or_head() -> None:
    tokens = random_tokens()
    for options in ({}, {"tied": False}, {"logits_cap": 0.5}, {"embed_scale": True}, {"embed_scale": 1.5}):
        model = make((((MLP,), 1),), **options)
        weight = model.head.kernel[...] if "tied" in options else model.embedding[...].T
        aux = model.forward(tokens)[2]
        x = model.embedding[...][tokens] * {True: WIDTH**0.5, 1.5: 1.5, False: 1}[options.get("embed_scale", False)]
        (step,) = model.stack.groups[0].steps
        rms = lambda x: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        gate, up, down = (getattr(step.layer, name).kernel[...][0] for name in ("gate", "up", "down"))
        x = x + (jax.nn.gelu(rms(x) @ gate) * (rms(x) @ up)) @ down
        expected = rms(x) @ weight
        expected = 0.5 * jnp.tanh(expected / 0.5) if "logits_cap" in options else expected
        chex.assert_trees_all_close(model(tokens)[0], expected, rtol=ROUNDING, atol=ROUNDING)
        assert aux == {}


def test_bfloat16_activations_over_float32_parameters(hybrid: Any) -> None:
    run, _ = hybrid
    tokens = random_tokens()
    model = make(dtype="bfloat16", learned_positions=LENGTH)
    for dtype in (leaf.dtype for leaf in jax.tree.leaves(params.split(model)[1])):
        assert dtype == jnp.float32
    hidden, state, _ = model.forward(tokens)
    logits = model.logits(hidden)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    expected, _ = run(tokens, None, None)
    # Eight bits a number give 0.05 a layer at worst, where logits have size 1; a wrong layer moves most of them by 1.
    error = np.abs(logits - expected)
    assert np.quantile(error, 0.9) < 0.08
    assert np.quantile(error, 0.99) < 0.2
    recurrent = [leaf for leaf in jax.tree.leaves(state.layers[0][0]) if leaf.dtype != jnp.int32]
    assert {leaf.dtype.name for leaf in recurrent} == {"float32"}


def test_a_cache_has_the_type_that_was_asked_for() -> None:
    model = make((((A,), 1),), dtype="bfloat16")
    for dtype, expected in ((None, "bfloat16"), (jnp.float32, "float32")):
        state = model.init_state(2, LENGTH, dtype)
        _, after = model(random_tokens(length=3), state)
        assert after.layers[0][0].key.dtype.name == state.layers[0][0].key.dtype.name == expected


def test_learned_positions_count_from_each_document_and_end_loudly() -> None:
    model = make((((MLP,), 1),), learned_positions=4)
    tokens = random_tokens(length=7)
    start = np.zeros((2, 7), bool)
    start[:, [0, 2]] = True
    logits = model(tokens, None, Segments(start, np.ones((2, 7), bool)))[0]
    # a model without them, whose embedding is that of the token and its place
    definition = params.split(make((((MLP,), 1),)))[0]
    others = {name: arrays for name, arrays in params.split(model)[1].items() if name != "position_embedding"}
    places = np.array([0, 1, 0, 1, 2, 3, 4])
    for t in (0, 1, 2, 5):
        moved = model.embedding[...] + model.position_embedding[...][None, places[t]]
        plain = params.merge(definition, others | {"embedding": moved})
        expected = model.logits(plain.forward(tokens[:, [t]])[0])
        chex.assert_trees_all_close(logits[:, t], expected[:, 0], rtol=ROUNDING, atol=ROUNDING)
    assert np.isnan(logits[:, 6]).all()


def test_a_token_outside_the_vocabulary_is_loud() -> None:
    tokens = random_tokens()
    tokens[0, 5] = VOCAB
    logits = make((((MLP,), 1),))(tokens)[0]
    np.testing.assert_array_equal(np.isnan(logits).any(-1), tokens == VOCAB)


def test_initial_loss_is_that_of_a_uniform_guess(hybrid: Any) -> None:
    run, _ = hybrid
    tokens = random_tokens(3, batch=2)
    logp = jax.nn.log_softmax(run(tokens, None, None)[0])
    loss = -np.mean(np.take_along_axis(np.asarray(logp)[:, :-1], tokens[:, 1:, None], 2))
    assert abs(loss - np.log(VOCAB)) < 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, not 0"),
        ({"dtype": "float16"}, "'float16' is not one of"),
        ({"layers": ()}, "holds no group"),
        ({"learned_positions": 0}, "learned_positions must be at least 1, or None"),
    ],
)
def test_errors_of_the_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**({"vocab_size": VOCAB, "width": WIDTH, "layers": HYBRID} | change))


def test_errors_of_a_call() -> None:
    model = make((((R, A), 1),))
    with pytest.raises(ValueError, match=r"shape \[batch, time\], not int.* of \(12,\)"):
        model(random_tokens()[0])
    with pytest.raises(ValueError, match="not float32"):
        model(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="no time step"):
        model(np.zeros((2, 0), int))
    with pytest.raises(ValueError, match=r"\(2, 5\).* do not describe tokens of shape \(2, 12\)"):
        model(random_tokens(), None, Segments.whole(2, 5, fresh=True))
    with pytest.raises(ValueError, match=r"model.init_state\(2\)"):
        model(random_tokens(), model.init_state(3, LENGTH))
    with pytest.raises(ValueError, match="belongs to another model"):
        model(random_tokens(), make((((R,), 1),)).init_state(2))
    with pytest.raises(ValueError, match="give init_state a capacity"):
        model.init_state(2)
    with pytest.raises(TypeError, match="channel must be a ChannelConfig"):
        ModelConfig(VOCAB, WIDTH, HYBRID, channel=R)
    assert isinstance(model.init_state(2, 3), LMState)


def test_equal_documents_leave_equal_states(hybrid: Any) -> None:
    """Whatever a row carried before a start, NaN included, leaves no trace."""
    run, model = hybrid
    tokens = random_tokens(4)
    fresh = Segments.whole(2, LENGTH, fresh=True)
    spoil = lambda leaf: jnp.full_like(leaf, jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf + 3
    _, expected = run(tokens, model.init_state(2, LENGTH), fresh)
    logits, state = run(tokens, jax.tree.map(spoil, model.init_state(2, LENGTH)), fresh)
    chex.assert_tree_all_finite(logits)
    chex.assert_trees_all_equal(state, expected)


def test_attention_that_looks_ahead_is_no_part_of_a_language_model() -> None:
    with pytest.raises(ValueError, match=r"through AttentionConfig\(.*causal=False.*set causal=True"):
        make((((AttentionConfig(heads=4, causal=False),), 1),))


def test_what_layers_share_is_given_with_the_tokens() -> None:
    """Gaps between samples reach the S5 of every layer: a gap of zero stands still, but for what comes in."""
    model = make((((S5Config(state_size=8), MLP), 2),))
    tokens = random_tokens()
    gaps = np.ones(tokens.shape, np.float32)
    run = jax.jit(lambda gaps: model.forward(tokens, shared={ELAPSED: gaps})[0])
    plain = jax.jit(lambda: model.forward(tokens)[0])()
    chex.assert_trees_all_close(run(gaps), plain, rtol=ROUNDING, atol=ROUNDING)
    gaps[:, 4] = 3.0
    moved = np.abs(np.asarray(run(gaps) - plain)).max(axis=(0, 2))
    assert moved[:4].max() < ROUNDING < moved[4:].min()
    (period,) = model.stack.groups
    by_hand, shared = model.embedding[...][tokens], {ELAPSED: gaps}
    for repeat in range(2):
        definition, arrays = params.split(period)
        steps = params.merge(definition, jax.tree.map(lambda a, repeat=repeat: a[repeat], arrays)).steps
        mixer, mlp = steps[0], steps[1]
        context = Context.whole(*tokens.shape).replace(shared=shared)
        by_hand = by_hand + mixer.layer(mixer.norm(by_hand), None, context)[0]
        by_hand = by_hand + mlp.layer(mlp.norm(by_hand), None, context)[0]
    chex.assert_trees_all_close(model.norm(by_hand), run(gaps), rtol=ROUNDING, atol=ROUNDING)


def test_norms_of_the_config_stand_before_every_layer_after_the_embedding_and_before_the_head() -> None:
    """One layer by hand: the norm that is asked for, with its eps, in all three places."""
    model = make((((MLP,), 1),), norm=NormConfig("layer", eps=1e-2), embedding_norm=True, tied=False)
    tokens = random_tokens()
    (step,) = params.split(model.stack.groups[0])[1]["steps"].values()
    assert set(step["norm"]) == {"scale", "bias"}

    def norm(x: Any) -> Any:
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-2)

    x = norm(model.embedding[...][tokens])
    up, gate, down = (step["layer"][name]["kernel"][0] for name in ("up", "gate", "down"))
    inner = norm(x)
    x = x + (jax.nn.gelu(inner @ gate) * (inner @ up)) @ down
    expected = norm(x) @ model.head.kernel[...]
    chex.assert_trees_all_close(model(tokens)[0], expected, rtol=ROUNDING, atol=ROUNDING)
