"""The optimiser against AdamW written out in numpy."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from seqmodels.params import Group
from seqmodels.train import TrainConfig, make_optimizer
from seqmodels.train.optimizer import schedule

CONFIG = TrainConfig(
    steps=10,
    learning_rate=0.1,
    warmup=3,
    final_fraction=0.2,
    weight_decay=0.5,
    clip=1.0,
    betas=(0.8, 0.9),
    dynamics_rate=0.25,
)
DECAYED = {"matrix", "embedding"}
# float32 against float64 over a few updates
TOLERANCE = 1e-5


def rate(count: int) -> float:
    if count < CONFIG.warmup:
        first = CONFIG.learning_rate / (CONFIG.warmup + 1)
        return first + (CONFIG.learning_rate - first) * count / CONFIG.warmup
    phase = min(1.0, (count - CONFIG.warmup) / (CONFIG.steps - CONFIG.warmup))
    return CONFIG.learning_rate * (0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * phase)))


def test_updates_are_those_of_adamw_with_groups():
    labels = {str(group): str(group) for group in Group}
    random = np.random.default_rng(0)
    values = {name: random.normal(size=(3,)) for name in labels}
    optimizer = make_optimizer(CONFIG, labels)
    arrays = jax.tree.map(np.float32, values)
    state = optimizer.init(arrays)
    first, second = ({name: np.zeros(3) for name in labels} for _ in range(2))
    for count in range(5):
        # from far above the clipping norm to far below it
        gradients = {name: random.normal(size=(3,)) * 10.0 ** (1 - count) for name in labels}
        updates, state = optimizer.update(jax.tree.map(np.float32, gradients), state, arrays)
        arrays = optax.apply_updates(arrays, updates)
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        for name, gradient in gradients.items():
            gradient = gradient * min(1.0, CONFIG.clip / norm)
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            step = (first[name] / (1 - 0.8 ** (count + 1))) / (np.sqrt(second[name] / (1 - 0.9 ** (count + 1))) + 1e-8)
            if name in DECAYED:
                step = step + CONFIG.weight_decay * values[name]
            if name == "dynamics":
                step = step * CONFIG.dynamics_rate
            values[name] = values[name] - rate(count) * step
            np.testing.assert_allclose(arrays[name], values[name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


def test_learning_rate_rises_to_its_peak_and_falls_to_its_floor():
    rates = np.array([schedule(CONFIG)(count) for count in range(CONFIG.steps + 5)])
    np.testing.assert_allclose(rates, [rate(count) for count in range(CONFIG.steps + 5)], rtol=TOLERANCE)
    assert rates.argmax() == CONFIG.warmup
    assert rates[0] > 0


def test_a_run_shorter_than_its_warmup_still_learns():
    short = TrainConfig(steps=1, warmup=100)
    assert float(schedule(short)(0)) == pytest.approx(short.learning_rate)


def test_unknown_group_is_named():
    with pytest.raises(ValueError, match="matrx"):
        make_optimizer(CONFIG, {"a": "matrx"})
