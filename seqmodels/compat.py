"""The places where jax 0.10 and 0.12, devices, or tracing inside and outside `shard_map`, differ."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Tree = TypeVar("Tree")


def device() -> Any:
    """What a program is made for: the abstract mesh's device where one is set, else jax's default."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    default: Any = jax.config.values["jax_default_device"]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    return abstract or default or jax.devices()[0]


def on_cpu() -> bool:
    return device().platform == "cpu"


def varying_axes(x: Any) -> frozenset[str]:
    """Mesh axes over which `x` is typed as varying; empty outside `shard_map` and under `check_vma=False`."""
    aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    kind = aval.manual_axis_type  # None in a ShapeDtypeStruct without one
    return frozenset() if kind is None else frozenset(kind.varying)


def vary_over(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Types `x` as varying over `axes`, which a loop's carry needs where its next value varies."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_alike(tree: Tree) -> Tree:
    """Every leaf typed as varying over all the mesh axes that one of them varies over."""
    axes = frozenset().union(*(varying_axes(leaf) for leaf in jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: vary_over(jnp.asarray(leaf), axes), tree)


def gather_along(x: jax.Array, axis_name: str) -> jax.Array:
    """Every device's `x`, stacked on a new leading axis, the same on all devices of `axis_name`.

    Typed as invariant under `check_vma=True`, so that what is computed from it alone may leave `shard_map` replicated.
    """
    axes = varying_axes(lax.axis_index(axis_name))
    if axis_name not in axes:  # check_vma=False: types carry no axes
        return lax.all_gather(x, axis_name)
    return lax.all_gather(vary_over(x, axes), axis_name, to="invarying")


def wide_einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two operands, accumulated and returned in at least float32 whatever their types.

    Accelerators multiply bfloat16 operands as they are; XLA for CPU lacks such dots in some shapes, and widens first.
    """
    wide = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    if on_cpu():
        a, b = a.astype(wide), b.astype(wide)
    return jnp.einsum(subscripts, a, b, preferred_element_type=wide)
