"""Eight devices against one: loss and gradients of every mixer, whole runs, and what a mesh refuses."""

from __future__ import annotations

import os
import signal
from typing import Any

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from seqmodels import ModelConfig, params
from seqmodels.layers import MLPConfig
from seqmodels.layers.stack import alignment
from seqmodels.models.sharding import Placement, make_mesh, place_batch
from seqmodels.train import Interrupted, MeshConfig, language_model_loss, train
from seqmodels.train.step import make_objective, place
from tests.mixers.properties import CONFIGS, SEQUENTIAL
from tests.train.test_loop import Trouble
from tests.train.test_step import Bigram
from tests.train.tiny import FULL, loader, tiny_config, tiny_model

# Sums of a few thousand float32 terms in another order, through up to eight layers (4e-6 was the worst seen).
ROUNDING = 3e-5
# Adam divides by the size of each gradient: the relative rounding of the smallest reaches a step of the learning rate
# (3e-3); it starts from 1e-3 of that.
RUN = 1e-3
VOCABULARY, BATCH, LENGTH, WIDTH = 32, 8, 16, 64
# (data, fsdp, sequence)
EVERY_AXIS, ROWS = (2, 2, 2), (2, 4, 1)


def batch(alignment: int = 1) -> dict[str, np.ndarray]:
    """Packed documents of several lengths, padding that a device's share may consist of, unequal counts of tokens."""
    random = np.random.default_rng(0)
    tokens, targets = random.integers(0, VOCABULARY, (2, BATCH, LENGTH))
    start, valid = random.random((BATCH, LENGTH)) < 0.2, np.ones((BATCH, LENGTH), bool)
    start &= np.arange(LENGTH) % alignment == 0
    start[:, 0] = True
    valid[1, 5:] = valid[2, 9:] = False
    return {"tokens": tokens, "targets": targets, "start": start & valid, "valid": valid}


def assert_mesh_equals_one_device(config: ModelConfig, shape: tuple[int, int, int]) -> None:
    """Loss and gradients; and the gradients come divided as the parameters are."""
    model = config.make(rngs=nnx.Rngs(0))
    definition, arrays = params.split(model)
    placement, key, rows = Placement.of(model, make_mesh(*shape)), jax.random.key(0), batch(alignment(config.layers))
    of = lambda where: jax.jit(jax.value_and_grad(make_objective(definition, language_model_loss, where), has_aux=True))
    alone = of(None)
    (loss, (_, count)), gradients = alone(arrays, rows, key)
    # Where a norm divides by almost nothing, rounding grows: what one of the parameters does is allowed ten times.
    random = np.random.default_rng(1)
    rounded = jax.tree.map(lambda x: x * (1 + 2.0**-23 * random.choice([-1, 1], x.shape)).astype(x.dtype), arrays)
    moved = alone(rounded, rows, key)[1]
    placed = jax.device_put(arrays, placement.shardings), place_batch(rows, placement.mesh)
    (sharded, (_, tokens)), parts = of(placement)(*placed, key)
    np.testing.assert_allclose(sharded, loss, rtol=ROUNDING)
    assert int(tokens) == int(count) == rows["valid"].sum()

    def compare(one: Any, eight: Any, near: Any, sharding: Any) -> None:
        one, values = np.asarray(one), np.asarray(eight)
        allowed = ROUNDING * np.abs(one).max() + 10 * np.abs(one - near).max()
        np.testing.assert_allclose(values, one, rtol=0, atol=allowed)
        assert eight.sharding.is_equivalent_to(sharding, eight.ndim)

    jax.tree.map(compare, gradients, parts, moved, placement.shardings)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(parts))


def every_layer_config(*names: str, **settings: Any) -> ModelConfig:
    pattern = tuple(CONFIGS[name] for name in names)
    return ModelConfig(VOCABULARY, WIDTH, ((pattern, 2),), channel=MLPConfig(expansion=1), **settings)


@pytest.mark.slow
def test_data_fsdp_and_sequence_together() -> None:
    names = ("rg_lru", "attention")
    assert_mesh_equals_one_device(every_layer_config(*names, tied=False), EVERY_AXIS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_mixer(name: str) -> None:
    assert_mesh_equals_one_device(every_layer_config(name), ROWS if name in SEQUENTIAL else EVERY_AXIS)


def test_every_device_draws_its_own_randomness() -> None:
    """As dropout does: eight draws are not one draw eight times."""

    def draws(model: Any, batch: Any, key: Any) -> Any:
        number = jax.random.uniform(key)
        return 0 * model.table[...].sum(), {"loss": number, "square": number**2}

    model = Bigram()
    definition, arrays = params.split(model)
    for shape in ((8, 1, 1), (1, 1, 1)):
        placement = Placement.of(model, make_mesh(*shape))
        objective = jax.jit(make_objective(definition, draws, placement))
        metrics = objective(arrays, place_batch(batch(), placement.mesh), jax.random.key(0))[1][0]
        spread = float(metrics["square"] - metrics["loss"] ** 2)
        assert spread > 0.01 if shape[0] == 8 else abs(spread) < 1e-6


def run(workdir: Any = None, batches: Any = None, **changes: Any) -> dict[str, Any]:
    """What a short run logs, and its parameters."""
    model = tiny_model(FULL)
    result = train(model, batches or loader(), tiny_config(**changes), workdir=workdir, quiet=True)
    rows = [{name: row[name] for name in ("step", "loss", "gradient_norm")} for row in result.rows]
    return {"params": jax.device_get(result.arrays), "rows": rows}


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    """Gradient accumulation, on one device and over a mesh: parts count by their tokens."""
    whole = run(steps=3)
    for changes in ({"accumulate": 4}, {"accumulate": 2, "mesh": MeshConfig(data=2)}):
        chex.assert_trees_all_close(run(steps=3, **changes), whole, rtol=RUN, atol=RUN)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(tmp_path: Any) -> None:
    """Stopped after two steps and again after four, on other meshes, as if it had always been one device."""
    alone = run(steps=6)
    for mesh in (MeshConfig(fsdp=2), MeshConfig(2, 2, 2)):
        with pytest.raises(Interrupted):
            run(tmp_path, Trouble(2, lambda: os.kill(os.getpid(), signal.SIGTERM)), steps=6, mesh=mesh)
    chex.assert_trees_all_close(run(tmp_path, steps=6), alone, rtol=RUN, atol=RUN)


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        (MeshConfig(data=3), {}, "a batch of 4 rows cannot be divided .* data 3 .* multiple of 3"),
        (MeshConfig(fsdp=2), {"accumulate": 4}, "4 accumulated part"),
        (MeshConfig(sequence=3), {}, "rows of 16 tokens cannot be divided over sequence 3"),
        (MeshConfig(data=4, fsdp=4), {"batch_size": 16}, "needs 16 devices, and there are 8"),
        (MeshConfig(fsdp=8), {"batch_size": 8}, None),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit(mesh: MeshConfig, changes: dict[str, Any], message: str | None) -> None:
    config = tiny_config(mesh=mesh, **changes)
    if message is None:
        assert place(tiny_model(), config) is not None
        return
    with pytest.raises(ValueError, match=message):
        place(tiny_model(), config)


def test_a_width_that_fsdp_does_not_divide() -> None:
    model = ModelConfig(VOCABULARY, 18, (((MLPConfig(expansion=1),), 1),)).make(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\(32, 18\) .*cannot be divided over fsdp=4"):
        Placement.of(model, make_mesh(fsdp=4))


def test_a_model_without_on_mesh_is_divided_by_rows_alone() -> None:
    assert Placement.of(Bigram(), make_mesh(data=8)).mesh.size == 8
    with pytest.raises(TypeError, match="Bigram has no on_mesh"):
        Placement.of(Bigram(), make_mesh(data=2, sequence=2))
