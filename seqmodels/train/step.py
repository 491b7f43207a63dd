"""One optimisation step over plain dicts of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from seqmodels import compat, params
from seqmodels.models.sharding import SEQUENCE, Placement, batch_spec, check_batch, make_mesh, place_batch
from seqmodels.train.config import TrainConfig
from seqmodels.train.initial import Rows, Starts, make_starts
from seqmodels.typing import Segments

TrainState = dict[str, Any]  # {"params", "optimizer", "step", "key"}, and "initial" where rows start from a state
Batch = Mapping[str, Any]  # {"tokens", "targets", "start", "valid"}, each [B, T]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
Fit = Callable[[int, TrainState, Batch], TrainState]
Loss = Callable[[Any, Batch, Array], tuple[Array, dict[str, Array]]]


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], valid: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of the negative log-likelihoods in nats over the valid positions, in float32, and their number."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.where(valid, targets, 0))
    return jnp.sum(losses, where=valid), jnp.sum(valid)


def language_model_loss(model: Any, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
    """Mean next-token loss of a packed batch plus the model's auxiliary losses: `(objective, metrics)`.

    The metric `loss` is the cross-entropy alone, in nats per scored token; `tokens` is their number. A batch may say
    in `scored` Bool[B, T] which positions are; all valid ones where it does not.
    """
    return loss_from_state(model, batch, key, None)[:2]


def loss_from_state(model: Any, batch: Batch, key: Array, state: Any) -> tuple[Array, dict[str, Array], Any]:
    """`language_model_loss` of rows that go on from a state, and the state after them."""
    segments = Segments(batch["start"], batch["valid"])
    hidden, state, aux = model.forward(batch["tokens"], state, segments, key=key)
    total, count = cross_entropy(model.logits(hidden), batch["targets"], batch.get("scored", batch["valid"]))
    loss = total / jnp.maximum(count, 1)
    reports = {f"aux/{name}": value for name, value in aux.items()}
    return sum(aux.values(), loss), {"loss": loss, "tokens": count, **reports}, state


def init_state(
    arrays: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    seed: int,
    placement: Placement | None = None,
    initial: Mapping[str, Any] | None = None,
) -> TrainState:
    """The state before the first step. It owns copies: the step donates its state, the model keeps its arrays.

    `initial`: what `Starts.first` gives, where rows start from a state.
    """
    arrays = jax.tree.map(lambda array: jnp.array(array, copy=True), dict(arrays))
    # raw key data: checkpoints hold plain arrays only
    key = jax.random.key_data(jax.random.key(seed))
    extra = {"initial": dict(initial)} if initial else {}
    if placement is None:
        start = jnp.zeros((), jnp.int32)
        return {"params": arrays, "optimizer": optimizer.init(arrays), "step": start, "key": key, **extra}
    arrays = jax.device_put(arrays, placement.shardings)
    shapes = jax.eval_shape(optimizer.init, arrays)
    moments = jax.jit(optimizer.init, out_shardings=_moments(optimizer, shapes, placement))(arrays)
    number, key = jax.device_put((jnp.zeros((), jnp.int32), key), placement.everywhere)
    extra = jax.device_put(extra, _carried(extra, placement))
    return {"params": arrays, "optimizer": moments, "step": number, "key": key, **extra}


def _carried(initial: Any, placement: Placement) -> Any:
    """The shardings of what rows start from: states lie where their rows do, moments everywhere."""
    of_rows = lambda path: any(getattr(entry, "key", None) == "rows" for entry in path)
    place = lambda path, _: placement.rows if of_rows(path) else placement.everywhere
    return jax.tree_util.tree_map_with_path(place, initial)


def _moments(optimizer: optax.GradientTransformation, moments: Any, placement: Placement) -> Any:
    """The shardings of an optimiser's state: what belongs to a parameter lies where it lies."""
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        moments,
        placement.shardings,
        transform_non_params=lambda _: placement.everywhere,
    )


Objective = Callable[..., tuple[Array, tuple[dict[str, Array], Array, Rows]]]


def make_objective(
    definition: params.Definition, loss: Loss, placement: Placement | None = None
) -> Callable[[dict[str, Any], Batch, Array], tuple[Array, tuple[dict[str, Array], Array]]]:
    """`(arrays, batch, key) -> (objective, (metrics, tokens))`, the mean over all devices of a mesh, if one is given.

    Parts of a batch count by the metric `tokens` of `loss`, all alike where it reports none.
    """
    objective = _objective(definition, loss, placement, None)

    def without_rows(arrays: dict[str, Any], batch: Batch, key: Array) -> tuple[Array, tuple[dict[str, Array], Array]]:
        value, (metrics, tokens, _) = objective(arrays, batch, key, {})
        return value, (metrics, tokens)

    return without_rows


def _objective(
    definition: params.Definition, loss: Loss, placement: Placement | None, starts: Starts | None
) -> Objective:
    """`(arrays, batch, key, rows) -> (objective, (metrics, tokens, final rows))`.

    With `starts` it is `loss_from_state` from what `rows` say, or from zeros where they are empty.
    """

    def whole(arrays: dict[str, Any], batch: Batch, key: Array, rows: Rows) -> tuple[Array, Any]:
        model, finals = params.merge(definition, arrays), {}
        model = model if placement is None else placement.enter(model)
        if starts is None:
            value, metrics = loss(model, batch, key)
        else:
            value, metrics, state = loss_from_state(model, batch, key, starts.state(model, rows) if rows else None)
            finals = {} if rows and starts.fits else starts.finals(state)
        tokens = jnp.asarray(metrics.get("tokens", 1), jnp.float32)
        return value, ({name: metric for name, metric in metrics.items() if name != "tokens"}, tokens, finals)

    if placement is None:
        return whole
    mesh = placement.mesh

    def share(arrays: dict[str, Any], batch: Batch, key: Array, rows: Rows) -> tuple[Array, Any]:
        for axis in mesh.axis_names:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        value, (metrics, tokens, finals) = whole(arrays, batch, key, rows)
        over = frozenset(mesh.axis_names)
        total = lambda x: jax.lax.psum(compat.vary_over(x, over), mesh.axis_names)
        count = total(tokens)
        mean = lambda x: total(x * tokens) / jnp.maximum(count, 1)
        return mean(value), (jax.tree.map(mean, metrics), count, jax.tree.map(_over_rows, finals))

    def over_mesh(arrays: dict[str, Any], batch: Batch, key: Array, rows: Rows) -> tuple[Array, Any]:
        batches = {name: batch_spec(x.ndim) for name, x in batch.items()}
        everywhere, of_rows = PartitionSpec(), batch_spec(1)
        specs = (placement.specs, batches, everywhere, of_rows)
        out = (everywhere, (everywhere, everywhere, of_rows))
        return jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=out)(arrays, dict(batch), key, rows)

    return over_mesh


def _over_rows(x: Array) -> Array:
    """A state's array, the same on all devices of a sequence, typed as such."""
    return compat.gather_along(x, SEQUENCE)[0] if SEQUENCE in compat.varying_axes(x) else x


def make_step(
    definition: params.Definition,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss = language_model_loss,
    learning_rate: optax.Schedule | None = None,
    accumulate: int = 1,
    placement: Placement | None = None,
    starts: Starts | None = None,
) -> Step:
    """A jitted `(state, batch) -> (state, metrics)`; the given state is donated.

    `accumulate`: the gradient is that of the whole batch, taken from so many parts one after the other (part i has the
    rows i, i + accumulate, ...). Randomness comes from the run's key, the step's number, the part and the device alone,
    so that a restored run repeats itself exactly. `starts`: what rows start from, None for zeros; `loss` is
    `language_model_loss` then.
    """
    objective = _objective(definition, loss, placement, starts)
    value_and_gradient = jax.value_and_grad(objective, has_aux=True)

    def of_batch(
        arrays: dict[str, Any], batch: Batch, key: Array, rows: Rows
    ) -> tuple[dict[str, Array], dict[str, Any], Rows]:
        if accumulate == 1:
            (_, (metrics, _, finals)), gradients = value_and_gradient(arrays, batch, key, rows)
            return metrics, gradients, finals
        parts = _parts((dict(batch), rows), accumulate)

        def add(sums: Any, item: tuple[Any, tuple[Batch, Rows]]) -> tuple[Any, Rows]:
            number, (part, rows) = item
            inner = jax.random.fold_in(key, number)
            (_, (metrics, tokens, finals)), gradients = value_and_gradient(arrays, part, inner, rows)
            weighted = jax.tree.map(lambda x: x * tokens, (metrics, gradients))
            return jax.tree.map(jnp.add, sums, (*weighted, tokens)), finals

        first = jax.tree.map(lambda x: x[0], parts)
        (_, (metrics, tokens, _)), gradients = jax.eval_shape(value_and_gradient, arrays, first[0], key, first[1])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (metrics, gradients, tokens))
        sums, finals = jax.lax.scan(add, zeros, (jnp.arange(accumulate), parts))
        metrics, gradients = jax.tree.map(lambda x: x / jnp.maximum(sums[2], 1), sums[:2])
        return metrics, gradients, _joined(finals)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = _key(state)
        initial = state.get("initial", {})
        rows: Rows = {}
        if starts is not None:
            rows, batch = starts.draw(initial, key, batch)
        metrics, gradients, finals = of_batch(state["params"], batch, key, rows)
        updates, moments = optimizer.update(gradients, state["optimizer"], state["params"])
        metrics = {**metrics, "gradient_norm": optax.tree.norm(gradients)}
        if learning_rate is not None:
            metrics["learning_rate"] = learning_rate(state["step"])
        arrays = optax.apply_updates(state["params"], updates)
        if "rows" in initial:
            initial = {"rows": finals}
        carried = {"initial": initial} if initial else {}
        if placement is not None:
            arrays = jax.lax.with_sharding_constraint(arrays, placement.shardings)
            moments = jax.lax.with_sharding_constraint(moments, _moments(optimizer, moments, placement))
            carried = jax.lax.with_sharding_constraint(carried, _carried(carried, placement))
        return {**state, "params": arrays, "optimizer": moments, "step": state["step"] + 1, **carried}, metrics

    return jax.jit(step, donate_argnums=0)


def make_fit(
    definition: params.Definition,
    starts: Starts | None,
    accumulate: int = 1,
    placement: Placement | None = None,
    *,
    given: bool = False,
) -> Fit:
    """`(number, state, batch) -> state` before step `number`, from 0: fitted noise's moments where they are due.

    They are those of this batch's final memory, its rows begun from zeros; `given`: the run began with some. A program
    of its own, since most steps do without; the given state is donated to it.
    """
    if starts is None or not starts.fits:
        return lambda number, state, batch: state
    fits, objective = starts, _objective(definition, language_model_loss, placement, starts)

    def fit(state: TrainState, batch: Batch) -> TrainState:
        of_part = lambda part: objective(state["params"], part, _key(state), {})[1][2]
        finals = _joined(jax.lax.map(of_part, _parts(dict(batch), accumulate)))
        initial = {"moments": fits.moments(finals, jnp.any(batch["valid"], axis=1))}
        if placement is not None:
            initial = jax.lax.with_sharding_constraint(initial, _carried(initial, placement))
        return {**state, "initial": initial}

    compiled = jax.jit(fit, donate_argnums=0)
    of_batch = compiled if placement is None else on_mesh(compiled, placement)
    return lambda number, state, batch: of_batch(state, batch) if fits.due(number, given=given) else state


def _key(state: TrainState) -> Array:
    return jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])


def _parts(tree: Any, count: int) -> Any:
    """`[B, ...]` as `[count, B / count, ...]`: consecutive rows go to different parts, a device's rows stay its own."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), tree)


def _joined(tree: Any) -> Any:
    """The inverse of `_parts`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def begin(
    model: Any, config: TrainConfig, loss: Loss, moments: Mapping[str, Any] | None
) -> tuple[Starts | None, dict[str, Any]]:
    """What the rows of a run start from, and what its train state holds of that before the first step.

    Raises ValueError where model, loss or moments do not go with `config.initial`.
    """
    starts = make_starts(model, config.initial)
    if moments is not None and (starts is None or not starts.fits):
        raise ValueError(
            f"moments are those of fitted noise, and train.initial.kind is {config.initial.kind}: leave them away, or "
            "choose fitted_noise"
        )
    if starts is None:
        return None, {}
    if loss is not language_model_loss:
        raise ValueError(
            f"train.initial.kind is {config.initial.kind}, and a loss of your own sees no initial state: choose zeros, "
            "or train with language_model_loss, whose batches may say in `scored` what counts"
        )
    return starts, starts.first(model, config.batch_size, moments)


def place(model: Any, config: TrainConfig) -> Placement | None:
    """Where a run lies on the devices; None for a single one. Raises ValueError where the mesh does not fit."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence)
    check_batch(config.batch_size, config.length, mesh, config.accumulate)
    return None if mesh.size == 1 else Placement.of(model, mesh)


def on_mesh(step: Callable[[TrainState, Batch], Any], placement: Placement) -> Callable[[TrainState, Batch], Any]:
    """A step, or a fit, that takes batches from the host."""
    return lambda state, batch: step(state, place_batch(batch, placement.mesh))
