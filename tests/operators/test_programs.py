"""What the families compile to."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from seqmodels.operators import delta_rule, diagonal_scan, gated_linear_attention, mlstm_scan, selective_scan

pytestmark = pytest.mark.optimised
LENGTH, WIDTH = 64, 16


def by_hand(log_decay: Any, drive: Any) -> Any:
    def body(hidden: Any, x: Any) -> Any:
        hidden = jnp.exp(x[0]) * hidden + x[1]
        return hidden, hidden

    over_time = lambda x: jnp.moveaxis(x, 1, 0)
    start = jnp.zeros((1, WIDTH), drive.dtype)
    return over_time(jax.lax.scan(body, start, (over_time(log_decay), over_time(drive)))[1])


def instructions(function: Any, *arguments: Any) -> list[str]:
    """Shapes and operations of the optimised program, in order, without names."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return re.findall(r"= (.*? [\w-]+)\(", text)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere the rules choose another method")
@pytest.mark.parametrize("gradients", [False, True])
def test_on_a_cpu_the_diagonal_scan_is_a_loop_that_moves_nothing(gradients: bool) -> None:
    """`sequential` is what one writes by hand, which brings time to the front; `auto` leaves arrays as they are."""
    x = jnp.ones((1, LENGTH, WIDTH))

    def program(function: Any) -> Any:
        if not gradients:
            return function
        return jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), (0, 1))

    runs = {method: lambda *x, m=method: diagonal_scan(*x, method=m)[0] for method in ("auto", "sequential", "chunked")}
    found = {name: sorted(instructions(program(run), -x, x)) for name, run in runs.items()}
    theirs = sorted(instructions(program(by_hand), -x, x))
    assert found["sequential"] == theirs
    assert found["chunked"] != theirs
    moved = f"f32[{LENGTH},1,{WIDTH}]"
    assert any(moved in line for line in theirs)
    assert not any(moved in line for line in found["auto"])
    assert sum(line.endswith(" while") for line in found["auto"]) == 1 + gradients


def matrices(length: int, size: int, gate: int, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """Three arrays [B, T, H, K] and the gates [B, T, H] or [B, T, H, K], which are float32."""
    x, gates = jnp.ones((1, length, 1, size), dtype), jnp.ones((1, length, 1, size))
    return (x, x, x), (gates if gate == 4 else gates[..., 0])


def selective(length: int, size: int) -> Any:
    x, b = jnp.ones((1, length, size)), jnp.ones((1, length, size))
    return lambda x, b: selective_scan(x, x, -jnp.ones((size, size)), b, b, method="chunked")[0], (x, b)


PROGRAMS = {
    "outer": lambda n, k: (lambda x, g: gated_linear_attention(*x, -g)[0], matrices(n, k, 3)),
    "outer, a decay per key": lambda n, k: (lambda x, g: gated_linear_attention(*x, -g)[0], matrices(n, k, 4)),
    "outer, a bonus": lambda n, k: (lambda x, g: gated_linear_attention(*x, -g, bonus=g[0, 0])[0], matrices(n, k, 4)),
    "delta": lambda n, k: (lambda x, g: delta_rule(*x, g, -g)[0], matrices(n, k, 3)),
    "delta, a decay per key": lambda n, k: (lambda x, g: delta_rule(*x, g[..., 0], -g)[0], matrices(n, k, 4)),
    "exponential, bfloat16": lambda n, k: (lambda x, g: mlstm_scan(*x, g, -g)[0], matrices(n, k, 3, jnp.bfloat16)),
    "selective": selective,
}


def trained(function: Any, arguments: Any) -> Any:
    """Compiled with the gradients of its arguments."""
    return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), (0, 1))).lower(*arguments).compile()


def entries(program: Any) -> list[int]:
    """Of every array of floats in the program, whatever their width."""
    return [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\bb?f\d+\[([\d,]+)\]", program.as_text())]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "outer" else pytest.mark.slow) for name in PROGRAMS]
)
def test_states_of_all_steps_are_in_no_array(name: str) -> None:
    """Of a training step's program no array has T K V entries (T D N), and what it needs grows as T does.

    Lengths are beyond what is kept at once for the gradient: from there on parts are computed again.
    """
    size, needed = 32, []
    for length in (2048, 4096):
        program = trained(*PROGRAMS[name](length, size))
        largest = max(entries(program))
        assert length * size <= largest < length * size * size
        needed.append(program.memory_analysis().temp_size_in_bytes)
    assert needed[1] < 2.1 * needed[0]


def test_states_of_all_steps_would_be_seen() -> None:
    x, g = matrices(512, 32, 3)
    program = lambda x, g: gated_linear_attention(*x, -g, method="associative")[0]
    assert max(entries(jax.jit(program).lower(x, g).compile())) >= 512 * 32 * 32
