"""A language model with a PSM: aligned batches, training, generation."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from seqmodels.data import make_loader
from seqmodels.generate import capacity_of, generate
from seqmodels.mixers import AttentionConfig, PrefixScan
from seqmodels.train import language_model_loss, train
from tests.train.tiny import BATCH, LENGTH, texts, tiny_config, tiny_model

CHUNK = 4
ATTEND = (((AttentionConfig(heads=2, kv_heads=1),), 1),)
SCAN = PrefixScan(lambda left, right: 0.5 * (left + right), ATTEND, CHUNK)


def test_a_model_trains_on_documents_aligned_to_its_chunks() -> None:
    model = tiny_model(SCAN)
    assert model.config.alignment == CHUNK
    loader = lambda align: make_loader(texts(), batch_size=BATCH, length=LENGTH, seed=0, align=align)
    result = train(model, loader(model.config.alignment), tiny_config(steps=12), quiet=True)
    losses = [row["loss"] for row in result.rows]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.85 * losses[0]
    # a loader that does not align is named as such, and under a loss of one's own it is not silently wrong either
    with pytest.raises(ValueError, match=rf"starts at multiples of {CHUNK}: make_loader\(..., align={CHUNK}\)"):
        train(model, loader(1), tiny_config(steps=12), quiet=True)
    own = lambda model, batch, key: language_model_loss(model, batch, key)
    with pytest.raises(FloatingPointError, match="loss"):
        train(model, loader(1), tiny_config(steps=12), loss=own, quiet=True)


def test_generation_equals_a_fresh_pass_and_minds_the_levels() -> None:
    """Prompts of unlike lengths, then on from a state at any place of a chunk; beyond the levels it says so."""
    model, steps = tiny_model(SCAN), 5
    prompts = [[5, 6, 7], [8], [1, 2, 3, 4, 5, 6]]
    result = generate(model, prompts, steps, temperature=0)
    more = generate(model, [[9], [], [10, 11]], steps, temperature=0, state=result.state)
    rows = np.zeros((3, 20), np.int32)
    texts = [
        [*prompt, *first, *new, *then]
        for prompt, first, new, then in zip(prompts, result.tokens, [[9], [], [10, 11]], more.tokens, strict=True)
    ]
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    likeliest = np.asarray(jax.jit(lambda tokens: model(tokens)[0])(rows)).argmax(-1)
    for row, (text, prompt, new) in enumerate(zip(texts, prompts, [[9], [], [10, 11]], strict=True)):
        for first in (len(prompt), len(prompt) + steps + len(new)):
            np.testing.assert_array_equal(likeliest[row, first - 1 : first + steps - 1], text[first : first + steps])
    room = capacity_of(model, result.state.model)
    assert room == 31  # three levels: seven chunks closed, the eighth begun
    with pytest.raises(ValueError, match="hold 31 tokens, but"):
        generate(model, [[], [], []], 28, temperature=0, state=result.state)
