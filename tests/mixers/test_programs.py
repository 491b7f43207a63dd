"""What is compiled, for which platform, and over how many devices."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.sharding import AxisType, Mesh

from tests.mixers.properties import (
    BATCH,
    CONFIGS,
    FLOAT32,
    FLOAT32_GRADIENT,
    MIXED,
    SEQUENTIAL,
    TIME,
    UNBROKEN,
    assert_close,
    assert_valid_close,
    layout,
    subject,
    tokens,
)
from tests.mixers.test_lengths import FAMILIES

every_mixer = pytest.mark.parametrize("name", CONFIGS)
every_sharded = pytest.mark.parametrize("name", [name for name in CONFIGS if name not in SEQUENTIAL])


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects what XLA compiles, or loads from the compilation cache, meanwhile."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@every_mixer
def test_compiles_once(name: str) -> None:
    """A returned state, other segments and other tokens run what the first call compiled, for spans and for steps."""
    s = subject(name)
    step = layout(*"----")
    carry = s.launch(tokens(0), s.fresh, MIXED).carry
    _, carry = s.compiled_forward(s.params, tokens(1, BATCH, 1), carry, step)
    with compilations() as seen:
        carry = s.launch(tokens(2), carry, UNBROKEN).carry
        s.compiled_forward(s.params, tokens(3, BATCH, 1), carry, layout("+", ".", "-", "-"))
    assert not seen
    with compilations() as seen:
        jax.jit(lambda: carry.position + 1)()
    assert seen, "this version of jax reports compilations under another name"


@every_mixer
def test_lowers_without_a_device(name: str) -> None:
    """Forward and backward lower for accelerators, both in one program, on a CPU host."""
    s = subject(name)
    traced = s.trace(tokens(0), s.fresh, MIXED)
    lowered = traced.lower(lowering_platforms=("tpu", "cuda"))
    assert "stablehlo.dot_general" in lowered.as_text()


def mesh() -> Mesh:
    return jax.make_mesh((8,), (TIME,), axis_types=(AxisType.Auto,))


@every_sharded
def test_sharded_over_time(name: str) -> None:
    """Eight devices with two tokens each equal one device: outputs, and the state after all of them on every device."""
    s, x = subject(name), tokens(0)
    y, carry = jax.jit(functools.partial(s._forward, mesh=mesh()))(s.params, x, s.warm, MIXED)
    alone = s.run(x, s.warm, MIXED)
    assert_valid_close(y, alone.y, MIXED.valid)
    assert_close(carry, alone.carry, FLOAT32)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name in SEQUENTIAL])
def test_refuses_sharded_time(name: str) -> None:
    """A mixer that needs its time in one place says so, and why."""
    s = subject(name)
    with pytest.raises(ValueError, match=r"(?s)shard.*because|because.*shard"):
        jax.eval_shape(functools.partial(s._forward, mesh=mesh()), s.params, tokens(0), s.fresh, MIXED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "check_vma"),
    [
        (name, check)
        for name in CONFIGS
        if name not in SEQUENTIAL
        for check in (True, False)
        if check or name in FAMILIES
    ],
)
def test_gradients_sharded_over_time(name: str, check_vma: bool) -> None:
    """The gradients to parameters, tokens and the initial state, with and without varying axes in the types."""
    s, x = subject(name), tokens(0)
    alone = s.run(x, s.warm, MIXED)
    sharded = s.run(x, s.warm, MIXED, mesh=mesh(), check_vma=check_vma)
    assert_close(sharded.after, alone.after, FLOAT32)
    assert_close(sharded.gradients, alone.gradients, FLOAT32_GRADIENT)
