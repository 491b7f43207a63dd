"""A model's state by name, and states that some layers have no part in."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import ModelConfig, Segments
from seqmodels.layers import MLPConfig
from seqmodels.mixers import AttentionConfig, Mamba2Config, PrefixScan, RetNetConfig, RGLRUConfig
from seqmodels.models.memory import Role, described, fresh_memory, named, replaced, rows_first
from seqmodels.typing import Memory

BATCH, LENGTH = 2, 8
FULL = AttentionConfig(heads=2)
MAMBA = Mamba2Config(head_size=8, state_size=4, expansion=1.0)
RECURRENT = RGLRUConfig(recurrent_size=16, blocks=2)


def make(*mixers, repeats: int = 2):
    config = ModelConfig(32, 16, ((mixers, repeats), ((RECURRENT,), 1)), channel=MLPConfig(expansion=1))
    return config.make(rngs=nnx.Rngs(0))


def test_every_array_is_described() -> None:
    model = make(MAMBA, FULL)
    found = described(model)
    assert {name: (leaf.role, leaf.shape) for name, leaf in found.items()} == {
        "position": (Role.COMPANION, ()),
        "layers.0.0.conv": (Role.REST, (2, 3, 24)),
        "layers.0.0.ssm": (Role.MEMORY, (2, 2, 4, 8)),
        "layers.0.2.key": (Role.REST, (2, 1, 2, 8)),
        "layers.0.2.value": (Role.REST, (2, 1, 2, 8)),
        "layers.0.2.length": (Role.REST, (2,)),
        "layers.1.0.conv": (Role.REST, (1, 3, 16)),
        "layers.1.0.hidden": (Role.MEMORY, (1, 16)),
        "layers.1.0.length": (Role.COMPANION, (1,)),
    }
    assert found["layers.0.0.ssm"].heads
    assert not found["layers.1.0.hidden"].heads
    state = model.init_state(3, 1)
    assert list(named(state)) == list(found)
    rows = rows_first(named(state))
    assert {name: x.shape for name, x in rows.items()} == {name: (3, *leaf.shape) for name, leaf in found.items()}
    chex.assert_trees_all_equal(replaced(state, rows_first(rows)), state)
    with pytest.raises(ValueError, match=r"no layers\.9; it has position"):
        replaced(state, {"layers.9": jnp.zeros(1)})


def test_a_declaration_that_names_nothing_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(type(make(MAMBA).stack.groups[0].steps[0].layer), "recurrent_memory", Memory(("sms",)))
    with pytest.raises(ValueError, match=r"Mamba2\.recurrent_memory names 'sms'"):
        described(make(MAMBA))
    with pytest.raises(TypeError, match="Linear has no init_state"):
        described(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))


PSM = PrefixScan(aggregator=(((FULL,), 1),), inference=(((FULL,), 1),), chunk=4)


@pytest.mark.parametrize("mixer", [FULL, PSM, RetNetConfig(heads=2)], ids=["attention", "psm", "retnet"])
def test_layers_without_a_state_start_fresh(mixer) -> None:
    """A row that goes on from an empty memory is a row that starts; full attention needs no cache and a PSM no loop."""
    model = make(mixer, MAMBA, repeats=1)
    tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH), 0, 32)
    start = np.zeros((BATCH, LENGTH), bool)
    start[0, 4] = True
    goes_on = Segments(jnp.asarray(start), jnp.ones_like(start))
    begins = goes_on._replace(start=goes_on.start.at[:, 0].set(True))
    state = fresh_memory(model, BATCH)
    assert (state.layers[0][0] is None) != isinstance(mixer, RetNetConfig)
    forward = jax.jit(lambda tokens, state, segments: model(tokens, state, segments))
    fresh, after = forward(tokens, None, begins)
    logits, again = forward(tokens, state, goes_on)
    np.testing.assert_allclose(logits, fresh, rtol=1e-5, atol=1e-5)
    memory = {name for name, leaf in described(model).items() if leaf.role == Role.MEMORY}
    pick = lambda state: {name: x for name, x in named(state).items() if name in memory}
    chex.assert_trees_all_close(pick(again), pick(after), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="belongs to another model"):
        model(tokens, state._replace(layers=state.layers[:1]))
