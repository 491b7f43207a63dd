"""Numbers, batches and corpora that are not as they should be: errors that say what to do, and nothing lost."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import params
from seqmodels.data import documents
from seqmodels.train import language_model_loss, make_evaluator
from tests.train.quick import Batches, checkpoints, losses, plain_loss, run
from tests.train.tiny import loader, tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[tuple[int, float]]:
    """The losses of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole")
    run(workdir)
    return losses(workdir)


# --- numbers that are not finite


def poisoned(step: int, *, loss: bool, gradient: bool) -> Any:
    """`plain_loss` whose value or gradient is not finite at one step."""

    @jax.custom_vjp
    def touch(x, bad):
        return jnp.where(bad & loss, jnp.inf, x)

    touch.defvjp(lambda x, bad: (touch(x, bad), bad), lambda bad, g: (jnp.where(bad & gradient, jnp.nan, g), None))

    def of_batch(model, batch, key):
        value = touch(plain_loss(model, batch, key)[0], batch["number"] == step)
        return value, {"loss": value}

    return of_batch


@pytest.mark.parametrize(
    ("step", "loss", "gradient", "said"),
    [
        (4, True, True, "step 4 has loss inf and gradient norm nan"),
        (4, False, True, r"step 4 has loss [\d.]+ and gradient norm nan"),
        (5, True, False, "step 5 has loss inf and gradient norm [0-9.e-]+"),
        (1, True, True, "step 1 has loss inf"),
    ],
    ids=["on_a_checkpoint", "gradient_alone", "between_checkpoints", "before_any"],
)
def test_a_number_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, whole, step, loss, gradient, said):
    good = (step - 1) // 2 * 2
    kept = rf"the checkpoint of step {good} is kept in {tmp_path}/checkpoints" if good else "there is no checkpoint yet"
    with pytest.raises(FloatingPointError, match=rf"{said}.*\({kept}\); .*another workdir.* train\.learning_rate"):
        run(tmp_path, loss=poisoned(step, loss=loss, gradient=gradient))
    assert checkpoints(tmp_path) == ({str(good), str(good - 2)} - {"0"} if good else set())
    assert losses(tmp_path) == whole[: step - 1]
    run(tmp_path)  # the last good checkpoint is whole
    assert losses(tmp_path) == whole


def test_parameters_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    from seqmodels.train import loop

    def spoiling(*arguments, **settings):
        step = make_step(*arguments, **settings)

        def spoilt(state, batch):
            state, metrics = step(state, batch)
            bad = jnp.where(batch["number"] == 4, jnp.inf, 0)
            return {**state, "params": jax.tree.map(lambda leaf: leaf + bad, state["params"])}, metrics

        return spoilt

    make_step = loop.make_step
    monkeypatch.setattr(loop, "make_step", spoiling)
    with pytest.raises(FloatingPointError, match=r"step 4 left parameters that are not finite .*step 2 is kept"):
        run(tmp_path)
    assert checkpoints(tmp_path) == {"2"}


def with_token(value: int, name: str, at: int) -> Batches:
    """Batches of text whose batch number `at` has `value` at row 2, position 3 of `name`."""
    inner = loader()

    def change(number):
        batch = {key: array.copy() for key, array in next(inner).items()}
        batch["valid"][2, 3] = True
        if number == at:
            batch[name][2, 3] = value
        return batch

    return Batches(change=change)


@pytest.mark.parametrize(("value", "name"), [(300, "targets"), (-1, "targets"), (257, "tokens")])
def test_a_token_outside_the_vocabulary_is_named(value, name):
    said = (
        rf"has {value} among its {name} \(row 2, position 3\), outside the model's vocabulary of 257 tokens, 0 to 256"
    )
    with pytest.raises(ValueError, match=f"the first batch {said}: raise model.vocab_size or mend the data"):
        run(None, with_token(value, name, at=1), loss=language_model_loss)


def test_a_later_token_outside_the_vocabulary_is_named_with_the_loss():
    with pytest.raises(FloatingPointError, match=r"step 3 has loss nan.*; its batch has 300 among its targets"):
        run(None, with_token(300, "targets", at=3), loss=language_model_loss)


def test_a_batch_with_numbers_that_are_not_finite_is_named():
    numbers = lambda number: {"number": np.float32(np.nan if number == 2 else number)}
    with pytest.raises(FloatingPointError, match=r"step 2 has loss nan.*; its batch has values in number that are not"):
        run(None, Batches(change=numbers))


# --- batches


@pytest.mark.parametrize("missing", ["targets", "valid"])
def test_a_batch_without_what_the_loss_needs_is_named(missing):
    inner = loader()
    change = lambda _: {name: array for name, array in next(inner).items() if name != missing}
    with pytest.raises(ValueError, match=rf"the loss needs {missing} in a batch, which holds tokens, .*make_loader"):
        run(None, Batches(change=change), loss=language_model_loss)


def test_a_loss_of_ones_own_that_finds_no_key_or_reports_no_loss():
    with pytest.raises(ValueError, match="the loss looks up 'number', which is not there: the batch holds numbers"):
        run(None, Batches(change=lambda number: {"numbers": np.float32(number)}))
    quiet = lambda *given: (plain_loss(*given)[0], {"value": plain_loss(*given)[0]})
    with pytest.raises(ValueError, match=r"the loss reports .*value: its metrics need a scalar named loss"):
        run(None, loss=quiet)


def test_arrays_of_different_shapes_are_named():
    inner = loader()
    change = lambda _: {**next(inner), "targets": np.zeros((4, 15), int)}
    with pytest.raises(ValueError, match=r"one shape \[batch, time\], not tokens \(4, 16\), targets \(4, 15\)"):
        run(None, Batches(change=change), loss=language_model_loss)


def test_batches_that_end_are_no_bare_stop_and_cost_no_step(tmp_path, whole):
    for _ in range(2):  # the second time there is nothing left at all
        said = rf"ended after step 5 of 8 \(the checkpoint of step 5 is kept in {tmp_path}/checkpoints\): give more"
        with pytest.raises(ValueError, match=said):
            run(tmp_path, Batches(last=5))
        assert losses(tmp_path) == whole[:5]
    run(tmp_path)
    assert losses(tmp_path) == whole
    with pytest.raises(ValueError, match="the batches ended after step 0 of 8: give more"):
        run(None, Batches(last=0))


@pytest.mark.parametrize(
    ("files", "source", "said"),
    [
        ({"a.txt": ""}, "a.txt", r"no text in .*a.txt: .*are not empty"),
        ({}, ".", r"no text in .*: .* found 0 files"),
        ({"a.txt": " \n\t", "b.txt": "\n"}, ".", r"no text in .*: .* found 2 files, none of that kind"),
        ({"a.txt": "a"}, ".", "a.txt has 1 bytes, too few to hold 10% out: give more text"),
        ({}, "nowhere", "no text source .*nowhere.*: it is neither a file or folder nor one of"),
    ],
    ids=["empty_file", "empty_folder", "white_space", "too_short", "absent"],
)
@pytest.mark.filterwarnings("ignore:.*were skipped")
def test_a_corpus_without_text_is_named(tmp_path, files, source, said):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        documents(tmp_path / source, "train")


def test_nothing_held_out_is_named_before_training():
    with pytest.raises(ValueError, match="no held-out documents: give at least one, or train without"):
        make_evaluator(params.split(tiny_model())[0], [], batch_size=2, length=16)
