"""S4, S4D, S5 and LRU against their oracles in float64: outputs, gradients, carried states; and the HiPPO matrices."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.layers.hippo import diagonal_start, hippo_legs, normal_part
from seqmodels.mixers import LRUConfig, S4Config, S4DConfig, S5Config
from seqmodels.typing import Context, Segments
from tests.oracles import state_space as oracle
from tests.oracles.differences import check_gradient
from tests.oracles.test_mixers import EXACT, LENGTH, STARTS, Case

pytestmark = pytest.mark.usefixtures("x64")


def assert_halves(hidden: Any, expected: np.ndarray) -> None:
    """The library's half of the conjugate pairs against all of them."""
    chex.assert_trees_all_close(oracle.both(np.asarray(hidden[0])), expected, rtol=EXACT, atol=EXACT)


S4D = {
    "legs-convolution": (S4DConfig(state_size=4, method="convolution"), {}),
    "lin-bilinear": (
        S4DConfig(state_size=6, start="lin", discretization="bilinear", output="half_glu2", method="sequential"),
        {"method": "bilinear", "kind": "half_glu2"},
    ),
    "inv-gelu": (S4DConfig(state_size=4, start="inv", output="gelu", method="chunked", chunk=4), {"kind": "gelu"}),
}


@pytest.mark.parametrize("name", S4D)
def test_s4d(name: str) -> None:
    config, options = S4D[name]
    case = Case(config, functools.partial(oracle.s4d_layer, **options))
    after, expected = case.check(STARTS)
    assert_halves(after.hidden, expected)
    case.check({5}, after, expected)


S4 = {
    "convolution": S4Config(state_size=4, method="convolution"),
    "sequential": S4Config(state_size=6, copies=4, method="sequential"),
    "associative": S4Config(state_size=4, copies=8, method="associative"),
}


@pytest.mark.parametrize("name", S4)
def test_s4(name: str) -> None:
    case = Case(S4[name], oracle.s4_layer)
    after, expected = case.check(STARTS)
    assert_halves(after.hidden, expected)
    case.check({5}, after, expected)


def test_s4_starts_as_hippo() -> None:
    """A channel's transition is HiPPO-LegS in another basis: the same characteristic polynomial."""
    system = S4Config(state_size=6).make(4, layer=0, depth=1, rngs=nnx.Rngs(0)).system()
    low_rank = oracle.both(np.asarray(system.low_rank[0], complex))
    a = np.diag(oracle.both(np.asarray(system.eigenvalues[0], complex))) - np.outer(low_rank, low_rank.conj())
    # HiPPO's eigenvalues are its diagonal, -1 to -6, and its coefficients integers; the parameters are float32
    np.testing.assert_allclose(np.poly(a), np.poly(-np.arange(1.0, 7.0)), rtol=1e-4)


S5 = {
    "zoh": (S5Config(state_size=8, blocks=2), {}),
    "bilinear-convolution": (
        S5Config(state_size=4, discretization="bilinear", output="full_glu", method="convolution"),
        {"method": "bilinear", "kind": "full_glu"},
    ),
}


@pytest.mark.parametrize("name", S5)
def test_s5(name: str) -> None:
    config, options = S5[name]
    case = Case(config, functools.partial(oracle.s5_layer, **options))
    after, expected = case.check(STARTS)
    assert_halves(after.hidden, expected)
    case.check({5}, after, expected)


class Irregular(Case):
    """Gaps of 0, of 1 and of anything in between and beyond, the gradient to them included."""

    def __init__(self, config: S5Config, **options: Any) -> None:
        self.gaps = np.random.default_rng(1).exponential(size=LENGTH) * 2
        self.gaps[[2, 3]] = 0, 1
        super().__init__(config, functools.partial(oracle.s5_layer, gaps=self.gaps, **options))
        mix = self.mix
        self.mix = lambda arrays, x, state, context, gaps=self.gaps: mix(
            arrays, x, state, context.replace(shared={"elapsed": jnp.asarray(gaps)[None]})
        )

    def check_gaps(self, options: dict[str, Any]) -> None:
        context = Context(Segments(jnp.zeros((1, LENGTH), bool), jnp.ones((1, LENGTH), bool)), jnp.zeros((1, LENGTH)))
        loss = lambda gaps: jnp.sum(self.mix(self.arrays, self.x, None, context, gaps)[0][0] * self.weights)
        gaps = np.maximum(self.gaps, 0.1)
        run = lambda gaps: float(
            np.sum(oracle.s5_layer(self.x, self.arrays, set(), gaps=gaps, **options)[0] * self.weights)
        )
        check_gradient(run, gaps, jax.grad(loss)(gaps))


@pytest.mark.parametrize("method", ["auto", "chunked", pytest.param("associative", marks=pytest.mark.slow)])
@pytest.mark.parametrize("discretization", ["zoh", pytest.param("bilinear", marks=pytest.mark.slow)])
def test_s5_with_irregular_samples(discretization: str, method: str) -> None:
    options = {"method": discretization}
    case = Irregular(S5Config(state_size=4, discretization=discretization, method=method), **options)
    after, expected = case.check(STARTS)
    assert_halves(after.hidden, expected)
    case.check({5}, after, expected)
    case.check_gaps(options)


def test_gaps_of_one_are_the_default_and_bad_ones_are_refused() -> None:
    x, mixer = np.ones((2, 5, 8)), S5Config(state_size=4).make(8, layer=0, depth=1, rngs=nnx.Rngs(0))
    context = Context.whole(2, 5)
    shared = lambda gaps: context.replace(shared={"elapsed": gaps})
    chex.assert_trees_all_close(
        mixer(x, None, shared(jnp.ones((2, 5)))), mixer(x, None, context), rtol=EXACT, atol=EXACT
    )
    with pytest.raises(ValueError, match=r"a gap a token, \(2, 5\), not \(2, 4\)"):
        mixer(x, None, shared(jnp.ones((2, 4))))
    convolution = S5Config(state_size=4, method="convolution").make(8, layer=0, depth=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="needs equal steps"):
        convolution(x, None, shared(jnp.ones((2, 5))))


@pytest.mark.parametrize("config", [LRUConfig(state_size=5), LRUConfig(state_size=3, output="gelu", min_radius=0.9)])
def test_lru(config: LRUConfig) -> None:
    case = Case(config, functools.partial(oracle.lru_layer, kind=config.output))
    after, expected = case.check(STARTS)
    chex.assert_trees_all_close(after.hidden[0], expected, rtol=EXACT, atol=EXACT)
    case.check({5}, after, expected)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (S4DConfig, {"method": "fft"}, "unknown method 'fft': choose one of .*pallas, convolution"),
        (S4Config, {"state_size": 5}, "it is even, not 5"),
        (S4Config, {"copies": 0}, "copies must be at least 1, not 0"),
        (S4DConfig, {"start": "legt"}, "unknown start 'legt'; choose one of legs, lin, inv"),
        (S5Config, {"discretization": "euler"}, "unknown discretization 'euler'; choose one of zoh, bilinear"),
        (S5Config, {"state_size": 12, "blocks": 4}, "does not divide into blocks=4 of an even size"),
        (S5Config, {"step_range": (0.0, 1.0)}, "step_range needs 0 < low <= high"),
        (LRUConfig, {"min_radius": 0.9, "max_radius": 0.5}, "min_radius < max_radius <= 1, not 0.9, 0.5"),
        (LRUConfig, {"max_phase": 7.0}, "not 7.0"),
        (LRUConfig, {"output": "glu"}, "unknown output 'glu'; choose one of full_glu"),
    ],
)
def test_a_config_that_cannot_work_is_refused(config: Any, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize("size", [2, 8])
def test_hippo_is_the_projection_on_legendre_polynomials(size: int) -> None:
    transition, inward = hippo_legs(size)
    expected, expected_inward = oracle.hippo_legs(size)
    chex.assert_trees_all_close((transition, inward), (expected, expected_inward), rtol=EXACT, atol=EXACT)
    part = normal_part(size)
    full = lambda half: np.concatenate([half, half.conj()], axis=-1)
    vectors, low_rank = full(part.vectors), full(part.low_rank)
    chex.assert_trees_all_close(vectors.conj().T @ vectors, np.eye(size, dtype=complex), rtol=EXACT, atol=EXACT)
    rebuilt = vectors @ (np.diag(full(part.eigenvalues)) - np.outer(low_rank, low_rank.conj())) @ vectors.conj().T
    chex.assert_trees_all_close(rebuilt, expected.astype(complex), rtol=EXACT, atol=EXACT)
    chex.assert_trees_all_close(vectors @ full(part.inward), inward.astype(complex), rtol=EXACT, atol=EXACT)


def test_starts_of_s4d() -> None:
    chex.assert_trees_all_close(diagonal_start("lin", 6), -0.5 + np.pi * np.array([0, 1j, 2j]), rtol=EXACT)
    inverse = [-0.5 + 1j * (4 / np.pi) * (4 / (2 * n + 1) - 1) for n in range(2)]
    chex.assert_trees_all_close(diagonal_start("inv", 4), np.array(inverse), rtol=EXACT)
    legs = diagonal_start("legs", 8)
    order = np.arange(8)
    rooted = np.sqrt(np.outer(2 * order + 1, 2 * order + 1)) / 2
    normal = -0.5 * np.eye(8) - np.tril(rooted, -1) + np.triu(rooted, 1)
    eigenvalues = np.sort_complex(np.linalg.eigvals(normal))
    found = np.concatenate([legs, legs.conj()])
    np.testing.assert_allclose(np.sort(found.imag), np.sort(eigenvalues.imag), atol=1e-9)
    np.testing.assert_allclose(eigenvalues.real, -0.5, atol=1e-9)
