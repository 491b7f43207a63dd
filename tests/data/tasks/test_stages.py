"""A curriculum of tasks as one stream of batches."""

from __future__ import annotations

import numpy as np
import pytest

from seqmodels.data.tasks import MQAR, Parity, make_stages_loader, make_task_loader

SHORT, MIDDLE, LONG = Parity(max_length=4), Parity(max_length=6), Parity(max_length=9)
STAGES = ((2, SHORT), (3, MIDDLE), (None, LONG))


def take(batches, count):
    return [next(batches) for _ in range(count)]


def test_stages_follow_one_another_in_rows_of_one_length():
    found = take(make_stages_loader(STAGES, batch_size=50, seed=3), 8)
    assert all(batch["tokens"].shape == (50, 9) for batch in found)
    longest = [int(batch["valid"].sum(1).max()) for batch in found]
    assert longest == [3, 3, 5, 5, 5, 8, 8, 8]  # tokens before the answer
    assert all(not batch["valid"][:, -1].any() and batch["start"][:, 0].all() for batch in found)
    alone = next(make_task_loader(SHORT, batch_size=50, seed=3))
    for name, array in alone.items():
        np.testing.assert_array_equal(found[0][name][:, :4], array)
    # a later stage does not repeat what a stage of the same task would have drawn
    again = take(make_stages_loader(((1, SHORT), (None, SHORT)), batch_size=50, seed=3), 2)
    assert not np.array_equal(again[0]["tokens"], again[1]["tokens"])


def test_packed_rows_hold_as_many_examples_as_fit():
    found = take(make_stages_loader(STAGES, batch_size=50, seed=3, packed=True), 6)
    starts = [np.flatnonzero(batch["start"].all(0)).tolist() for batch in found]
    assert starts == [[0, 4], [0, 4], [0], [0], [0], [0]]
    assert all(batch["start"].sum() == 50 * len(start) for batch, start in zip(found, starts, strict=True))
    alone = next(make_task_loader(SHORT, batch_size=100, seed=3))
    for name, array in alone.items():
        np.testing.assert_array_equal(found[0][name][:, :8].reshape(100, 4), array)
        assert not found[0][name][:, 8:].any()


@pytest.mark.parametrize("stop", [0, 1, 2, 4, 5, 7])
@pytest.mark.parametrize("packed", [False, True])
def test_it_goes_on_from_its_state(stop, packed):
    batches = make_stages_loader(STAGES, batch_size=3, seed=0, packed=packed)
    take(batches, stop)
    state = batches.get_state()
    expected = take(batches, 4)
    fresh = make_stages_loader(STAGES, batch_size=3, seed=0, packed=packed)
    fresh.set_state(state)
    for batch, wanted in zip(take(fresh, 4), expected, strict=True):
        assert all(np.array_equal(batch[name], wanted[name]) for name in wanted)


def test_errors():
    make = lambda stages: make_stages_loader(stages, batch_size=2, seed=0)
    for stages in ((), ((2, SHORT),), ((None, SHORT), (None, LONG)), ((0, SHORT), (None, LONG))):
        with pytest.raises(ValueError, match="each but the last has at least one, and the last None"):
            make(stages)
    with pytest.raises(ValueError, match=r"vocabularies of \[3, 8192\] tokens: a model has one"):
        make(((1, SHORT), (None, MQAR())))
    with pytest.raises(ValueError, match="stage 3 of 3: the state of another curriculum"):
        make(STAGES).set_state({"stage": 3, "taken": 0, "batches": {}})
    other = make_stages_loader(STAGES, batch_size=2, seed=1).get_state()
    with pytest.raises(ValueError, match="saved by a loader of other documents or arguments"):
        make(STAGES).set_state(other)
