"""Nonlinear cells by Newton's method against the same cells token by token; initial values; refusals."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqmodels import params
from seqmodels.mixers import GRUConfig, LSTMConfig, SLSTMConfig
from seqmodels.scan import Jacobian, Newton, NotConvergedError
from seqmodels.typing import Context
from tests.mixers.properties import (
    BATCH,
    CONFIGS,
    FLOAT32,
    FLOAT32_GRADIENT,
    LENGTH,
    MIXED,
    NONLINEAR,
    Subject,
    assert_close,
    assert_valid_close,
    subject,
    tokens,
)

every_cell = pytest.mark.parametrize("name", sorted(NONLINEAR))


@functools.cache
def by_newton(name: str) -> Subject:
    return Subject(dataclasses.replace(CONFIGS[name], method="newton"), caches=False)


@every_cell
def test_newton_equals_the_loop(name: str) -> None:
    """Outputs, states and gradients of documents in padding, from a state that has seen tokens and from a fresh one."""
    loop, newton, x = subject(name), by_newton(name), tokens(0)
    poisoned = np.where(MIXED.valid[..., None], x, np.nan)
    for carry in (loop.warm, loop.fresh):
        expected, found = loop.run(x, carry, MIXED), newton.run(poisoned, carry, MIXED)
        assert_valid_close(found.y, expected.y, MIXED.valid)
        assert_close(found.after, expected.after, FLOAT32)
        gradients = expected.gradients
        assert_close(found.gradients, gradients, FLOAT32_GRADIENT)


@every_cell
def test_newton_on_bfloat16_tokens(name: str) -> None:
    """The recurrence itself is float32, so the method moves outputs by the rounding of bfloat16 at most."""
    loop, newton = subject(name), by_newton(name)
    x = tokens(0).astype(jnp.bfloat16)
    expected, after = loop.forward(loop.params, x, loop.warm, MIXED)
    y, carry = newton.forward(newton.params, x, loop.warm, MIXED)
    assert y.dtype == jnp.bfloat16
    assert_valid_close(y.astype(np.float32), expected.astype(np.float32), MIXED.valid, 2**-8)
    assert_close(carry, after, FLOAT32)


@every_cell
def test_newton_under_a_mesh_of_rows(name: str) -> None:
    """Rows on devices of their own, each with as many iterations as it needs; gradients add up."""
    newton, x = by_newton(name), tokens(0)
    mesh = jax.make_mesh((BATCH,), ("rows",), axis_types=(AxisType.Auto,))

    def mix(arrays: Any, x: Any, segments: Any, positions: Any) -> Any:
        return params.merge(newton.definition, arrays)(x, None, Context(segments, positions))[0]

    rows = P("rows")
    sharded = jax.shard_map(mix, mesh=mesh, in_specs=(P(), rows, rows, rows), out_specs=rows)
    arguments = (x, MIXED, MIXED.positions()[0])
    loss = lambda run: jax.jit(jax.value_and_grad(lambda arrays: jnp.sum(jnp.sin(run(arrays, *arguments)))))
    expected, found = loss(mix)(newton.params), loss(sharded)(newton.params)
    np.testing.assert_allclose(found[0], expected[0], rtol=FLOAT32)
    assert_close(found[1], expected[1], FLOAT32_GRADIENT)


def run(s: Subject, arrays: Any) -> Any:
    return params.merge(s.definition, arrays).run(tokens(1), None, Context.whole(BATCH, LENGTH))


@every_cell
def test_iterations_are_reported(name: str) -> None:
    """Of every row and head; a loop has nothing to report."""
    s = by_newton(name)
    report = jax.jit(functools.partial(run, s))(s.params)[2]
    chex.assert_shape(tuple(report), (BATCH, CONFIGS[name].heads))
    assert 2 <= int(report.iterations.min()) <= int(report.iterations.max()) <= 8
    assert bool(report.converged.all())
    assert jax.eval_shape(functools.partial(run, subject(name)), s.params)[2] is None


def test_too_few_iterations_are_refused() -> None:
    """Outside `jit` by an error that names what to do, within by NaN."""
    config = dataclasses.replace(CONFIGS["gru"], method="newton", newton=Newton(max_iterations=1))
    hasty = Subject(config, caches=False)
    with pytest.raises(NotConvergedError, match=r"after 1 iterations.*max_iterations=1.*method='sequential'"):
        run(hasty, hasty.params)
    assert np.isnan(jax.jit(functools.partial(run, hasty))(hasty.params)[0]).all()


def test_diagonal_derivatives_reach_the_same_cell() -> None:
    """quasi-DEER on an LSTM: more iterations, the same states and gradients."""
    loop = subject("lstm")
    config = dataclasses.replace(CONFIGS["lstm"], method="newton", newton=Newton(jacobian=Jacobian.DIAGONAL))
    quasi = Subject(config, caches=False)
    expected, found = loop.run(tokens(0), loop.warm, MIXED), quasi.run(tokens(0), loop.warm, MIXED)
    assert_valid_close(found.y, expected.y, MIXED.valid)
    assert_close(found.after, expected.after, FLOAT32)
    assert_close(found.gradients, expected.gradients, FLOAT32_GRADIENT)


@pytest.mark.parametrize("config", [LSTMConfig(heads=2), GRUConfig(heads=2)])
def test_initial_values_are_the_usual_ones(config: Any) -> None:
    """Orthogonal recurrent matrices, a forget gate that remembers, input weights of variance 1 / width."""
    cell = config.make(64, layer=0, depth=2, rngs=nnx.Rngs(0))
    recurrent, bias = np.asarray(cell.recurrent[...]), np.array(cell.bias[...])
    product = np.einsum("higj,hkgj->hgik", recurrent, recurrent)
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(32), product.shape), atol=1e-5)
    np.testing.assert_allclose(np.std(cell.kernel[...]), 64**-0.5, rtol=0.05)
    if isinstance(config, LSTMConfig):
        np.testing.assert_array_equal(bias[:, 1], 1)
        bias[:, 1] = 0
    np.testing.assert_array_equal(bias, 0)
    assert params.labels(cell)["bias"] == params.Group.DYNAMICS


def test_configs_that_cannot_work_are_refused() -> None:
    for config in (LSTMConfig, GRUConfig, SLSTMConfig):
        with pytest.raises(ValueError, match=r"unknown method 'chunked' for a nonlinear cell.*sequential, newton"):
            config(method="chunked")
        with pytest.raises(ValueError, match="heads must be at least 1, not 0"):
            config(heads=0)
        with pytest.raises(ValueError, match="width 64 does not divide into heads=3"):
            config(heads=3).make(64, layer=0, depth=1, rngs=nnx.Rngs(0))
