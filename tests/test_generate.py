"""Generation: the tokens a model would choose one at a time from the whole text, whatever the way they are made."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import params
from seqmodels.generate import _programs, capacity_of, generate, stream
from seqmodels.sampling import restrict
from tests.train.tiny import FULL, LOCAL, RECURRENT, tiny_model

KEY = jax.random.key(0)
PROMPTS = [[5, 6, 7], [8], [1, 2, 3, 4, 5, 6]]
STEPS = 10


@pytest.fixture(scope="module")
def model():
    return tiny_model(FULL, LOCAL, RECURRENT, logits_cap=5.0)


@pytest.fixture(scope="module")
def greedy(model) -> np.ndarray:
    """The likeliest tokens, each from a fresh pass over everything before it."""
    width = max(map(len, PROMPTS)) + STEPS
    logits = jax.jit(lambda tokens: model(tokens)[0])
    rows = np.zeros((len(PROMPTS), width), np.int32)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    at = np.array([len(prompt) for prompt in PROMPTS])
    numbers = np.arange(len(PROMPTS))
    for _ in range(STEPS):
        rows[numbers, at] = np.asarray(logits(rows)).argmax(-1)[numbers, at - 1]
        at += 1
    return np.stack([row[len(prompt) : len(prompt) + STEPS] for row, prompt in zip(rows, PROMPTS, strict=True)])


def test_greedy_tokens_are_those_of_the_whole_text(model, greedy):
    assert len(set(greedy.ravel().tolist())) > 4  # a model that repeats itself could not show a mistake
    np.testing.assert_array_equal(generate(model, PROMPTS, STEPS, temperature=0).tokens, greedy)


def test_prompts_as_a_padded_array(model, greedy):
    padded, valid = np.full((3, 8), 99), np.zeros((3, 8), bool)
    for row, prompt in enumerate(PROMPTS):
        padded[row, : len(prompt)], valid[row, : len(prompt)] = prompt, True
    np.testing.assert_array_equal(generate(model, padded, STEPS, temperature=0, valid=valid).tokens, greedy)
    with pytest.raises(ValueError, match="padded on the right"):
        generate(model, padded, STEPS, temperature=0, valid=valid[:, ::-1])


def test_a_stream_hands_out_the_same_and_its_state_goes_on_and_can_be_forked(model, greedy):
    tokens = stream(model, PROMPTS, STEPS, temperature=0)
    first = [next(tokens) for _ in range(4)]
    state = tokens.state
    rest = list(tokens)
    np.testing.assert_array_equal(np.stack(first + rest, 1), greedy)
    for _ in range(2):  # the state may be used again
        more = generate(model, [[], [], []], STEPS - 4, temperature=0, state=state)
        np.testing.assert_array_equal(more.tokens, greedy[:, 4:])


def test_a_conversation_goes_on_from_its_state(model):
    first = generate(model, PROMPTS, 3, temperature=0, capacity=64)
    said = [prompt + reply.tolist() for prompt, reply in zip(PROMPTS, first.tokens, strict=True)]
    turns = [[11, 12], [], [13, 14, 15]]
    second = generate(model, turns, 5, temperature=0, state=first.state)
    whole = generate(model, [a + b for a, b in zip(said, turns, strict=True)], 5, temperature=0, capacity=64)
    np.testing.assert_array_equal(second.tokens, whole.tokens)


def test_a_row_that_said_stop_stays_there(model, greedy):
    stop = int(greedy[0][3])
    result = generate(model, PROMPTS, STEPS, temperature=0, stop=stop)
    for found, row, position, prompt in zip(result.tokens, greedy, result.state.model.position, PROMPTS, strict=True):
        said = row.tolist().index(stop) + 1 if stop in row else STEPS
        np.testing.assert_array_equal(found[:said], row[:said])
        assert (found[said:] == stop).all()
        assert position == len(prompt) + said
    np.testing.assert_array_equal(
        np.stack(list(stream(model, PROMPTS, STEPS, temperature=0, stop=stop)), 1), result.tokens
    )
    alone = generate(model, PROMPTS[:1], STEPS, temperature=0, stop=stop)
    assert alone.tokens.shape == (1, greedy[0].tolist().index(stop) + 1)


def test_capacity_is_checked_beforehand(model):
    with pytest.raises(ValueError, match=r"hold 12 tokens, but 16 are needed \(0 so far, 6 of the prompt, 10 steps\)"):
        generate(model, PROMPTS, STEPS, temperature=0, capacity=12)
    result = generate(model, PROMPTS, STEPS, temperature=0, capacity=20)
    assert capacity_of(model, result.state.model) == 20
    with pytest.raises(ValueError, match=r"hold 20 tokens, but 21 are needed \(16 so far, 0 of the prompt, 5 steps\)"):
        generate(model, [[], [], []], 5, temperature=0, state=result.state)
    # the first row has room still, and so have models of constant state
    assert np.isfinite(generate(model, [[], [], []], 4, temperature=0, state=result.state).state.logits).all()
    assert capacity_of(tiny_model(), generate(tiny_model(), PROMPTS, 1, temperature=0).state.model) is None


def test_nothing_is_compiled_for_other_lengths_steps_or_settings(model):
    programs = _programs(params.split(model)[0])
    call = lambda prompt, steps, **settings: generate(model, [prompt], steps, key=KEY, capacity=64, **settings)
    call([1, 2, 3], 4)
    call([1, 2, 3], 4, top_k=3)
    sizes = [program._cache_size() for program in programs]
    call([1] * 16, 9, temperature=0.3)
    call([1] * 7, 2, top_k=5, top_p=0.5)
    assert [program._cache_size() for program in programs] == sizes


@pytest.mark.parametrize("top_k", [1, 3, 20])
@pytest.mark.parametrize("top_p", [0.1, 0.55, 0.999, 1.0])
def test_top_k_and_top_p_keep_what_numpy_keeps(top_k, top_p):
    random = np.random.default_rng(top_k)
    logits = random.normal(size=(6, 20)).astype(np.float32)
    logits[0] = 0.0  # all equal: the first ones stay
    logits[1, :5] = -np.inf
    found = np.asarray(restrict(jnp.asarray(logits), top_k=top_k, top_p=top_p))
    for row, values in zip(found, logits.astype(np.float64), strict=True):
        order = sorted(range(20), key=lambda token: (-values[token], token))[:top_k]
        weights = np.exp(values[order] - values[order[0]])
        mass = np.cumsum(weights / weights.sum())
        kept = order[: 1 + int(np.searchsorted(mass, top_p - 1e-6))] if top_p < 1 else order
        expected = np.full(20, -np.inf)
        expected[kept] = values[kept]
        np.testing.assert_array_equal(row, expected)


def test_samples_follow_the_restricted_distribution(model):
    rows, temperature, top_k = 4000, 0.5, 4
    logits = np.asarray(model(jnp.array([[5, 6]]))[0][0, -1], np.float64) / temperature
    likeliest = np.argsort(-logits)[:top_k]
    expected = np.exp(logits[likeliest] - logits[likeliest[0]])
    expected *= rows / expected.sum()
    tokens = generate(model, np.tile([5, 6], (rows, 1)), 1, key=KEY, temperature=temperature, top_k=top_k).tokens[:, 0]
    counts = np.array([(tokens == token).sum() for token in likeliest])
    assert counts.sum() == rows
    # chi-square with 3 degrees of freedom: 21.1 is exceeded once in ten thousand keys
    assert ((counts - expected) ** 2 / expected).sum() < 21.1


def test_the_key_decides(model):
    draw = lambda seed: generate(model, PROMPTS, STEPS, key=jax.random.key(seed)).tokens.tolist()
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert len(set(draw(1)[0])) > 4  # each step draws anew


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"key": None}, "needs a key"),
        ({"prompt": [[1], []]}, "lengths are"),
        ({"prompt": []}, "non-empty list"),
        ({"prompt": np.zeros((2, 3))}, "float64"),
        ({"prompt": [[1, 257]]}, "vocabulary in"),
    ],
)
def test_wrong_arguments_are_named(model, change, message):
    arguments = {"prompt": [[1, 2]], "steps": 2, "key": KEY, **change}
    with pytest.raises(ValueError, match=message):
        generate(model, arguments.pop("prompt"), arguments.pop("steps"), **arguments)


def test_tokens_are_not_sampled_from_nan(model):
    """One row's state is damaged: that row is named, and nothing is handed out from it."""
    _, state = generate(model, PROMPTS, 2, temperature=0, capacity=64)
    poisoned = state._replace(model=jax.tree.map(lambda a: _poison(a, row=1), state.model))
    rest = [[], [], []]
    with pytest.raises(FloatingPointError, match=r"rows \[1\] are NaN from new token 2 on.*newton"):
        generate(model, rest, 3, temperature=0, state=poisoned)
    tokens = stream(model, rest, 3, key=KEY, state=poisoned)
    next(tokens)
    with pytest.raises(FloatingPointError, match=r"rows \[1\] are NaN from new token 2 on"):
        next(tokens)


def _poison(leaf: jax.Array, row: int) -> jax.Array:
    """NaN in one row of a leaf: the batch is the second axis of the layers' states, behind their repeats."""
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return leaf.at[:, row].set(jnp.nan) if inexact else leaf
