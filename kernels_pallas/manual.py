"""Kernels inside `jax.shard_map`, where types say over which axes of the mesh an array varies.

What a kernel gives varies wherever one of its inputs does. `pallas_call` has to be told so; `plgpu.kernel` says that
nothing varies, and gradients would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend.core import jaxpr_as_fun


def pallas_call(kernel: Callable[..., None], *, out_shape: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """`pl.pallas_call` of arrays that vary over any axes, each over its own."""

    def run(*arrays: Any) -> Any:
        axes = _axes(arrays)
        alike = [_vary(x, axes) for x in arrays]
        kind = jax.typeof(alike[0]).manual_axis_type
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=kind) for x in out_shape]
        return pl.pallas_call(kernel, out_shape=shapes, **options)(*alike)

    return run


def varying(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """What `plgpu.kernel` makes, traced as outside of any mesh; its outputs vary wherever an input does."""

    def run(*arrays: Any) -> Any:
        axes = _axes(arrays)
        if not axes:
            return kernel(*arrays)
        plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        program, shapes = jax.make_jaxpr(kernel, return_shape=True)(*plain)
        found = jaxpr_as_fun(program)(*arrays)
        return jax.tree.unflatten(jax.tree.structure(shapes), [_vary(x, axes) for x in found])

    return run


def _axes(arrays: Sequence[Any]) -> frozenset[str]:
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def _vary(x: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(jnp.asarray(x), missing, to="varying") if missing else x
