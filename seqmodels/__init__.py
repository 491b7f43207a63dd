"""Efficient sequence models in JAX: write an associative operator once, get every way of executing it, and its tests.

What is used by everyone stands here and is imported when it is first asked for, so that `import seqmodels` and commands
which only print their help cost nothing. `scan`, `step` and `sharded_scan` are imported from `seqmodels.scan`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqmodels.models.lm import LanguageModel, ModelConfig
    from seqmodels.scan import Recurrence
    from seqmodels.typing import Context, Segments

_EXPORTS = {
    "Context": "seqmodels.typing",
    "LanguageModel": "seqmodels.models.lm",
    "ModelConfig": "seqmodels.models.lm",
    "Recurrence": "seqmodels.scan",
    "Segments": "seqmodels.typing",
}

__all__ = ["Context", "LanguageModel", "ModelConfig", "Recurrence", "Segments"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'seqmodels' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
