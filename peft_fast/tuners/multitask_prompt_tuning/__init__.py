"""Multitask prompt tuning: one learned prompt, and a factor of low rank for each task. Wang et al. 2023."""

from .config import MultitaskPromptTuningConfig, MultitaskPromptTuningInit
from .model import MultitaskPromptEmbedding

__all__ = ["MultitaskPromptEmbedding", "MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"]
