"""Mixers along time, one file each, and a small instance of every one of them."""

from collections.abc import Iterator

from seqmodels.mixers.attention import AttentionConfig
from seqmodels.typing import MixerConfig

__all__ = ["AttentionConfig", "examples"]


def examples() -> Iterator[tuple[str, MixerConfig]]:
    """`(name, config)` for a small instance of every mixer, to be made at width 64."""
    yield "attention", AttentionConfig(heads=4, kv_heads=2)
    yield "sliding_attention", AttentionConfig(heads=4, kv_heads=1, window=8, rope_fraction=0.5)
