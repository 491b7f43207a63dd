"""A config that cannot work is refused when it is written, with the value and the way out."""

from __future__ import annotations

from typing import Any

import pytest

from seqmodels.mixers import AttentionConfig, Mamba2Config, RGLRUConfig


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (RGLRUConfig, {"method": "asociative"}, "unknown method 'asociative': choose one of auto, sequential"),
        (RGLRUConfig, {"conv_width": 0}, "conv_width must be at least 1, not 0"),
        (RGLRUConfig, {"blocks": 0}, "blocks must be at least 1, not 0"),
        (Mamba2Config, {"method": "chunkd"}, "unknown method 'chunkd'"),
        (Mamba2Config, {"chunk": 0}, "at least 1, not 0"),
        (Mamba2Config, {"expansion": -1.0}, r"expansion must be positive, not -1\.0"),
        (Mamba2Config, {"norm_eps": 0.0}, r"norm_eps must be positive, not 0\.0"),
        (Mamba2Config, {"step_limit": (0.5, 0.5)}, "step_limit needs 0 <= low < high, or None"),
        (AttentionConfig, {"head_size": 0}, "head_size must be at least 1, not 0; None is width / heads"),
        (AttentionConfig, {"rope_fraction": 2.0}, r"in \(0, 1\], not 2\.0"),
        (AttentionConfig, {"logits_cap": 0.0}, "or None for no cap"),
    ],
)
def test_a_config_that_cannot_work_is_refused(config: Any, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)
