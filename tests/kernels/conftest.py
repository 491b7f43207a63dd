"""No test of a kernel passes if the kernel had a race."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.common import without_races


@pytest.fixture(autouse=True)
def races() -> Iterator[None]:
    with without_races():
        yield
