"""AdamW over parameter groups, as optax transformations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

from seqmodels.params import Group
from seqmodels.train.config import TrainConfig

DECAYED = (Group.MATRIX, Group.EMBEDDING)


def schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate of the update with number `count` (from 0): linear warmup, then a cosine down to its floor."""
    warmup = min(config.warmup, config.steps - 1)
    cosine = optax.cosine_decay_schedule(
        config.learning_rate, max(config.steps - warmup, 1), alpha=config.final_fraction
    )
    if warmup == 0:
        return cosine
    # starts at 1 / (warmup + 1) of the peak: a first step of rate 0 would be wasted
    ramp = optax.linear_schedule(config.learning_rate / (warmup + 1), config.learning_rate, warmup)
    return optax.join_schedules([ramp, cosine], [warmup])


def make_optimizer(config: TrainConfig, labels: Mapping[str, Any]) -> optax.GradientTransformation:
    """AdamW with global-norm clipping; `labels` as from `params.labels(model)`.

    Weight decay reaches matrices and embeddings only (decoupled, times the learning rate; Loshchilov and Hutter,
    1711.05101), and the learning rate of the dynamics group is multiplied by `config.dynamics_rate`.
    """
    known = {str(group) for group in Group}
    unknown = set(jax.tree.leaves(dict(labels))) - known
    if unknown:
        raise ValueError(f"unknown parameter groups {sorted(unknown)}; known are {sorted(known)}")
    chosen = lambda *groups: jax.tree.map(lambda label: label in groups, dict(labels))
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(*config.betas),
        optax.add_decayed_weights(config.weight_decay, mask=chosen(*DECAYED)),
        optax.masked(optax.scale(config.dynamics_rate), chosen(Group.DYNAMICS)),
        optax.scale_by_learning_rate(schedule(config)),
    )
