"""Prompt tuning: learned tokens before the embeddings of the text. Lester et al. 2021."""

from .config import PromptTuningConfig, PromptTuningInit
from .model import PromptEmbedding

__all__ = ["PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"]
