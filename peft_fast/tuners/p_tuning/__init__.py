"""P-tuning: learned tokens before the embeddings of the text, learned through a small network. Liu et al. 2021."""

from .config import PromptEncoderConfig, PromptEncoderReparameterizationType
from .model import PromptEncoder

__all__ = ["PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"]
