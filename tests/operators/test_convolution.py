"""Convolutions along time: exact over documents, exactly causal, and equal to the scans of the same recurrence."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqmodels.layers.hippo import normal_part
from seqmodels.operators.convolution import DIRECT, causal_convolution
from seqmodels.operators.diagonal import Diagonal
from seqmodels.operators.dplr import DPLR, Discrete, Span, dplr_recurrence, dplr_scan
from seqmodels.operators.state_space import channel_recurrence, channel_state_space, state_space
from seqmodels.testing import check_recurrence
from seqmodels.typing import Segments

B, T, D, N = 3, 48, 2, 3
# float64 transforms of 128 numbers, and powers of decays with exponents of up to 48.
EXACT = 1e-11
# float32 transforms: some units of 2^-24 relative to the largest term.
ROUNDING = 2e-6


def _loop(x: np.ndarray, kernel: np.ndarray, document: np.ndarray) -> np.ndarray:
    y = np.zeros(x.shape, np.result_type(x, kernel))
    for b, t in np.ndindex(*x.shape[:2]):
        for s in range(t + 1):
            if document[b, s] == document[b, t]:
                y[b, t] += kernel[t - s] * x[b, s]
    return y


@pytest.mark.parametrize("length", [1, 7, DIRECT, DIRECT + 1, 63, 64, 65])
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_convolution_equals_its_sum_document_by_document(length: int, kind: str) -> None:
    random = np.random.default_rng(length)
    x, kernel = random.standard_normal((B, length, D)), random.standard_normal((length, D))
    if kind == "complex":
        x, kernel = x + 1j * random.standard_normal(x.shape), kernel * np.exp(1j * np.arange(length))[:, None]
    document = np.cumsum(random.random((B, length)) < 0.1, axis=1)
    single = lambda a: jnp.asarray(a, jnp.complex64 if kind == "complex" else jnp.float32)
    y = jax.jit(causal_convolution)(single(x), single(kernel), document)
    expected = _loop(x, kernel, document)
    scale = np.abs(expected).max()
    chex.assert_trees_all_close(np.asarray(y) / scale, expected / scale, rtol=0, atol=ROUNDING)


def test_nothing_of_other_documents_or_of_the_future_not_even_rounding() -> None:
    random = np.random.default_rng(0)
    x, kernel = (random.standard_normal(shape).astype(np.float32) for shape in ((1, T, D), (T, D)))
    document = (np.arange(T) >= 29).astype(np.int32)[None]
    loud = np.where(document[..., None] == 0, np.float32(1e30) * x, x)
    run = jax.jit(causal_convolution)
    np.testing.assert_array_equal(run(x, kernel, document)[:, 29:], run(loud, kernel, document)[:, 29:])
    at = jax.jit(lambda x, t: jax.vjp(lambda x: run(x, kernel, None), x)[1](jnp.zeros_like(x).at[:, t].set(1))[0])
    for t in (0, 15, 17, 31, 32, 40):
        reached = np.any(np.asarray(at(x, t))[0] != 0, axis=-1)
        np.testing.assert_array_equal(reached, np.arange(T) <= t)


def _segments() -> Segments:
    """A document that goes on, short ones, padding before a start and at an end; a row of padding alone."""
    start, valid = np.zeros((B, T), bool), np.ones((B, T), bool)
    start[0, [5, 6, 40]], valid[0, 35:40] = True, False
    start[1, 0], valid[1, 37:] = True, False
    valid[2] = False
    return Segments(jnp.asarray(start), jnp.asarray(valid))


def _system(random: np.random.Generator) -> DPLR:
    part = normal_part(2 * N)
    each = lambda value: jnp.asarray(value + 0.1 * random.standard_normal((D, N)))
    outward = jnp.asarray(random.standard_normal((D, N)) + 1j * random.standard_normal((D, N)))
    half_step = jnp.asarray([[0.001], [0.2]])
    return DPLR(each(part.eigenvalues), each(part.low_rank), each(part.inward), outward, half_step)


def _cases() -> dict[str, Any]:
    """name: (run(inputs, *system, state), the arguments): one system for all channels, one each, and S4's."""
    random = np.random.default_rng(3)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape) + 1j * random.standard_normal(shape))
    rate = lambda *shape: jnp.asarray(-0.02 * random.exponential(size=shape) + 3j * random.random(shape))
    u = jnp.asarray(random.standard_normal((B, T, D)))
    return {
        "one": (state_space, (normal(B, T, N), rate(N), normal(B, N))),
        "channels": (channel_state_space, (u, rate(D, N), normal(D, N), normal(D, N), normal(B, D, N))),
        "dplr": (dplr_scan, (u, _system(random), normal(B, D, N))),
    }


slow = pytest.mark.slow


@pytest.mark.parametrize("name", ["one", "channels", "dplr"])
@pytest.mark.parametrize(
    ("form", "segmented"),
    [
        ("convolution", True),
        pytest.param("convolution", False, marks=slow),
        pytest.param("associative", True, marks=slow),
        pytest.param("chunked", True, marks=slow),
    ],
)
def test_every_form_equals_the_scan(name: str, form: str, segmented: bool, x64: None) -> None:
    """Outputs, the final state, and the gradients to inputs, system and initial state, both being in the loss."""
    function, arguments = _cases()[name]
    segments = _segments() if segmented else None
    results = {}
    for method in ("sequential", form):

        def loss(*arguments: Any, method: str = method) -> Any:
            y, after = function(*arguments, segments=segments, method=method, chunk=16)
            y = y if segments is None else jnp.where(segments.valid[..., None], y, 0)
            both = lambda a: jnp.sum(jnp.sin(a.real)) + 0.3 * jnp.sum(jnp.cos(a.imag))
            return both(y) + both(after), (y, after)

        run = jax.jit(jax.value_and_grad(loss, range(len(arguments)), has_aux=True))
        results[method] = run(*arguments)
    for ours, theirs in zip(*map(jax.tree.leaves, (results[form], results["sequential"])), strict=True):
        scale = np.abs(theirs).max()
        chex.assert_trees_all_close(ours / scale, theirs / scale, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ["one", "channels", "dplr"])
def test_time_sharded_over_devices(name: str, x64: None) -> None:
    """Six tokens a device and the carried state between them: outputs, and the state on every device."""
    function, arguments = _cases()[name]
    x, *system, state = arguments
    segments = _segments()
    mesh, along = jax.make_mesh((8,), ("time",), axis_types=(AxisType.Auto,)), P(None, "time")
    options = {"method": "convolution", "sequence_axis": "time"}
    run = lambda x, system, state, segments: function(x, *system, state, segments=segments, **options)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(along, P(), P(), along), out_specs=(along, P()))
    y, after = jax.jit(sharded)(x, system, state, segments)
    expected, last = function(x, *system, state, segments=segments, method="sequential")
    valid = segments.valid[..., None]
    chex.assert_trees_all_close(y * valid, expected * valid, rtol=EXACT, atol=EXACT)
    chex.assert_trees_all_close(after, last, rtol=EXACT, atol=EXACT)


def test_low_rank_steps_are_the_bilinear_rule(x64: None) -> None:
    """Against dense matrices over all conjugate pairs; and a power by binary digits is so many steps."""
    system = _system(np.random.default_rng(5))
    step, both = Discrete.of(system), lambda a: np.concatenate([a, np.conj(a)], axis=-1)
    h = np.random.default_rng(6).standard_normal((D, N)) + 1j
    for d in range(D):
        p, half = both(system.low_rank[d]), float(system.half_step[d, 0])
        a = np.diag(both(system.eigenvalues[d])) - np.outer(p, p.conj())
        left, right = np.eye(2 * N) - half * a, np.eye(2 * N) + half * a
        np.testing.assert_allclose(both(step.advance(h)[d]), np.linalg.solve(left, right @ both(h[d])), rtol=EXACT)
        expected = np.linalg.solve(left, 2 * half * both(system.inward[d]))
        np.testing.assert_allclose(both(step.drive[d]), expected, rtol=EXACT)


def test_laws_of_the_recurrences() -> None:
    random = np.random.default_rng(4)
    with jax.enable_x64(True):
        system = _system(random)
        rate = -0.1 - random.random((D, N)) + 2j
        inward, outward = random.standard_normal((2, D, N)) + 1j
        u = random.standard_normal((6, D))
        diagonal = channel_recurrence(*map(jnp.asarray, (rate, inward, outward)))
        low_rank = dplr_recurrence(system, 6)
        check_recurrence(diagonal, Diagonal(random.exponential(size=6), u))
        check_recurrence(low_rank, Span(np.ones(6, np.int32), u))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", ["one", "channels", "dplr"])
def test_transforms_lower_for_accelerators(name: str, platform: str) -> None:
    function, arguments = _cases()[name]
    arguments = jax.tree.map(lambda a: a.astype(jnp.complex64 if jnp.iscomplexobj(a) else jnp.float32), arguments)
    run = functools.partial(function, segments=_segments(), method="convolution")
    loss = lambda x: sum(jnp.sum(a.real) for a in run(x, *arguments[1:]))
    text = jax.jit(jax.grad(loss)).trace(arguments[0]).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.fft" in text
