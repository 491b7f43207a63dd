"""Families run their kernels inside `jax.shard_map`, rows over devices, as the training loop does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from seqmodels.operators import delta_rule, diagonal_scan, gated_linear_attention, kernels, mlstm_scan, selective_scan
from tests.kernels.common import H100, TPU, gpu_kernels_of, kernels_of
from tests.kernels.hopper import interpreted, pretend_hopper

T, SIZE = 5, 64
FLOAT32 = 1e-5  # sums of 64 products in another order
BFLOAT16 = 3e-2  # four times its rounding, as the scores and the weighed keys are rounded


def type_of(name: str) -> Any:
    """What the kernels for GPUs take."""
    return jnp.float32 if name in ("diagonal", "selective") else jnp.bfloat16


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / shape[-1] ** 0.5


def matrices(dtype: Any) -> list[jax.Array]:
    return [normal(seed, 2, T, 1, SIZE).astype(dtype) for seed in (1, 2, 3)]


def gates(*shape: int) -> jax.Array:
    return -jnp.abs(normal(4, 2, T, *shape))


def outer(q: Any, k: Any, v: Any, g: Any, **how: Any) -> Any:
    return gated_linear_attention(q, k, v, g, **how)


def bonus(q: Any, k: Any, v: Any, g: Any, shared: Any, **how: Any) -> Any:
    return gated_linear_attention(q, k, v, g, bonus=shared, **how)


# A family's call, arrays of rows, and arrays that all rows share.
CASES: dict[str, tuple[Callable[..., Any], Callable[[Any], list[jax.Array]], list[jax.Array]]] = {
    "outer": (outer, lambda kind: [*matrices(kind), gates(1)], []),
    "outer, no decay": (gated_linear_attention, matrices, []),
    "outer, a bonus": (bonus, lambda kind: [*matrices(kind), gates(1, SIZE)], [normal(5, 1, SIZE)]),
    "delta": (delta_rule, lambda kind: [*matrices(kind), jnp.exp(gates(1)), gates(1)], []),
    "delta, a decay per key": (delta_rule, lambda kind: [*matrices(kind), jnp.exp(gates(1)), gates(1, SIZE)], []),
    "exponential": (mlstm_scan, lambda kind: [*matrices(kind), gates(1), gates(1)], []),
    "diagonal": (
        lambda x, rate, **how: diagonal_scan(rate, x, **how),
        lambda _: [normal(1, 2, T, SIZE)],
        [-jnp.abs(normal(5, SIZE))],
    ),
    "selective": (
        lambda x, dt, b, c, a, **how: selective_scan(x, dt, a, b, c, **how),
        lambda _: [normal(1, 2, T, SIZE), jnp.exp(normal(2, 2, T, SIZE)), normal(3, 2, T, 4), normal(4, 2, T, 4)],
        [-jnp.exp(normal(5, SIZE, 4))],
    ),
}


def graded(run: Callable[..., Any], mesh: Any = None, *, check_vma: bool = True) -> Callable[..., Any]:
    """A loss and its gradients, of arrays of rows and shared ones: of one device, or with rows over those of a mesh."""

    def loss(rows: Any, shared: Any) -> Any:
        found = jax.tree.leaves(run(*rows, *shared))
        total = sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in found)
        return total if mesh is None else jax.lax.psum(total, mesh.axis_names)

    if mesh is not None:
        specs = (PartitionSpec(mesh.axis_names), PartitionSpec())
        loss = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check_vma)
    return jax.value_and_grad(loss, argnums=(0, 1))


def check(
    name: str, dtype: Any, *, devices: int, check_vma: bool, tolerance: float, pretend: Callable[[], None]
) -> None:
    call, rows, shared = CASES[name]
    run = lambda method: functools.partial(call, method=method)
    right = jax.jit(graded(run("sequential")))(rows(dtype), shared)
    pretend()
    mesh = Mesh(jax.devices()[:devices], ("data",))
    found = jax.jit(graded(run("pallas"), mesh, check_vma=check_vma))(rows(dtype), shared)
    close = lambda x, y: chex.assert_trees_all_close(x, y, rtol=tolerance, atol=tolerance * float(jnp.max(jnp.abs(y))))
    jax.tree.map(lambda x, y: close(x.astype(jnp.float32), y.astype(jnp.float32)), found, right)


both = pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
cases = pytest.mark.parametrize("name", CASES)


@both
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[] if x in ("outer, a bonus", "delta", "diagonal") else pytest.mark.slow) for x in CASES],
)
def test_kernels_for_tpus_run_inside_shard_map(name: str, check_vma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients, those of what all rows share among them, are those of one device."""
    pretend = lambda: monkeypatch.setattr(kernels, "INTERPRET", pltpu.InterpretParams())
    check(name, jnp.float32, devices=2, check_vma=check_vma, tolerance=FLOAT32, pretend=pretend)


@interpreted
@both
@cases
@pytest.mark.slow
def test_kernels_for_gpus_run_inside_shard_map(name: str, check_vma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one device: jax interprets the kernels of one alone."""
    tolerance = BFLOAT16 if type_of(name) == jnp.bfloat16 else FLOAT32
    pretend = lambda: pretend_hopper(monkeypatch)
    check(name, type_of(name), devices=1, check_vma=check_vma, tolerance=tolerance, pretend=pretend)


@pytest.mark.parametrize("mesh", [TPU, pytest.param(H100, marks=pytest.mark.slow)], ids=["tpu", "h100"])
@cases
def test_kernels_lower_inside_shard_map(name: str, mesh: Any) -> None:
    """Types fit those of the mesh: gradients of what rows share are summed over it."""
    call, rows, shared = CASES[name]
    found = graded(functools.partial(call, method="pallas"), mesh)
    assert (kernels_of if mesh is TPU else gpu_kernels_of)(found, rows(type_of(name)), shared) >= 2
