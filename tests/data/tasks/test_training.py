"""A task's stream through the train step: only what is scored is learned from."""

from __future__ import annotations

import numpy as np
from flax import nnx

from seqmodels import ModelConfig, params
from seqmodels.data.tasks import WordProblem, make_task_loader
from seqmodels.mixers import RGLRUConfig
from seqmodels.train import TrainConfig
from seqmodels.train.optimizer import make_optimizer
from seqmodels.train.step import init_state, make_step

STEPS = 40


def test_only_scored_positions_are_learned_from() -> None:
    task = WordProblem("Z3", 6, min_length=2, first_token=True)
    layers = (((RGLRUConfig(recurrent_size=16, blocks=2),), 1),)
    model = ModelConfig(task.vocab_size, 16, layers, remat=False).make(rngs=nnx.Rngs(0))
    definition, arrays = params.split(model)
    config = TrainConfig(steps=STEPS, batch_size=8, length=task.length, learning_rate=1e-2, warmup=5)
    optimizer = make_optimizer(config, params.labels(model))
    step = make_step(definition, optimizer)

    def first(batch):
        return {name: float(value) for name, value in step(init_state(arrays, optimizer, 0), batch)[1].items()}

    batches = make_task_loader(task, batch_size=8, seed=0)
    batch = next(batches)
    scored, targets = batch["scored"], batch["targets"]
    assert 0 < scored.sum() < batch["valid"].sum() < scored.size
    plain = first(batch)
    assert first({**batch, "targets": np.where(scored, targets, (targets + 1) % 3).astype(np.int32)}) == plain
    assert first({**batch, "targets": np.where(scored, (targets + 1) % 3, targets).astype(np.int32)}) != plain
    # every scored position counts alike: two halves of them, weighed by their numbers, are the whole
    early = scored & (np.arange(task.length) < 3)
    total = sum(first({**batch, "scored": half})["loss"] * half.sum() for half in (early, scored & ~early))
    np.testing.assert_allclose(total / scored.sum(), plain["loss"], rtol=1e-5)  # float32 sums in another order

    state, losses = init_state(arrays, optimizer, 0), []
    for _ in range(STEPS):
        state, metrics = step(state, next(batches))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < losses[0] - 0.2
