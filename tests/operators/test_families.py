"""The families against float64 numpy loops of their equations: outputs, states, decays of any size, segments, types."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from seqmodels.operators import delta_rule, diagonal_scan, gated_linear_attention
from seqmodels.operators import family as families
from seqmodels.operators.exponential import ExponentialState, mlstm_scan
from seqmodels.typing import Segments

# float32 rounding (6e-8) over 70 steps with sums of 8 products.
ROUNDING = 5e-5
# The same sums in float64 (1e-16), where gradients reach 10; float32 would be off by 1e-5 where terms cancel.
ROUNDING_64 = 1e-11
# bfloat16 keeps 8 bits: two parts in a thousand for each rounding of an input or a score.
BFLOAT16 = 3e-2
B, T, G, H, K, V = 2, 70, 2, 4, 8, 6
METHODS = ({"method": "sequential"}, {"method": "chunked", "chunk": 64}, {"method": "chunked", "chunk": 16})
by_method = pytest.mark.parametrize("options", METHODS, ids=lambda m: "-".join(map(str, m.values())))


def _segments() -> Segments:
    """Documents of lengths 1 and more, one row that goes on from its state, and padding at the end of the other."""
    start = np.zeros((B, T), bool)
    start[0, [0, 20, 21, 50]] = True
    start[1, 66] = True
    return Segments(jnp.asarray(start), jnp.asarray(np.arange(T)[None] < np.array([[T], [68]])))


def _linear_attention_loop(
    query: Any, key: Any, value: Any, log_decay: Any, state: Any, bonus: Any = None, segments: Segments | None = None
) -> tuple[np.ndarray, np.ndarray]:
    query, key, value, state = (np.asarray(x, np.float64) for x in (query, key, value, state))
    state, out = state.copy(), np.zeros(value.shape)
    for b in range(value.shape[0]):
        for t in range(value.shape[1]):
            if segments is not None:
                if segments.start[b, t]:
                    state[b] = 0
                if not segments.valid[b, t]:
                    continue
            for h in range(value.shape[2]):
                g = h // (value.shape[2] // query.shape[2])
                new = np.outer(key[b, t, g], value[b, t, h])
                decay = 1.0 if log_decay is None else np.exp(np.asarray(log_decay[b, t, h], np.float64))
                if bonus is not None:
                    seen = state[b, h] + np.asarray(bonus[h], np.float64)[:, None] * new
                    out[b, t, h] = query[b, t, g] @ seen
                state[b, h] = np.reshape(decay, (-1, 1)) * state[b, h] + new
                if bonus is None:
                    out[b, t, h] = query[b, t, g] @ state[b, h]
    return out, state


def _qkv(seed: int = 0, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = ((B, T, G, K), (B, T, G, K), (B, T, H, V), (B, H, K, V))
    return tuple(jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True))


def _decays(kind: str) -> jax.Array | None:
    noise = jax.random.normal(jax.random.key(9), (B, T, H, K))
    per_key = {
        "gentle": -jnp.exp(noise - 3),
        "extreme": -jnp.exp(3 * noise),  # down to exp(-20000) beside exp(-1e-4) inside one chunk
        "gone": jnp.where(noise > 0.5, -jnp.inf, -jnp.exp(noise)),
    }
    if kind == "none":
        return None
    name, _, scalar = kind.partition(" ")
    return per_key[name][..., 0] if scalar else per_key[name]


@by_method
@pytest.mark.parametrize(
    "kind", ["none", "gentle per head", "extreme per head", "gone per head", "gentle", "extreme", "gone"]
)
def test_linear_attention_equals_its_recurrence(kind: str, options: dict) -> None:
    query, key, value, state = _qkv()
    log_decay = _decays(kind)
    segments = _segments()
    poison = lambda x: jnp.where(segments.valid[..., None, None], x, jnp.nan)
    run = jax.jit(functools.partial(gated_linear_attention, **options))
    got = run(poison(query), poison(key), poison(value), log_decay, state, segments=segments)
    expected = _linear_attention_loop(query, key, value, log_decay, state, segments=segments)
    chex.assert_trees_all_close(got, expected, rtol=ROUNDING, atol=ROUNDING)


@by_method
@pytest.mark.parametrize("kind", ["extreme per head", "extreme"])
def test_the_bonus_is_for_the_own_step_and_the_rest_is_read_before_it(kind: str, options: dict) -> None:
    query, key, value, state = _qkv(1)
    bonus = jax.random.normal(jax.random.key(5), (H, K))
    run = jax.jit(functools.partial(gated_linear_attention, **options))
    for segments in (None, _segments()):
        got = run(query, key, value, _decays(kind), state, bonus=bonus, segments=segments)
        expected = _linear_attention_loop(query, key, value, _decays(kind), state, bonus, segments)
        chex.assert_trees_all_close(got, expected, rtol=ROUNDING, atol=ROUNDING)


def _diagonal_loop(
    decay: np.ndarray, drive: Any, state: Any, segments: Segments | None
) -> tuple[np.ndarray, np.ndarray]:
    """h' = decay * h + drive; `decay` [B, T, D] in double precision."""
    state = np.asarray(state, decay.dtype).copy()
    out = np.zeros(decay.shape, decay.dtype)
    for b in range(decay.shape[0]):
        for t in range(decay.shape[1]):
            if segments is not None and segments.start[b, t]:
                state[b] = 0
            if segments is None or segments.valid[b, t]:
                state[b] = decay[b, t] * state[b] + np.asarray(drive[b, t], np.float64)
                out[b, t] = state[b]
    return out, state


@by_method
@pytest.mark.parametrize("kind", ["real", "extreme", "gone", "complex", "fixed", "fixed complex", "elapsed"])
def test_diagonal_scan_equals_its_recurrence(kind: str, options: dict) -> None:
    keys = jax.random.split(jax.random.key(2), 4)
    noise, drive = (jax.random.normal(k, (B, T, K)) for k in keys[:2])
    state, elapsed = jax.random.normal(keys[2], (B, K)), jnp.exp(jax.random.normal(keys[3], (B, T)))
    log_decay = {
        "real": -jnp.exp(noise),
        "extreme": -jnp.exp(3 * noise),
        "gone": jnp.where(noise > 0.5, -jnp.inf, -jnp.exp(noise)),
        "complex": -jnp.exp(noise) + 3j * noise,
    }.get(kind, -jnp.exp(noise[0, 0]) + (2j if "complex" in kind else 0))
    if "complex" in kind:
        state = state + 1j
    times = elapsed if kind == "elapsed" else None
    rate = np.asarray(log_decay, np.complex128 if "complex" in kind else np.float64)
    scale = np.ones((B, T)) if times is None else np.asarray(times, np.float64)
    decay = np.exp(rate if rate.ndim == 3 else rate * scale[..., None])
    run = jax.jit(functools.partial(diagonal_scan, **options))
    for segments in (None, _segments()):
        poisoned = drive if segments is None else jnp.where(segments.valid[..., None], drive, jnp.nan)
        got = run(log_decay, poisoned, state, elapsed=times, segments=segments)
        expected = _diagonal_loop(decay, drive, state, segments)
        chex.assert_trees_all_close(got, expected, rtol=ROUNDING, atol=ROUNDING)
    assert got[1].dtype == (jnp.complex64 if "complex" in kind else jnp.float32)


def test_a_fixed_decay_may_forget_at_once() -> None:
    rate, drive = jnp.array([-jnp.inf, -1.0, 0.0]), jax.random.normal(jax.random.key(7), (1, 5, 3))
    segments = Segments(jnp.zeros((1, 5), bool), jnp.arange(5)[None] < 4)
    decay = np.broadcast_to(np.exp(np.asarray(rate, np.float64)), (1, 5, 3))
    expected = _diagonal_loop(decay, drive, np.zeros((1, 3)), segments)
    for method in ("sequential", "associative", "chunked"):
        run = functools.partial(diagonal_scan, segments=segments, method=method, chunk=3)
        chex.assert_trees_all_close(jax.jit(run)(rate, drive), expected, rtol=ROUNDING, atol=ROUNDING)
        chex.assert_tree_all_finite(jax.jit(jax.grad(lambda d, run=run: jnp.sum(run(rate, d)[0] ** 2)))(drive))


@pytest.mark.parametrize("options", METHODS[:2], ids=lambda m: m["method"])
@pytest.mark.parametrize("kind", ["per head", "per key"])
def test_gradients_of_everything_with_segments(kind: str, options: dict, x64: None) -> None:
    keys = jax.random.split(jax.random.key(3), 5)
    shapes = ((1, 7, 1, 2), (1, 7, 1, 2), (1, 7, 2, 3), (1, 2, 2, 3), (1, 7, 2, 2) if kind == "per key" else (1, 7, 2))
    query, key, value, state, gate = (jax.random.normal(k, s, jnp.float64) for k, s in zip(keys, shapes, strict=True))
    segments = Segments(jnp.arange(7)[None] == 3, jnp.arange(7)[None] < 6)
    run = functools.partial(
        gated_linear_attention, segments=segments, **(options | ({"chunk": 4} if len(options) > 1 else {}))
    )

    @jax.jit
    def loss(query: Any, key: Any, value: Any, gate: Any, state: Any) -> jax.Array:
        out, final = run(query, key, value, -jnp.exp(gate), state)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(final))

    check_grads(loss, (query, key, value, gate, state), order=1, modes=["rev"])


def test_gradients_at_the_ends_of_the_decay_range_are_finite() -> None:
    query, key, value, state = _qkv(4)
    for kind in ("gone per head", "gone", "extreme"):
        loss = lambda *a: jnp.sum(jnp.concatenate([x.ravel() for x in gated_linear_attention(*a)]) ** 2)
        grads = jax.jit(jax.grad(loss, argnums=range(5)))(query, key, value, _decays(kind), state)
        chex.assert_tree_all_finite(grads)


def test_bfloat16_inputs_keep_float32_states() -> None:
    query, key, value, state = _qkv(5, jnp.bfloat16)
    out, final = jax.jit(gated_linear_attention)(query, key, value, _decays("gentle"), state)
    assert (out.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
    expected = _linear_attention_loop(query, key, value, _decays("gentle"), state)
    for got, exact in zip((out, final), expected, strict=True):
        error = np.abs(np.asarray(got, np.float64) - exact) / np.abs(exact).max()
        assert np.quantile(error, 0.99) < BFLOAT16


def test_one_step_and_odd_lengths() -> None:
    query, key, value, state = _qkv(6)
    log_decay = _decays("gentle")
    for length in (1, 3, 17):
        cut = lambda x, n=length: x[:, :n]
        got = gated_linear_attention(cut(query), cut(key), cut(value), cut(log_decay), state)
        expected = _linear_attention_loop(cut(query), cut(key), cut(value), cut(log_decay), state)
        chex.assert_trees_all_close(got, expected, rtol=ROUNDING, atol=ROUNDING)


def test_shapes_that_do_not_fit_are_shown() -> None:
    query, key, value, state = _qkv()
    with pytest.raises(ValueError, match=r"G dividing H.*\(2, 70, 2, 8\), \(2, 70, 2, 8\), \(2, 70, 3, 6\)"):
        gated_linear_attention(query, key, value[:, :, :3])
    with pytest.raises(ValueError, match=r"log_decay \[B, T, H\].*\(2, 70, 2\)"):
        gated_linear_attention(query, key, value, jnp.zeros((B, T, G)))
    with pytest.raises(ValueError, match=r"state \[B, H, K, V\].*\(2, 4, 6, 8\)"):
        gated_linear_attention(query, key, value, state=state.swapaxes(2, 3))
    with pytest.raises(ValueError, match=r"log_decay \(2, 70, 7\)"):
        diagonal_scan(jnp.zeros((B, T, 7)), jnp.zeros((B, T, 8)))
    with pytest.raises(ValueError, match=r"G dividing H.*\(2, 70, 0, 8\)"):
        gated_linear_attention(query[:, :, :0], key[:, :, :0], value)
    with pytest.raises(ValueError, match="the kernel is for TPUs"):
        gated_linear_attention(query, key, value, method="pallas")


@pytest.mark.parametrize("method", ["auto", "sequential", "chunked", "pallas"])
@pytest.mark.parametrize("shape", [(0, T), (B, 0)], ids=str)
def test_an_axis_without_entries_is_named(shape: tuple[int, int], method: str) -> None:
    told = rf"at least one row, step, head and channel, not \({shape[0]}, {shape[1]}, "
    vectors, numbers = (jnp.zeros((*shape, *rest)) for rest in ((H, K), (H,)))
    for run in (
        lambda: gated_linear_attention(vectors, vectors, vectors, method=method),
        lambda: delta_rule(vectors, vectors, vectors, numbers, method=method),
        lambda: mlstm_scan(vectors, vectors, vectors, numbers, numbers, method=method),
        lambda: diagonal_scan(numbers, numbers, method=method),
    ):
        with pytest.raises(ValueError, match=told):
            run()


@pytest.mark.parametrize("method", ["sequential", "chunked"])
def test_no_time_has_a_gradient(method: str) -> None:
    """h = exp(elapsed * rate) h0: at elapsed 0 its derivative is rate * h0, and 0 where everything is forgotten."""
    rate, drive = jnp.asarray([-0.5, -jnp.inf]), jnp.zeros((1, 1, 2))
    run = lambda elapsed: diagonal_scan(rate, drive, jnp.full((1, 2), 3.0), elapsed=elapsed, method=method)[0][0, 0]
    by_elapsed = jax.jacrev(run)(jnp.zeros((1, 1)))[:, 0, 0]
    chex.assert_trees_all_close(by_elapsed, jnp.asarray([-1.5, 0]))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_xla_programs_lower_for_accelerators(platform: str) -> None:
    query, key, value, state = _qkv()

    def loss(query: Any, log_decay: Any) -> jax.Array:
        out, final = gated_linear_attention(query, key, value, log_decay, state, method="chunked", segments=_segments())
        return jnp.sum(out) + jnp.sum(final)

    for kind in ("gentle", "gentle per head"):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(query, _decays(kind))
        assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()


def _depth(program: Any) -> int:
    """How many scans stand inside of one another."""
    inside = lambda eqn: max((_depth(inner) for inner in jax.extend.core.jaxprs_in_params(eqn.params)), default=0)
    return max(((eqn.primitive.name == "scan") + inside(eqn) for eqn in program.eqns), default=0)


@pytest.mark.parametrize(
    ("family", "block", "loops"),
    [
        ("outer", 0, 2), ("outer", 10**6, 3), ("exponential", 0, 2), ("delta", 10**6, 3), ("delta", None, 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("outer", 8_000, 2), ("outer", None, 2), ("exponential", 10**6, 3), ("exponential", None, 2),
                ("delta", 0, 3),
            ]
        ),
    ],
)  # fmt: skip
def test_parts_of_the_work_equal_a_token_at_a_time(
    family: str, block: int | None, loops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk of one group of heads at a time, of one row, or four chunks of all side by side; then the rest of the
    row, which ends in half a chunk: values, states and gradients. None: as on accelerators."""
    monkeypatch.setattr(families, "TOKENS_AT_ONCE", 16)
    monkeypatch.setattr(families, "BLOCK_BYTES", block)
    if block is None:
        monkeypatch.setattr(families, "on_cpu", lambda: False)
    query, key, value, _ = _qkv()
    gates = jax.random.normal(jax.random.key(5), (2, B, T, H))
    log_decay = -jnp.exp(gates[0] - 2)

    def run(query: Any, key: Any, value: Any, log_decay: Any, log_input: Any, **options: Any) -> Any:
        if family == "outer":
            return gated_linear_attention(query, key, value, log_decay, segments=_segments(), **options)
        if family == "delta":
            beta = jax.nn.sigmoid(log_input)
            return delta_rule(query, key / 3, value, beta, log_decay, segments=_segments(), **options)
        query, key = (jnp.repeat(x, H // G, axis=2) for x in (query, key))
        return mlstm_scan(query * K**-0.5, key, value, log_input, log_decay, segments=_segments(), **options)

    def loss(*inputs: Any, **options: Any) -> Any:
        out, state = run(*inputs, **options)
        finite = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), state)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves((out, finite))), (out, finite)

    grad = lambda **options: jax.jit(jax.grad(functools.partial(loss, **options), (0, 1, 2, 3, 4), has_aux=True))
    with jax.enable_x64(True):
        inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (query, key, value, log_decay, gates[1]))
        program = jax.make_jaxpr(functools.partial(run, method="chunked", chunk=4))(*inputs)
        assert _depth(program.jaxpr) == loops  # over blocks, chunks, and the states of some or a solve's rows
        found, expected = grad(method="chunked", chunk=4)(*inputs), grad(method="sequential")(*inputs)
        chex.assert_trees_all_close(found, expected, rtol=ROUNDING_64, atol=ROUNDING_64)


@pytest.mark.parametrize("wide", ["inputs", "gates", "state"])
@pytest.mark.parametrize(
    "family", ["outer", *(pytest.param(x, marks=pytest.mark.slow) for x in ("delta", "exponential"))]
)
def test_gradients_have_the_types_of_what_they_belong_to(family: str, wide: str) -> None:
    """Where one is float64 and the rest float32; the values are those of a token at a time."""
    query, key, value, _ = _qkv()
    query, key = (jnp.repeat(x, H // G, axis=2) for x in (query, key))
    given = {"inputs": (query / 3, key / 3, value), "gates": -jnp.exp(jax.random.normal(jax.random.key(5), (B, T, H)))}
    given["state"] = jax.random.normal(jax.random.key(6), (B, H, K, V))

    def loss(given: Any, method: str) -> Any:
        gates, state, options = given["gates"], given["state"], {"method": method, "chunk": 16}
        if family == "outer":
            out, after = gated_linear_attention(*given["inputs"], gates, state, **options)
        elif family == "delta":
            out, after = delta_rule(*given["inputs"], jnp.exp(gates), gates, state, **options)
        else:
            empty = jnp.zeros((B, H)), jnp.zeros((B, H, K))
            out, after = mlstm_scan(*given["inputs"], gates, gates, ExponentialState(*empty, state), **options)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves((out, after)))

    with jax.enable_x64(True):
        given |= {wide: jax.tree.map(lambda x: x.astype(jnp.float64), given[wide])}
        slopes = [jax.jit(jax.grad(functools.partial(loss, method=m))) for m in ("chunked", "sequential")]
        found, expected = (slope(given) for slope in slopes)
    chex.assert_trees_all_equal_dtypes(found, given)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, rtol=0, atol=ROUNDING * largest)
