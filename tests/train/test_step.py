"""One step: what the loss is, and what the step does to its state."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import params
from seqmodels.params import Group
from seqmodels.train import language_model_loss, make_optimizer
from seqmodels.train.step import init_state, make_step
from tests.train.tiny import BATCH, LENGTH, loader, tiny_config, tiny_model

# a sum of some 60 float32 logarithms in another order
TOLERANCE = 1e-5
STEPS = 12


class Bigram(nnx.Module):
    """Logits of the last token alone, an auxiliary loss, and noise from the key: enough to see what a loss is given."""

    def __init__(self, vocabulary: int = 257):
        init = jax.nn.initializers.normal(1.0)
        self.table = params.param(
            nnx.Rngs(0), (vocabulary, vocabulary), init, group=Group.EMBEDDING, axes=("vocab", None)
        )

    def forward(self, tokens, state=None, segments=None, *, key=None):
        return self.table[...][tokens], state, {"balance": jnp.float32(0.5), "noise": jax.random.uniform(key)}

    def logits(self, hidden):
        return hidden


@pytest.fixture(scope="module")
def batch():
    found = next(batch for batch in loader() if not batch["valid"].all())
    assert found["valid"].shape == (BATCH, LENGTH)
    return found


def test_loss_is_the_mean_over_valid_positions_plus_auxiliary_losses(batch):
    model = Bigram()
    objective, metrics = language_model_loss(model, batch, jax.random.key(0))
    logits = np.asarray(model.table[...], np.float64)[batch["tokens"]]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(logs, batch["targets"][..., None], -1)[..., 0]
    expected = losses[batch["valid"]].mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=TOLERANCE)
    np.testing.assert_allclose(objective, expected + 0.5 + metrics["aux/noise"], rtol=TOLERANCE)


def test_padding_reaches_neither_loss_nor_gradient(batch):
    model = tiny_model()
    definition, arrays = params.split(model)
    loss = lambda arrays, batch: language_model_loss(params.merge(definition, arrays), batch, jax.random.key(0))[0]
    other = {**batch, **{name: np.where(batch["valid"], batch[name], 77) for name in ("tokens", "targets")}}
    value_and_gradient = jax.jit(jax.value_and_grad(loss))
    chex.assert_trees_all_equal(value_and_gradient(arrays, batch), value_and_gradient(arrays, other))


def test_randomness_depends_on_the_seed_and_the_number_of_the_step_alone(batch):
    definition, arrays = params.split(Bigram())
    optimizer = make_optimizer(tiny_config(), params.labels(Bigram()))
    step = make_step(definition, optimizer)

    def noises(seed: int) -> list[float]:
        state, found = init_state(arrays, optimizer, seed), []
        for _ in range(2):
            state, metrics = step(state, batch)
            found.append(float(metrics["aux/noise"]))
        return found

    assert noises(0) == noises(0)
    assert len({*noises(0), *noises(1)}) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_lower_the_loss_in_float32_parameters_and_donate_their_state(batch, dtype):
    model = tiny_model(dtype=dtype)
    definition, arrays = params.split(model)
    optimizer = make_optimizer(tiny_config(learning_rate=1e-2), params.labels(model))
    step = make_step(definition, optimizer)
    state, losses = init_state(arrays, optimizer, 0), []
    for _ in range(STEPS):
        before = jax.tree.leaves(state["params"])[0]
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    assert before.is_deleted()
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32
    assert int(state["step"]) == STEPS
    assert step._cache_size() == 1
    jax.block_until_ready(arrays)  # the model's own arrays are not donated
