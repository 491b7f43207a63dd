"""Time sharded over eight fake devices equals one device: outputs, states, gradients, and what travels."""

from __future__ import annotations

import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from seqmodels.operators import Diagonal, Outer, diagonal_recurrence, outer_recurrence
from seqmodels.scan import Recurrence, scan, sharded_scan
from tests.scan.examples import AFFINE, PRODUCT

pytestmark = pytest.mark.optimised
# float32 rounding over 24 steps, associated differently.
ROUNDING = 5e-5
DEVICES, LENGTH = 8, 24
TIME = PartitionSpec("time")


def _mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((DEVICES,), ("time",), axis_types=(AxisType.Auto,))


def _cases() -> dict[str, tuple[Recurrence, Any, Any]]:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    decay = -jnp.exp(normal(LENGTH, 4))
    return {
        "affine": (AFFINE.recurrence, AFFINE.inputs(rng, LENGTH), normal(3)),
        "product": (PRODUCT.recurrence, PRODUCT.inputs(rng, LENGTH), normal(3, 3)),
        "complex": (diagonal_recurrence(), Diagonal(decay + 1j, normal(LENGTH, 4)), normal(4).astype(jnp.complex64)),
        "outer": (
            outer_recurrence(),
            Outer(normal(LENGTH, 4), normal(LENGTH, 4), normal(LENGTH, 2), decay),
            normal(4, 2),
        ),
    }


def _sharded(recurrence: Recurrence, check_vma: bool) -> Any:
    def device(inputs: Any, state: Any, reset: Any, valid: Any) -> Any:
        return sharded_scan(recurrence, inputs, state, axis_name="time", reset=reset, valid=valid, chunk=2)

    specs = (TIME, PartitionSpec(), TIME, TIME)
    return jax.jit(
        jax.shard_map(device, mesh=_mesh(), in_specs=specs, out_specs=(TIME, PartitionSpec()), check_vma=check_vma)
    )


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["affine", "product", "complex", "outer"])
def test_eight_devices_equal_one(name: str, check_vma: bool) -> None:
    recurrence, inputs, state = _cases()[name]
    rng = np.random.default_rng(1)
    run = _sharded(recurrence, check_vma)
    reset, valid = jnp.asarray(rng.random(LENGTH) < 0.15), jnp.asarray(rng.random(LENGTH) < 0.8)

    def loss(run: Any) -> Any:
        def total(inputs: Any, state: Any) -> Any:
            outputs, final = run(inputs, state)
            weights = jnp.cos(jnp.arange(final.size)).reshape(final.shape)
            return jnp.sum(jnp.abs(outputs) ** 2) + jnp.sum(jnp.abs(final * weights) ** 2), (outputs, final)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)

    got = jax.jit(loss(lambda x, s: run(x, s, reset, valid)))(inputs, state)
    expected = jax.jit(loss(lambda x, s: scan(recurrence, x, s, reset=reset, valid=valid, method="sequential")))(
        inputs, state
    )
    chex.assert_trees_all_close(got, expected, rtol=ROUNDING, atol=ROUNDING)
    chex.assert_trees_all_equal_dtypes(got, expected)


def test_what_travels_is_one_element_a_device() -> None:
    recurrence, inputs, state = _cases()["outer"]
    text = (
        _sharded(recurrence, True)
        .lower(inputs, state, jnp.zeros(LENGTH, bool), jnp.ones(LENGTH, bool))
        .compile()
        .as_text()
    )
    gathered = re.findall(r"= (\w+\[[\d,]*\])\S* all-gather\(", text)
    assert sorted(gathered) == ["f32[8,4,2]", "f32[8,4]", "pred[8]"], "a flag, the decay and the memory of each span"
    assert not re.search(r"(all-reduce|all-to-all|collective-permute)\(", text)
