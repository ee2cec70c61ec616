"""PrefixTuningConfig: PEFT 0.21.2's fields and defaults."""

from __future__ import annotations

from dataclasses import dataclass

from ...config import PromptLearningConfig
from ...utils.peft_types import PeftType

__all__ = ["PrefixTuningConfig"]


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Configuration of prefix tuning: learned keys and values before those of the text, in every layer.

    Args: those of `PromptLearningConfig`, and
        init_weights: None (random) or "zero".
        encoder_hidden_size: hidden size of the projection; None: the model's.
        prefix_projection: learn the prefix through an MLP of two layers. Files hold its output.
    Raises: as `PromptLearningConfig`.
    Source: Li and Liang 2021, arXiv:2101.00190.
    """

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING
