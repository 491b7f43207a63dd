"""One optimisation step over plain dicts of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from seqmodels import params
from seqmodels.typing import Segments

TrainState = dict[str, Any]  # {"params", "optimizer", "step", "key"}
Batch = Mapping[str, Any]  # {"tokens", "targets", "start", "valid"}, each [B, T]
Loss = Callable[[Any, Batch, Array], tuple[Array, dict[str, Array]]]


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], valid: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of the negative log-likelihoods in nats over the valid positions, in float32, and their number."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.where(valid, targets, 0))
    return jnp.sum(losses, where=valid), jnp.sum(valid)


def language_model_loss(model: Any, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
    """Mean next-token loss of a packed batch plus the model's auxiliary losses: `(objective, metrics)`.

    The metric `loss` is the cross-entropy alone, in nats per valid token.
    """
    segments = Segments(batch["start"], batch["valid"])
    hidden, _, aux = model.forward(batch["tokens"], None, segments, key=key)
    total, count = cross_entropy(model.logits(hidden), batch["targets"], batch["valid"])
    loss = total / jnp.maximum(count, 1)
    return sum(aux.values(), loss), {"loss": loss, **{f"aux/{name}": value for name, value in aux.items()}}


def init_state(arrays: Mapping[str, Any], optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step. It owns copies: the step donates its state, the model keeps its arrays."""
    arrays = jax.tree.map(lambda array: jnp.array(array, copy=True), dict(arrays))
    # raw key data: checkpoints hold plain arrays only
    key = jax.random.key_data(jax.random.key(seed))
    return {"params": arrays, "optimizer": optimizer.init(arrays), "step": jnp.zeros((), jnp.int32), "key": key}


def make_step(
    definition: params.Definition,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss = language_model_loss,
    learning_rate: optax.Schedule | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """A jitted `(state, batch) -> (state, metrics)`; the given state is donated.

    Randomness comes from the run's key and the step's number alone, so that a restored run repeats itself exactly.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])

        def objective(arrays: dict[str, Any]) -> tuple[Array, dict[str, Array]]:
            return loss(params.merge(definition, arrays), batch, key)

        (_, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(state["params"])
        updates, moments = optimizer.update(gradients, state["optimizer"], state["params"])
        metrics = {**metrics, "gradient_norm": optax.tree.norm(gradients)}
        if learning_rate is not None:
            metrics["learning_rate"] = learning_rate(state["step"])
        arrays = optax.apply_updates(state["params"], updates)
        return {**state, "params": arrays, "optimizer": moments, "step": state["step"] + 1}, metrics

    return jax.jit(step, donate_argnums=0)
