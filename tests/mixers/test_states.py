"""States and configs: what a mixer starts from, what it declares, what a cache holds."""

from __future__ import annotations

import dataclasses

import chex
import jax
import numpy as np
import pytest

from seqmodels import params
from tests.mixers.properties import (
    BATCH,
    CAPACITY,
    CONFIGS,
    FLOAT32,
    RECURRENT,
    Carry,
    assert_close,
    assert_valid_close,
    layout,
    subject,
    tokens,
)

every_mixer = pytest.mark.parametrize("name", CONFIGS)

# Logical axes in use (params.param): a parameter with another one has no rule in any sharding.
AXES = ("layers", "vocab", "embed", "mlp", "heads", "recurrent", "state")


@every_mixer
def test_state_none_starts_where_init_state_does(name: str) -> None:
    s, x = subject(name), tokens(0, BATCH, 1)
    segments = layout("-", "+", "-", ".")
    none, after_none = s.forward(s.params, x, Carry(None, np.zeros(BATCH, np.int32)), segments)
    y, after = s.forward(s.params, x, s.fresh, segments)
    assert_valid_close(none, y, segments.valid)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, s.fresh)
    if name in RECURRENT:
        assert_close(after_none, after, FLOAT32)
        longer = s.mixer.init_state(BATCH, capacity=10 * CAPACITY)
        chex.assert_trees_all_equal_shapes_and_dtypes(longer, s.fresh.state)


@every_mixer
def test_config_and_parameters_are_declared(name: str) -> None:
    """The config is a value; every parameter has an optimiser group and one logical axis per dimension."""
    config, s = CONFIGS[name], subject(name)
    copy = dataclasses.replace(config)
    assert copy == config
    assert hash(copy) == hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, None)
    assert set(jax.tree.leaves(params.labels(s.mixer))) <= set(params.Group)
    specs = params.partition_specs(s.mixer, dict.fromkeys(AXES))
    chex.assert_trees_all_equal_structs(params.labels(s.mixer), s.params)
    jax.tree.map(lambda array, spec: np.testing.assert_equal(len(spec), array.ndim), s.params, specs)
