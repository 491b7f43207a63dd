"""Models built from layer groups."""

from seqmodels.models.lm import LanguageModel, LMState, ModelConfig

__all__ = ["LMState", "LanguageModel", "ModelConfig"]
