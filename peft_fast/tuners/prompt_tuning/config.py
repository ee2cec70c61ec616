"""PromptTuningConfig: PEFT 0.21.2's fields and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from ...config import PromptLearningConfig
from ...utils.peft_types import PeftType

__all__ = ["PromptTuningConfig", "PromptTuningInit"]


class PromptTuningInit(str, Enum):  # noqa: UP042 (str() must be PEFT's)
    """What the learned tokens start as: the embeddings of a text, of random tokens, or random numbers."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Configuration of prompt tuning: learned tokens before the embeddings of the text.

    Args: those of `PromptLearningConfig`, and
        prompt_tuning_init: see `PromptTuningInit`.
        prompt_tuning_init_text, tokenizer_name_or_path: for TEXT: the text, repeated or cut to the number of tokens,
            and the tokenizer that splits it.
        tokenizer_kwargs: for TEXT: passed to AutoTokenizer.from_pretrained; `trust_remote_code` is left out.
    Raises: ValueError for a TEXT without text or tokenizer, and for tokenizer_kwargs without TEXT; as
        `PromptLearningConfig`.
    Source: Lester et al. 2021, arXiv:2104.08691.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        is_text = self.prompt_tuning_init == PromptTuningInit.TEXT
        if is_text and not self.tokenizer_name_or_path:
            raise ValueError(
                f"When prompt_tuning_init='TEXT', tokenizer_name_or_path can't be {self.tokenizer_name_or_path}."
            )
        if is_text and self.prompt_tuning_init_text is None:
            raise ValueError("When prompt_tuning_init='TEXT', prompt_tuning_init_text can't be None.")
        if self.tokenizer_kwargs and not is_text:
            raise ValueError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")
