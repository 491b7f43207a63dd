"""A strict world for every test: eight fake CPU devices, no silent rank promotion, float64 only where asked for.

The environment is set before anything imports jax. `JAX_PLATFORMS` can be given from outside to test on a device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

FAKE_DEVICES = 8

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flag = f"--xla_force_host_platform_device_count={FAKE_DEVICES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

import jax  # noqa: E402  (after the environment)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 within one test; without it a test runs in the types that users run in."""
    with jax.enable_x64(True):
        yield
