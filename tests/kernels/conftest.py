"""No test of a kernel passes if the kernel had a race."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.common import STRICT, without_races


@pytest.fixture(autouse=True)
def races(request: pytest.FixtureRequest) -> Iterator[None]:
    """Strict cases compile quickly besides: the interpreter compiles a kernel once a core, and that is their time."""
    case = getattr(request.node, "callspec", None)
    if case is not None and case.params.get("interpret") is STRICT:
        request.getfixturevalue("quick_compilation")
    with without_races():
        yield
