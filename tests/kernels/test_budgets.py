"""What the memory of a device cannot hold is refused by name, before a compiler is asked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from seqmodels.operators import delta_rule, diagonal_scan, gated_linear_attention, mlstm_scan, selective_scan
from tests.kernels.common import H100, TPU

LENGTH = 256


def array(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct((1, LENGTH, *shape), dtype)


def matrices(size: int, *gates: tuple[int, ...]) -> list[Any]:
    return [*[array(1, size)] * 3, *(array(1, *gate) for gate in gates)]


def selective(size: int) -> list[Any]:
    return [*[array(128)] * 2, jax.ShapeDtypeStruct((128, size), jnp.float32), *[array(size)] * 2]


CASES: dict[str, tuple[Any, Callable[..., Any], list[Any], dict[str, Any], str]] = {
    "outer": (
        TPU,
        gated_linear_attention,
        matrices(512, ()),
        {},
        r"outer family: heads of 512 keys and 512 values take",
    ),
    "a long chunk": (TPU, gated_linear_attention, matrices(64, ()), {"chunk": 2048}, r"outer family: heads of 64 keys"),
    "narrow heads, which fill 128 lanes": (
        TPU,
        gated_linear_attention,
        matrices(64, ()),
        {"chunk": 512},
        r"outer family: heads of 64 keys and 64 values take 16842752 bytes of VMEM",
    ),
    "outer, a decay per key": (TPU, gated_linear_attention, matrices(512, (512,)), {}, r"take \d+ bytes of VMEM, more"),
    "delta": (TPU, delta_rule, matrices(1024, (), ()), {}, r"delta family: heads of 1024 keys and 1024 values take"),
    "delta, a decay per key": (TPU, delta_rule, matrices(512, (), (512,)), {}, r"delta family: heads of 512 keys"),
    "exponential": (TPU, mlstm_scan, matrices(1024, (), ()), {}, r"exponential family: heads of 1024 keys"),
    "diagonal": (TPU, diagonal_scan, [array(5000)] * 2, {}, r"diagonal family: 5000 channels take"),
    "selective": (TPU, selective_scan, selective(64), {}, r"selective family: states of 64 take \d+ bytes of VMEM"),
    "selective on a GPU": (H100, selective_scan, selective(64), {}, r"states of 64 take \d+ bytes of shared memory"),
    "pairs": (TPU, gated_linear_attention, matrices(64, (64,)), {"chunk": 384}, r"a power of two of them, not 384"),
    "pairs of delta": (TPU, delta_rule, matrices(64, (), (64,)), {"chunk": 384}, r"a power of two of them, not 384"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_with_a_way_out(name: str) -> None:
    mesh, call, arrays, options, told = CASES[name]
    run = functools.partial(call, method="pallas", **options)
    refused = pytest.raises(ValueError, match=rf"method='pallas' for the .*{told}.*; use 'auto'")
    with refused, jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(run, *arrays)
