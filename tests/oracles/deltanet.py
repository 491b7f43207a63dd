"""The DeltaNet layer (arXiv 2406.06484): the gated one's oracle, which without `a_log` and a gate is this system."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.oracles.gated_deltanet import gated_deltanet_layer


def deltanet_layer(
    x: np.ndarray, parameters: dict[str, Any], starts: set[int], state: dict[str, Any] | None = None, **options: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """As `gated_deltanet_layer`, with memories [key size, value size]."""
    swapped = lambda state: {**state, "memory": state["memory"].swapaxes(1, 2)}
    assert not {"a_log", "gate"} & set(parameters)
    y, after = gated_deltanet_layer(x, parameters, starts, None if state is None else swapped(state), **options)
    return y, swapped(after)
