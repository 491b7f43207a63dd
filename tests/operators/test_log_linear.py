"""Log-linear attention against a float64 numpy sum over Fenwick buckets: every form, any decay, the last position."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from seqmodels.operators import LogLinear, gated_linear_attention, log_linear_attention, log_linear_recurrence
from seqmodels.testing import check_recurrence
from seqmodels.typing import Segments
from tests.oracles.log_linear import buckets

# float32 rounding (6e-8) over 70 steps of sums.
ROUNDING = 2e-5
B, T, G, H, K, V, L = 2, 70, 1, 2, 4, 3, 8
METHODS = ({"method": "sequential"}, {"method": "chunked"}, {"method": "chunked", "chunk": 12})
by_method = pytest.mark.parametrize("options", METHODS, ids=lambda m: "-".join(map(str, m.values())))


def _inputs(kind: str = "gentle") -> dict[str, Any]:
    random = np.random.default_rng(0)
    noise = random.standard_normal((B, T, H))
    decays = {
        "none": None,
        "gentle": -np.exp(noise - 3),
        "extreme": -np.exp(3 * noise),
        "gone": np.where(noise > 1, -np.inf, -np.exp(noise - 3)),
    }
    shapes = {"query": (B, T, G, K), "key": (B, T, G, K), "value": (B, T, H, V), "scale": (B, T, H, L)}
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    decay = decays[kind]
    return {**arrays, "log_decay": None if decay is None else decay.astype(np.float32)}


def _segments() -> Segments:
    """Documents of lengths 1 and more at odd places, padding between and at the end; the second row is one document."""
    start = np.zeros((B, T), bool)
    start[0, [0, 5, 6, 40]] = True
    valid = np.ones((B, T), bool)
    valid[0, 35:40] = valid[0, 68:] = False
    return Segments(start, valid)


def _expected(inputs: dict[str, Any], segments: Segments) -> np.ndarray:
    query, key, value, scale, log_decay = (None if x is None else np.asarray(x, np.float64) for x in inputs.values())
    out = np.zeros((B, T, H, V))
    for b in range(B):
        document: list[int] = []
        for t in range(T):
            document = [] if segments.start[b, t] else document
            if not segments.valid[b, t]:
                continue
            document.append(t)
            position = len(document) - 1
            for level, bucket in [(0, [position]), *buckets(position)]:
                for s in bucket:
                    row = document[s]
                    later = document[s + 1 :]
                    decay = 1.0 if log_decay is None else np.exp(log_decay[b, later].sum(axis=0))
                    score = (query[b, t, 0] @ key[b, row, 0]) * decay * scale[b, t, :, level]
                    out[b, t] += np.reshape(score, (-1, 1)) * value[b, row]
    return out


@functools.cache
def _jitted(method: str, chunk: int | None = None) -> Any:
    return jax.jit(functools.partial(log_linear_attention, method=method, chunk=chunk))


@by_method
@pytest.mark.parametrize("kind", ["none", "extreme", "gone"])
def test_equals_the_sum_over_buckets(kind: str, options: dict) -> None:
    inputs, segments = _inputs(kind), _segments()
    poisoned = {
        name: x if x is None else np.where(np.expand_dims(segments.valid, tuple(range(2, x.ndim))), x, np.nan)
        for name, x in inputs.items()
    }
    out, _ = _jitted(**options)(**poisoned, position=segments.positions()[0], segments=segments)
    chex.assert_trees_all_close(out, _expected(inputs, segments).astype(np.float32), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("cut", [1, 13, 64, 69])
def test_goes_on_from_any_position(cut: int) -> None:
    """Two calls equal one, although the second begins inside the tree's blocks; without a state fewer levels run."""
    inputs, run = _inputs(), _jitted("chunked", 12)
    position = jnp.broadcast_to(jnp.arange(T), (B, T))
    part = lambda where: {name: x[:, where] for name, x in inputs.items()} | {"position": position[:, where]}
    whole, after = run(**inputs, position=position)
    first, state = run(**part(slice(cut)))
    second, last = run(**part(slice(cut, None)), state=state)
    joined = (jnp.concatenate([first, second], axis=1), last)
    chex.assert_trees_all_close(joined, (whole, after), rtol=ROUNDING, atol=ROUNDING)


@by_method
def test_with_weights_of_one_it_is_linear_attention(options: dict) -> None:
    inputs, segments = _inputs(), _segments()
    inputs["scale"] = np.ones_like(inputs["scale"])
    position = segments.positions()[0]
    out, state = _jitted(**options)(**inputs, position=position, segments=segments)
    del inputs["scale"]
    expected, memory = gated_linear_attention(**inputs, segments=segments, method="sequential")
    chex.assert_trees_all_close((out, jnp.sum(state, axis=2)), (expected, memory), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("options", METHODS[::2], ids=["sequential", "chunked"])
def test_beyond_the_last_position_is_nan(options: dict) -> None:
    """Three levels serve four tokens a document; the fifth and those after it are NaN, the next document is right."""
    inputs = {name: x[:, :16] for name, x in _inputs().items()}
    few, all_levels = {**inputs, "scale": inputs["scale"][..., :3]}, inputs
    start = np.zeros((B, 16), bool)
    start[0, [0, 9]] = start[1, 2] = True
    segments = Segments(start, np.ones((B, 16), bool))
    position = np.asarray(segments.positions()[0])
    run = _jitted(**options)
    held, right = (np.asarray(run(**x, position=position, segments=segments)[0]) for x in (few, all_levels))
    lost = position >= 4
    assert np.isnan(held[lost]).all()
    chex.assert_trees_all_close(held[~lost], right[~lost], rtol=ROUNDING, atol=ROUNDING)


def test_laws() -> None:
    """For any jumps: that they come from positions is not needed for spans to compose."""
    random = np.random.default_rng(1)
    inputs = {name: None if x is None else x[0] for name, x in _inputs().items()}
    step = LogLinear(
        inputs["query"][:12, 0],
        inputs["key"][:12, 0],
        inputs["value"][:12, 0],
        inputs["scale"][:12, 0],
        random.integers(1, L, 12).astype(np.int32),
        inputs["log_decay"][:12, 0],
    )
    state = random.standard_normal((L - 1, K, V)).astype(np.float32)
    check_recurrence(log_linear_recurrence(), step, state)


def test_gradients() -> None:
    with jax.enable_x64(True):
        inputs = {name: jnp.asarray(x[:1, :9, :, :], jnp.float64) for name, x in _inputs().items() if x.ndim == 4}
        decay = jnp.asarray(_inputs()["log_decay"][:1, :9], jnp.float64)
        position = jnp.arange(3, 12)[None]
        state = jax.random.normal(jax.random.key(0), (1, H, L - 1, K, V), jnp.float64)

        def run(inputs: Any, decay: Any, state: Any) -> Any:
            return log_linear_attention(**inputs, log_decay=decay, state=state, position=position, chunk=4)

        check_grads(jax.jit(run), (inputs, decay, state), order=1, modes=["rev"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": np.ones((B, T, H, 1))}, "scale .B, T, H, L. with L of at least 2"),
        ({"position": np.zeros((B, T + 1), int)}, "position .B, T."),
        ({"log_decay": np.zeros((B, T, H, K))}, "log_decay .B, T, H. or None"),
        ({"query": np.zeros((B, T, 0, K)), "key": np.zeros((B, T, 0, K))}, "G dividing H"),
        ({"state": np.zeros((B, H, L, K, V))}, "the state of 8 levels .* is .2, 2, 7, 4, 3., not .2, 2, 8, 4, 3."),
    ],
)
def test_shapes_that_do_not_fit(changes: dict, message: str) -> None:
    arguments = {**_inputs(), "position": np.zeros((B, T), int), **changes}
    with pytest.raises(ValueError, match=message):
        log_linear_attention(**arguments)
