"""What rows start from: each kind against the same thing written out by hand, and what cannot start so."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqmodels import params
from seqmodels.mixers import PrefixScan
from seqmodels.train import InitialKind, InitialState, fit_moments, language_model_loss, make_optimizer, train
from seqmodels.train.checks import Continued
from seqmodels.train.initial import make_starts, other_rows
from seqmodels.train.step import init_state, make_step
from seqmodels.typing import Segments
from tests.train.quick import plain_loss
from tests.train.starting import KINDS, compiled, hybrid, memory, run, starting_from, streams
from tests.train.tiny import BATCH, FULL, LENGTH, LOCAL, RECURRENT, loader, tiny_config, tiny_model

# float32 sums of a few hundred terms in another order
TOLERANCE = 2e-5
STEPS = 4
PASSING, STREAMED = InitialState("state_passing"), InitialState("truncated_bptt")
NOISE, FITTED = InitialState("noise", std=0.5), InitialState("fitted_noise", refresh=0)


def take(batches: Any, count: int = STEPS) -> list[dict[str, np.ndarray]]:
    return [next(batches) for _ in range(count)]


def arrays_of() -> dict[str, Any]:
    return params.split(hybrid())[1]


@functools.cache
def by_hand() -> Any:
    """Loss and gradients of a batch from a given state, and the state after it: no part of the training step."""
    definition, _ = params.split(hybrid())

    def loss(arrays: Any, state: Any, batch: Any) -> Any:
        model = params.merge(definition, arrays)
        hidden, state, _ = model.forward(batch["tokens"], state, Segments(batch["start"], batch["valid"]))
        losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), batch["targets"])
        return jnp.sum(losses, where=batch["valid"]) / jnp.sum(batch["valid"]), jax.lax.stop_gradient(state)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def carried_on(batch: dict[str, np.ndarray], rows: Any = slice(None)) -> dict[str, np.ndarray]:
    """The batch whose `rows` go on with the state they are given."""
    start = batch["start"].copy()
    start[rows, 0] = False
    return {**batch, "start": start}


def close(actual: Any, expected: Any) -> None:
    chex.assert_trees_all_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_zeros_are_the_step_without_a_state() -> None:
    config = tiny_config(initial=InitialState())
    model = tiny_model(RECURRENT)
    assert make_starts(model, config.initial) is None
    definition, arrays = params.split(model)
    optimizer = make_optimizer(config, params.labels(model))
    step = make_step(definition, optimizer, starts=make_starts(model, config.initial))

    @jax.jit
    def plain(state: Any, batch: Any) -> Any:
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        loss = lambda arrays: language_model_loss(params.merge(definition, arrays), batch, key)
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state["params"])
        updates, moments = optimizer.update(gradients, state["optimizer"], state["params"])
        arrays = optax.apply_updates(state["params"], updates)
        return {**state, "params": arrays, "optimizer": moments, "step": state["step"] + 1}, metrics["loss"]

    ours, theirs = (init_state(arrays, optimizer, 0) for _ in range(2))
    assert set(ours) == {"params", "optimizer", "step", "key"}
    for batch in take(loader(), 2):
        ours, metrics = step(ours, batch)
        theirs, loss = plain(theirs, batch)
        chex.assert_trees_all_close(metrics["loss"], loss, rtol=TOLERANCE)
    chex.assert_trees_all_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow
def test_truncated_bptt_is_one_forward_pass_cut_into_gradients() -> None:
    batches = take(streams())
    found = run(STREAMED, batches)
    long = {name: np.concatenate([batch[name] for batch in batches], axis=1) for name in batches[0]}
    model = hybrid()
    logits, after = jax.jit(lambda tokens, segments: model(tokens, None, segments))(
        long["tokens"], Segments(long["start"], long["valid"])
    )
    losses = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, long["targets"]))
    expected = losses.reshape(BATCH, STEPS, LENGTH).mean(axis=(0, 2))
    close(np.array([metrics["loss"] for metrics in found.metrics]), expected)
    assert not all(batch["start"][:, 0].any() for batch in batches)

    state = model.init_state(BATCH)
    for batch, metrics, there in zip(batches, found.metrics, found.states[1:], strict=True):
        (loss, state), gradients = by_hand()(arrays_of(), state, batch)
        close((metrics["loss"], there["optimizer"]), (loss, gradients))
    kept = found.states[-1]["initial"]["rows"]
    close({name: kept[name] for name in memory(after)}, memory(after))
    assert {"layers.0.0.conv", "layers.0.4.key", "layers.0.4.length"} <= set(kept)


def test_state_passing_hands_on_the_memory_of_the_batch_before_to_other_rows() -> None:
    batches = take(loader())
    found = run(PASSING, batches)
    starts, _ = compiled(PASSING)
    rows = memory(hybrid().init_state(BATCH))
    for number, (batch, metrics) in enumerate(zip(batches, found.metrics, strict=True)):
        (loss, state), gradients = by_hand()(arrays_of(), starting_from(rows), carried_on(batch))
        close((metrics["loss"], found.states[number + 1]["optimizer"]), (loss, gradients))
        passed = found.states[number + 1]["initial"]["rows"]
        close(passed, memory(state))
        key = jax.random.fold_in(jax.random.wrap_key_data(found.states[0]["key"]), number + 1)
        rows = jax.device_get(starts.draw({"rows": passed}, key, batch)[0])
        source = [
            int(np.flatnonzero((passed["layers.0.2.ssm"] == row).all((1, 2, 3, 4)))[0])
            for row in rows["layers.0.2.ssm"]
        ]
        assert sorted(source) == list(range(BATCH))
        assert all(row != place for place, row in enumerate(source))
        chex.assert_trees_all_equal(rows, {name: x[np.array(source)] for name, x in passed.items()})
    # the first batch has none before it
    close(found.metrics[0]["loss"], run(InitialState(), batches[:1]).metrics[0]["loss"])


def test_other_rows_are_another_circle_every_time() -> None:
    circles = {tuple(np.asarray(other_rows(jax.random.key(seed), 5)).tolist()) for seed in range(20)}
    assert len(circles) > 10
    for circle in circles:
        at, seen = 0, set()
        while at not in seen:
            seen.add(at)
            at = circle[at]
        assert len(seen) == 5
    assert np.asarray(other_rows(jax.random.key(0), 1)).tolist() == [0]


def noise_of(config: InitialState, number: int, moments: Any = None, batch: int = BATCH) -> dict[str, np.ndarray]:
    """What the rows of step `number` are given."""
    starts = make_starts(hybrid(), config)
    key = jax.random.fold_in(jax.random.key(0), number)
    carried = starts.first(hybrid(), batch, moments)
    flags = {"start": np.ones((batch, 2), bool), "valid": np.ones((batch, 2), bool)}
    return jax.device_get(starts.draw(carried, key, flags)[0])


def test_noise_is_gaussian_in_the_memory_alone() -> None:
    rows = noise_of(NOISE, 0, batch=2000)
    assert set(rows) == {"position", "layers.0.0.hidden", "layers.0.0.length", "layers.0.2.ssm"}
    assert (rows["position"] == 0).all()
    assert (rows["layers.0.0.length"] == 1).all()
    for name in ("layers.0.0.hidden", "layers.0.2.ssm"):
        x = rows[name].reshape(2000, -1)
        np.testing.assert_allclose(x.std(axis=0), 0.5, rtol=0.15)  # 9 deviations of one entry's estimate
        np.testing.assert_allclose(x.mean(axis=0), 0, atol=0.06)  # 5 deviations
        correlations = np.corrcoef(x, rowvar=False) - np.eye(x.shape[1])
        assert np.abs(correlations).max() < 0.12  # 5 deviations
    first = [rows[name].ravel()[:1000] for name in ("layers.0.0.hidden", "layers.0.2.ssm")]
    assert (first[0] != first[1]).mean() > 0.99  # layers share no draw, nor do steps
    assert not np.array_equal(rows["layers.0.0.hidden"], noise_of(NOISE, 1, batch=2000)["layers.0.0.hidden"])


def test_noise_is_what_the_rows_of_a_step_start_from() -> None:
    batches = take(loader(), 2)
    found = run(NOISE, batches)
    assert "initial" not in found.states[-1]
    for number, batch in enumerate(batches):
        rows = noise_of(NOISE, number)
        (loss, _), gradients = by_hand()(arrays_of(), starting_from(rows), carried_on(batch))
        close((found.metrics[number]["loss"], found.states[number + 1]["optimizer"]), (loss, gradients))


def moments_by_hand(batches: list[dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    finals = [memory(by_hand()(arrays_of(), hybrid().init_state(BATCH), batch)[0][1]) for batch in batches]
    x = {name: np.concatenate([final[name] for final in finals]) for name in finals[0]}
    heads = x["layers.0.2.ssm"]  # [B, 1, H, K, V]
    return {
        "layers.0.0.hidden": {"mean": x["layers.0.0.hidden"].mean((0, 2)), "std": x["layers.0.0.hidden"].std((0, 2))},
        "layers.0.2.ssm": {"mean": heads.mean((0, 3, 4)), "std": heads.std((0, 3, 4))},
    }


def test_fitted_noise_has_the_moments_of_final_memories() -> None:
    batches = take(loader(), 3)
    found = run(FITTED, batches)
    of_first = moments_by_hand(batches[:1])
    close(found.states[1]["initial"], {"moments": of_first})
    chex.assert_trees_all_equal(found.states[3]["initial"], found.states[1]["initial"])  # refresh 0: fitted once
    assert not any(x.any() for x in jax.tree.leaves(found.states[0]["initial"]))
    for number, batch in enumerate(batches):
        rows = noise_of(FITTED, number, found.states[1]["initial"]["moments"])
        (loss, _), gradients = by_hand()(arrays_of(), starting_from(rows), carried_on(batch))
        close((found.metrics[number]["loss"], found.states[number + 1]["optimizer"]), (loss, gradients))
    drawn = noise_of(FITTED, 0, of_first, batch=4000)["layers.0.2.ssm"]
    for what, of in (("mean", np.mean), ("std", np.std)):
        np.testing.assert_allclose(of(drawn, axis=(0, 3, 4)), of_first["layers.0.2.ssm"][what], rtol=0.03, atol=1e-3)
    assert of_first["layers.0.2.ssm"]["std"].shape == (1, 2)


def test_moments_are_refreshed_from_the_batch_of_their_step() -> None:
    batches = take(loader(), 4)
    found = run(InitialState("fitted_noise", refresh=2), batches)
    for number, fitted_to in enumerate([0, 0, 2, 2]):
        close(found.states[number + 1]["initial"]["moments"], moments_by_hand([batches[fitted_to]]))


def test_moments_of_several_batches_may_be_given() -> None:
    batches = take(loader(), 4)
    empty = {name: np.zeros_like(x) for name, x in batches[0].items()}
    moments = fit_moments(hybrid(), [*batches[:3], empty])
    close(moments, moments_by_hand(batches[:3]))
    found = run(FITTED, batches[3:], moments=moments)
    chex.assert_trees_all_equal(found.states[1]["initial"]["moments"], moments)
    with pytest.raises(ValueError, match="hold no token"):
        fit_moments(hybrid(), [empty])
    with pytest.raises(ValueError, match="of fitted noise"):
        train(hybrid(), loader(), tiny_config(initial=NOISE), moments=moments, quiet=True)
    with pytest.raises(ValueError, match="this model needs"):
        train(tiny_model(RECURRENT), loader(), tiny_config(initial=FITTED), moments=moments, quiet=True)


def test_some_rows_may_start_from_zeros() -> None:
    (batch,) = take(loader(), 1)
    config = dataclasses.replace(NOISE, probability=0.5)
    starts = make_starts(hybrid(), config)
    seen = set()
    for number in range(30):
        key = jax.random.fold_in(jax.random.key(0), number)
        marked = np.asarray(starts.draw({}, key, batch)[1]["start"])
        np.testing.assert_array_equal(marked[:, 1:], batch["start"][:, 1:])
        seen |= {int(row) for row in np.flatnonzero(~marked[:, 0])}
        assert marked[:, 0].any() or number
    assert seen == set(range(BATCH))
    marked = np.asarray(starts.draw({}, jax.random.fold_in(jax.random.key(0), 0), batch)[1]["start"])
    rows = np.flatnonzero(~marked[:, 0])
    (loss, _), _ = by_hand()(arrays_of(), starting_from(noise_of(config, 0)), carried_on(batch, rows))
    close(run(config, [batch]).metrics[0]["loss"], loss)


SHORT = (InitialKind.FITTED_NOISE, InitialKind.STATE_PASSING)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in SHORT else pytest.mark.slow) for k in KINDS])
def test_parts_of_a_batch_start_from_what_the_whole_does(kind: InitialKind) -> None:
    batches = take(streams(), 3)
    config = InitialState(kind, refresh=2)
    close(*(drop_key(run(config, batches, accumulate=parts)) for parts in (2, 1)))


def drop_key(found: Any) -> Any:
    return [{name: x for name, x in state.items() if name != "key"} for state in found.states], found.metrics


PSM = PrefixScan(aggregator=(((FULL,), 1),), inference=(((FULL,), 1),), chunk=4)


@pytest.mark.parametrize(
    ("mixers", "kind", "message"),
    [
        ((FULL,), "noise", "no layer of this model has recurrent memory .*: choose zeros"),
        ((LOCAL,), "state_passing", "kind is state_passing, and no layer .* add a recurrence"),
        ((PSM,), "fitted_noise", "no layer of this model has recurrent memory"),
        ((RECURRENT, FULL), "truncated_bptt", r"full attention's state grows .*AttentionConfig\.window"),
        ((RECURRENT, PSM), "truncated_bptt", "a PSM runs token by token"),
    ],
    ids=["attention", "window", "psm", "full_attention", "hybrid_psm"],
)
def test_a_model_that_cannot_start_so(mixers: Any, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny_model(*mixers), loader(), tiny_config(initial=InitialState(kind)), quiet=True)


def test_a_loss_of_ones_own_sees_no_state() -> None:
    with pytest.raises(ValueError, match="a loss of your own sees no initial state"):
        train(hybrid(), loader(), tiny_config(initial=PASSING), loss=plain_loss, quiet=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ones"}, "'ones'; choose one of zeros, noise"),
        ({"kind": "noise", "std": 0.0}, "std is 0.0"),
        ({"kind": "noise", "std": float("nan")}, "std is nan"),
        ({"kind": "noise", "probability": 0.0}, "probability is 0.0"),
        ({"kind": "truncated_bptt", "probability": 0.5}, "leave it at 1, or choose noise"),
        ({"kind": "fitted_noise", "refresh": -1}, "refresh is -1"),
    ],
    ids=str,
)
def test_settings_that_say_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InitialState(**settings)


def test_batches_that_do_not_go_on_are_named() -> None:
    config = tiny_config(initial=STREAMED, steps=10)
    with pytest.raises(ValueError, match=r"none of the first 8 batches goes on .*make_stream_loader"):
        train(tiny_model(RECURRENT), loader(), config, quiet=True)

    batches, check = take(streams(), 40), Continued()
    for batch in batches:
        check(batch)
    goes_on = next(number for number, batch in enumerate(batches) if number and not batch["start"][1, 0])
    for change, error in (
        ({"tokens": batches[goes_on]["tokens"] + 1}, r"begins with \d+ inside a document, .* the target \d+: row r"),
        ({}, None),
    ):
        check = Continued()
        for batch in batches[:goes_on]:
            check(batch)
        with contextlib.nullcontext() if error is None else pytest.raises(ValueError, match=error):
            check({**batches[goes_on], **change})
    check = Continued()  # targets that are not the next tokens, as labels are, say nothing of the batch to come
    for batch in batches:
        check({**batch, "targets": batch["tokens"] % 2})
