"""RWKV's initial values, as the authors' code has them, and the configs that are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from flax import nnx

from seqmodels import params
from seqmodels.layers import RWKVChannelConfig
from seqmodels.mixers import RWKV4Config, RWKV6Config, RWKV7Config
from seqmodels.mixers.rwkv7 import published_rank

WIDTH = 64
# float32 powers of numbers of order one.
ROUNDING = 1e-5


def arrays(config: Any, layer: int, depth: int) -> dict[str, Any]:
    """Every initial value by its dotted name."""
    module = config.make(WIDTH, layer=layer, depth=depth, rngs=nnx.Rngs(0))
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        for name, child in node.items():
            if isinstance(child, dict):
                walk(f"{prefix}{name}.", child)
            else:
                flat[prefix + name] = np.asarray(child)

    walk("", params.split(module)[1])
    return flat


def close(found: np.ndarray, expected: Any) -> None:
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=ROUNDING, atol=ROUNDING)


def is_orthogonal(matrix: np.ndarray, gain: float) -> None:
    """Along its shorter side."""
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    close(matrix @ matrix.T, gain**2 * np.eye(len(matrix)))


def is_uniform(matrix: np.ndarray, bound: float) -> None:
    assert 0.98 * bound < np.abs(matrix).max() <= bound
    np.testing.assert_allclose(matrix.std(), bound / math.sqrt(3), rtol=0.05)


@pytest.mark.parametrize(("layer", "depth"), [(0, 1), (0, 4), (2, 4), (3, 4)])
def test_rwkv4(layer: int, depth: int) -> None:
    found = arrays(RWKV4Config(recurrent_size=96), layer, depth)
    progress, remaining = layer / max(depth - 1, 1), 1 - layer / depth
    channel = np.array([i / WIDTH for i in range(WIDTH)])
    close(found["time_mix_key"], channel**remaining)
    close(found["time_mix_value"], channel**remaining + 0.3 * progress)
    close(found["time_mix_receptance"], channel ** (0.5 * remaining))
    close(found["time_decay"], [-5 + 8 * (h / 95) ** (0.7 + 1.3 * progress) for h in range(96)])
    close(found["time_first"], [math.log(0.3) + 0.5 * ((i + 1) % 3 - 1) for i in range(96)])
    for name in ("key", "receptance", "out"):
        assert not found[f"{name}.kernel"].any()
    is_orthogonal(found["value.kernel"], math.sqrt(96 / 64))


@pytest.mark.parametrize(("layer", "depth"), [(0, 1), (0, 4), (2, 4), (3, 4)])
def test_rwkv6(layer: int, depth: int) -> None:
    found = arrays(RWKV6Config(head_size=16), layer, depth)
    progress, remaining = layer / max(depth - 1, 1), 1 - layer / depth
    channel = np.array([i / WIDTH for i in range(WIDTH)])
    close(found["mix_base"], 1 - channel**remaining)
    decay, key, value, receptance, gate = found["mix"]
    for row, expected in ((decay, 0), (key, 0), (value, 0.3 * progress)):
        close(row, 1 - channel**remaining - expected)
    for row in (receptance, gate):
        close(row, 1 - channel ** (0.5 * remaining))
    n = np.arange(WIDTH)
    close(found["decay.base"], -6 + 5 * (n / (WIDTH - 1)) ** (0.7 + 1.3 * progress))
    zigzag = ((n + 1) % 3 - 1) * 0.1
    close(found["bonus"].reshape(-1), progress * (1 - n / (WIDTH - 1)) + zigzag)
    close(found["norm.scale"], ((1 + layer) / depth) ** 0.7)
    for name in ("mix_down", "decay.down", "out.kernel"):
        assert not found[name].any()
    for name, gain in (("receptance", 1), ("value", 1), ("key", 0.1), ("gate", 0.1)):
        is_orthogonal(found[f"{name}.kernel"], gain)
    for name in ("mix_up", "decay.up"):
        is_uniform(found[name], 0.01)


@pytest.mark.parametrize(("layer", "depth"), [(0, 1), (0, 4), (2, 4), (3, 4)])
def test_rwkv7(layer: int, depth: int) -> None:
    size = 16
    found = arrays(RWKV7Config(head_size=size), layer, depth)
    progress, remaining = layer / max(depth - 1, 1), 1 - layer / depth
    n = np.arange(WIDTH)
    powers = {"receptance": 0.2, "decay": 0.9, "key": 0.7, "value": 0.7, "rate": 0.9, "gate": 0.2}
    for name, power in powers.items():
        close(found[f"mix.{name}"], 1 - (n / WIDTH) ** (power * remaining))
    linear = n / (WIDTH - 1) - 0.5
    zigzag = ((n % size) - (size - 1) / 2) / ((size - 1) / 2)
    zigzag = zigzag * np.abs(zigzag)
    close(found["decay.base"], -6 + 6 * (n / (WIDTH - 1)) ** (1 + progress**0.3) + 0.5 + 2.5 * zigzag)
    close(found["rate.base"], -0.19 + 0.3 * zigzag + 0.4 * linear)
    close(found["first.base"], 0.73 - 0.4 * linear)
    assert "gate.base" not in found
    close(found["removal"].reshape(-1), 0.71 - 0.1 * linear)
    close(found["replacement"], 1.02)
    close(found["bonus"], -0.04)
    close(found["norm.scale"], ((1 + layer) / depth) ** 0.7)
    for name in ("decay", "rate", "first", "gate"):
        assert not found[f"{name}.down"].any()
        is_orthogonal(found[f"{name}.up"], 0.1)
    assert not found["out.kernel"].any()
    for name, bound in (("receptance", 0.5), ("value", 0.5), ("key", 0.05)):
        is_uniform(found[f"{name}.kernel"], bound / math.sqrt(WIDTH))


@pytest.mark.parametrize(
    ("width", "ranks"), [(96, (32, 32, 32, 32)), (768, (64, 64, 32, 128)), (4096, (128, 128, 96, 480))]
)
def test_rwkv7_has_the_published_ranks(width: int, ranks: tuple[int, ...]) -> None:
    """Of decay, rate, first values and gate; those of 768 are of the 0.1B model, of 4096 of the 7B one's formula."""
    factors = ((1.8, 0.5), (1.8, 0.5), (1.3, 0.5), (0.6, 0.8))
    assert tuple(published_rank(factor, width, power) for factor, power in factors) == ranks


@pytest.mark.parametrize("version", [4, 6, 7])
def test_channel_mixes(version: int) -> None:
    layer, depth = 1, 4
    found = arrays(RWKVChannelConfig(version), layer, depth)
    power = 0.75**4 if version == 7 else 0.75
    share = (np.arange(WIDTH) / WIDTH) ** power
    close(found["time_mix_key"], share)
    assert not found["value.kernel"].any()
    assert found["key.kernel"].shape == (WIDTH, 4 * WIDTH)
    if version == 7:
        assert set(found) == {"time_mix_key", "key.kernel", "value.kernel"}
        is_uniform(found["key.kernel"], 0.5 / math.sqrt(WIDTH))
    else:
        close(found["time_mix_receptance"], share)
        assert not found["receptance.kernel"].any()
        is_orthogonal(found["key.kernel"], 2 if version == 4 else 1)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (RWKV4Config, {"recurrent_size": 1}, "at least 2, not 1; None is the model's width"),
        (RWKV4Config, {"method": "fast"}, "unknown method 'fast'"),
        (RWKV6Config, {"mix_rank": 0}, "mix_rank must be at least 1, not 0"),
        (RWKV6Config, {"norm_eps": 0.0}, r"norm_eps must be positive, not 0\.0"),
        (RWKV7Config, {"gate_rank": 0}, "gate_rank must be at least 1, not 0"),
        (RWKVChannelConfig, {"version": 5}, r"no channel mix of version 5; choose one of \(4, 6, 7\)"),
        (RWKVChannelConfig, {"hidden_size": 0}, "at least 1, not 0; None is 4 times the width"),
    ],
)
def test_a_config_that_cannot_work_is_refused(config: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize("config", [RWKV6Config(), RWKV7Config()])
def test_a_width_that_does_not_divide_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match="the width 96 does not divide into heads of head_size=64"):
        config.make(96, layer=0, depth=1, rngs=nnx.Rngs(0))
