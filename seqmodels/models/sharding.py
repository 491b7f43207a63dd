"""Meshes of devices with the axes data, fsdp and sequence, and where the arrays of a run lie on them.

Rows of a batch are divided over `data` and `fsdp`, time over `sequence`. Parameters and their moments are divided over
`fsdp` along the model's width (the logical axis `embed`); a layer's are gathered when it runs and dropped after it, and
gradients are summed into shards. The program is written for one device's share, under `shard_map` over all axes, so
that it is the same with one device, on fake ones, and on a pod, and kernels need no partitioning rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from seqmodels import params

DATA, FSDP, SEQUENCE = AXES = ("data", "fsdp", "sequence")
SHARDED = "embed"
"""The logical axis of parameters that `fsdp` divides."""


def make_mesh(data: int = 1, fsdp: int = 1, sequence: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first `data * fsdp * sequence` devices; `data=-1` takes as many as there are.

    The devices of one sequence are neighbours, then those that share parameters. Raises ValueError where there are too
    few devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if data == -1:
        data = max(len(devices) // (fsdp * sequence), 1)
    size = data * fsdp * sequence
    if size > len(devices):
        raise ValueError(
            f"a mesh of data {data} x fsdp {fsdp} x sequence {sequence} needs {size} devices, and there are "
            f"{len(devices)}: choose smaller axes, or data=-1 for as many as there are (on a CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={size} makes as many fake ones)"
        )
    return jax.make_mesh((data, fsdp, sequence), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:size])


def parameter_specs(model: Any, mesh: Mesh) -> dict[str, Any]:
    """A `PartitionSpec` for every array of a model.

    Raises ValueError where a sharded axis of a parameter is not a multiple of the mesh's.
    """
    axes = params.logical_axes(model)
    names = {name for leaf in jax.tree.leaves(axes, is_leaf=_is_axes) for name in leaf if name is not None}
    over = FSDP if mesh.shape[FSDP] > 1 else None
    specs = params.partition_specs(model, {name: over if name == SHARDED else None for name in names})
    if over is not None:
        jax.tree.map(lambda array, axes: _check_divides(array, axes, mesh), params.split(model)[1], axes)
    return specs


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)


def _check_divides(array: Any, axes: tuple[str | None, ...], mesh: Mesh) -> None:
    sizes = {size for size, axis in zip(array.shape, axes, strict=True) if axis == SHARDED}
    if any(size % mesh.shape[FSDP] for size in sizes):
        raise ValueError(
            f"a parameter of shape {array.shape} with logical axes {axes} cannot be divided over fsdp="
            f"{mesh.shape[FSDP]}: make the model's width a multiple of it, or fsdp smaller"
        )


def check_batch(batch_size: int, length: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises ValueError where a batch of `[batch_size, length]` cannot be divided over the mesh."""
    rows = mesh.shape[DATA] * mesh.shape[FSDP]
    if batch_size % (rows * accumulate):
        raise ValueError(
            f"a batch of {batch_size} rows cannot be divided into {accumulate} accumulated part(s) over data "
            f"{mesh.shape[DATA]} x fsdp {mesh.shape[FSDP]}: make train.batch_size a multiple of {rows * accumulate}, "
            "or choose a smaller mesh"
        )
    if length % mesh.shape[SEQUENCE]:
        raise ValueError(
            f"rows of {length} tokens cannot be divided over sequence {mesh.shape[SEQUENCE]}: make train.length a "
            "multiple of it, or choose a smaller mesh"
        )


def batch_spec(rank: int) -> PartitionSpec:
    """Of an array `[B, T, ...]`, or `[B]`."""
    return PartitionSpec((DATA, FSDP), *([SEQUENCE] if rank > 1 else []))


def place_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """A host's batch on the mesh; with several processes each holds all of it and keeps its own devices' share."""

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, batch_spec(x.ndim)), lambda index: x[index])

    return {name: place(x) for name, x in batch.items()}


class Placement(NamedTuple):
    """A mesh, and a `PartitionSpec` for every array of a model on it."""

    mesh: Mesh
    specs: dict[str, Any]

    @classmethod
    def of(cls, model: Any, mesh: Mesh) -> Placement:
        """Raises as `parameter_specs`; TypeError where a model can only be divided by rows and the mesh asks for more.

        A model that has `on_mesh(sequence_axis=, parameter_axis=)` can be divided over every axis.
        """
        if not hasattr(model, "on_mesh") and mesh.shape[FSDP] * mesh.shape[SEQUENCE] > 1:
            raise TypeError(
                f"{type(model).__name__} has no on_mesh(sequence_axis=, parameter_axis=): it can be divided over data "
                f"alone, not over fsdp={mesh.shape[FSDP]} or sequence={mesh.shape[SEQUENCE]}"
            )
        return cls(mesh, parameter_specs(model, mesh))

    @property
    def shardings(self) -> dict[str, Any]:
        """As `specs`, with the mesh."""
        is_spec = lambda x: isinstance(x, PartitionSpec)
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs, is_leaf=is_spec)

    @property
    def everywhere(self) -> NamedSharding:
        """The same on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """Of arrays `[B, ...]` without a time axis, as states are."""
        return NamedSharding(self.mesh, batch_spec(1))

    def enter(self, model: Any) -> Any:
        """The model, to be called inside `shard_map` over the mesh."""
        used = {axis: axis if self.mesh.shape[axis] > 1 else None for axis in (SEQUENCE, FSDP)}
        if not any(used.values()):
            return model
        return model.on_mesh(sequence_axis=used[SEQUENCE], parameter_axis=used[FSDP])
