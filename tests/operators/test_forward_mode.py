"""Forward-mode differentiation passes the scan over tokens, as the documentation of the chunk forms says."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.operators import delta_rule, diagonal_scan, gated_linear_attention, mlstm_scan, selective_scan

B, T, H, K = 1, 6, 2, 3
ROUNDING_64 = 1e-12


def _matrices(scan: Any, gates: int) -> tuple[Any, list[Any]]:
    draw = np.random.default_rng(0).standard_normal
    arrays = [draw((B, T, H, K)) for _ in range(3)] + [draw((B, T, H)) for _ in range(gates)]
    return lambda *x: scan(*x[:3], *(-jnp.exp(gate) for gate in x[3:]), method="sequential")[0], arrays


def _selective() -> tuple[Any, list[Any]]:
    draw = np.random.default_rng(0).standard_normal
    arrays = [draw((B, T, H)), draw((B, T, H)), draw((H, K)), draw((B, T, K)), draw((B, T, K))]
    run = lambda x, dt, a, b, c: selective_scan(x, jnp.exp(dt), -jnp.exp(a), b, c, method="sequential")[0]
    return run, arrays


def _diagonal() -> tuple[Any, list[Any]]:
    draw = np.random.default_rng(0).standard_normal
    run = lambda log_decay, drive: diagonal_scan(-jnp.exp(log_decay), drive, method="sequential")[0]
    return run, [draw((B, T, H)), draw((B, T, H))]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(lambda: _matrices(gated_linear_attention, 1), id="outer"),
        pytest.param(
            lambda: _matrices(lambda q, k, v, g, **o: delta_rule(q, k / 3, v, jnp.exp(g), g, **o), 1), id="delta"
        ),
        pytest.param(lambda: _matrices(mlstm_scan, 2), id="exponential"),
        pytest.param(_selective, id="selective"),
        pytest.param(_diagonal, id="diagonal"),
    ],
)
def test_it_is_the_transpose_of_the_gradient(case: Any) -> None:
    with jax.enable_x64(True):
        run, arrays = case()
        random = np.random.default_rng(1)
        directions = [jnp.asarray(random.standard_normal(x.shape)) for x in arrays]
        out, along = jax.jvp(run, [jnp.asarray(x) for x in arrays], directions)
        weights = jnp.asarray(random.standard_normal(out.shape))
        gradients = jax.vjp(run, *(jnp.asarray(x) for x in arrays))[1](weights)
        expected = sum(jnp.vdot(d, g) for d, g in zip(directions, gradients, strict=True))
        assert jnp.vdot(along, weights) == pytest.approx(float(expected), rel=ROUNDING_64)
