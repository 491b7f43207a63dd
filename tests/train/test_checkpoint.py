"""Checkpoints: exact, the last k, and never a half-written one."""

from __future__ import annotations

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqmodels.train.checkpoint import Checkpoints, load_params


def some_state(step: int):
    arrays = {"layer": {"kernel": jnp.arange(6.0).reshape(2, 3) + step / 3}}
    key = jax.random.key_data(jax.random.key(step))
    return {"params": arrays, "optimizer": optax.adam(1e-3).init(arrays), "step": jnp.int32(step), "key": key}


def saved(folder: Path, *steps: int, data=None, keep: int = 2) -> None:
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, some_state(step), {"position": step} if data is None else data)
    checkpoints.close()


def test_the_latest_comes_back_exactly_and_the_last_two_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3)
    checkpoints = Checkpoints(tmp_path)
    state, data, step = checkpoints.restore(some_state(0))
    assert checkpoints.steps() == [3, 2]
    assert (data, step) == ({"position": 3}, 3)
    assert jax.tree.structure(state) == jax.tree.structure(some_state(3))
    chex.assert_trees_all_equal(state, some_state(3))
    chex.assert_trees_all_equal_dtypes(state, some_state(3))


def test_an_iterator_state_of_bytes_comes_back(tmp_path):
    saved(tmp_path, 1, data=b"\x00\xffstate")
    assert Checkpoints(tmp_path).restore(some_state(0)).data == b"\x00\xffstate"


def test_an_empty_folder_has_none(tmp_path):
    assert Checkpoints(tmp_path / "new").restore(some_state(0)) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        load_params(tmp_path, some_state(0))


def test_what_a_killed_save_leaves_is_ignored_and_swept(tmp_path):
    saved(tmp_path, 1)
    leftover = tmp_path / "2.orbax-checkpoint-tmp-7" / "state"
    leftover.mkdir(parents=True)
    (leftover / "manifest").write_text("half")
    assert Checkpoints(tmp_path).restore(some_state(0)).step == 1
    assert not leftover.exists()


@pytest.mark.parametrize("damage", ["emptied", "truncated", "no_data"])
def test_a_damaged_one_is_set_aside_for_the_one_before(tmp_path, damage):
    saved(tmp_path / "checkpoints", 1, 2)
    latest = tmp_path / "checkpoints" / "2"
    for file in list(latest.rglob("*")):
        if file.is_file() and (damage != "no_data" or "data" in file.relative_to(latest).parts):
            file.write_bytes(b"") if damage == "truncated" else file.unlink()
    # a reader sets nothing aside
    arrays, step = load_params(tmp_path, some_state(0))
    assert step == 1
    assert latest.exists()
    chex.assert_trees_all_equal(arrays, some_state(1)["params"])
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.restore(some_state(0)).step == 1
    checkpoints.save(2, some_state(2), {})  # its place is free again
    assert checkpoints.restore(some_state(0)).step == 2


def test_when_none_fits_the_error_says_so_and_all_stay(tmp_path):
    saved(tmp_path, 1, 2)
    other = {**some_state(0), "params": {"layer": {"kernel": np.zeros((4, 4), np.float32)}}}
    with pytest.raises(ValueError, match=r"no checkpoint in .* fits this model"):
        Checkpoints(tmp_path).restore(other)
    assert Checkpoints(tmp_path).steps() == [2, 1]
