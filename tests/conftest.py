"""A strict world for every test: eight fake CPU devices, no silent rank promotion, float64 only where asked for.

The environment is set before anything imports jax. `JAX_PLATFORMS` can be given from outside to test on a device.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FAKE_DEVICES = 8

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flag = f"--xla_force_host_platform_device_count={FAKE_DEVICES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # processes that tests start compile as tests do

import jax  # noqa: E402  (after the environment)
import pytest  # noqa: E402

from tests import evidence  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes objects by the million that live as long as their cache: looking through them less often saves a tenth.
gc.set_threshold(100_000, 50, 100)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--evidence", metavar="FILE", help="keep the largest errors against oracles (without -n)")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--evidence"):
        evidence.write(Path(session.config.getoption("--evidence")))


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are kept in pytest's own cache, for processes that tests start too: a second run only traces.

    `pytest --cache-clear` forgets them; without the cache plugin (`-p no:cacheprovider`) nothing is kept.
    """
    if jax.__version__.startswith("0.10."):
        # With XLA's older code for fusions a program compiles in half the time, and a bit faster in one piece; a newer
        # XLA ends a process for flags that it does not know.
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if hasattr(config, "cache"):
        settings = {
            "jax_compilation_cache_dir": str(config.cache.mkdir("xla")),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": 0,
        }
        for name, value in settings.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)


def group_of(nodeid: str) -> str:
    """What is compiled once for several tests: all there is to a mixer in tests/mixers, and each other file."""
    file, _, rest = nodeid.partition("::")
    if "/mixers/" in file and "[" in rest:
        for part in rest[rest.index("[") + 1 : -1].split("-"):
            if part in _mixers():
                return part
    return file


@functools.cache
def _mixers() -> frozenset[str]:
    from seqmodels.mixers import examples

    return frozenset(name for name, _ in examples())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `pytest -n 2 --dist loadgroup`: a group stays in one process (xdist 3.8 cannot mark tests of pytest 9.2)."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


TESTS_BETWEEN = 10
MANY_MAPPINGS, TOO_MANY_MAPPINGS = 8_000, 20_000
_tests = itertools.count(1)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forgets compiled programs where others are needed next, and elsewhere only if it must.

    A program is some ten memory mappings, of which Linux gives a process 65,530, and about a megabyte.
    """
    same = nextitem is None or group_of(nextitem.nodeid) == group_of(item.nodeid)
    limit = TOO_MANY_MAPPINGS if same else MANY_MAPPINGS
    mappings = Path("/proc/self/maps")
    if (not same or next(_tests) % TESTS_BETWEEN == 0) and mappings.exists():
        with mappings.open() as lines:
            many = sum(1 for _ in lines) > limit
        if many:
            jax.clear_caches()
            gc.collect()


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 within one test; without it a test runs in the types that users run in."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def optimisations(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests compile much and compute little: XLA and LLVM go without their expensive passes, two to three times faster.

    Those marked `optimised` do not; the demo and the tables, which CI runs too, compile as users do.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    disable = before and request.node.get_closest_marker("optimised") is None

    def use(disable: bool) -> None:
        jax.config.update("jax_disable_most_optimizations", disable)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(disable))

    use(disable)
    yield
    use(before)
