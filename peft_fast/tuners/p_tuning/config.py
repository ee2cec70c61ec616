"""PromptEncoderConfig: PEFT 0.21.2's fields and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ...config import PromptLearningConfig
from ...utils.peft_types import PeftType

__all__ = ["PromptEncoderConfig", "PromptEncoderReparameterizationType"]


class PromptEncoderReparameterizationType(str, Enum):  # noqa: UP042 (str() must be PEFT's)
    """The network through which tokens are learned."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Configuration of p-tuning: learned tokens before the embeddings of the text, learned through a small network.

    Args: those of `PromptLearningConfig`, and
        encoder_reparameterization_type: "MLP" of three layers, or "LSTM", bidirectional, with an MLP of two behind it.
        encoder_hidden_size: of the network; None: token_dim.
        encoder_num_layers: of the LSTM.
        encoder_dropout: between the layers of the LSTM, a probability.
    Raises: as `PromptLearningConfig`.
    Source: Liu et al. 2021, arXiv:2103.10385.
    """

    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING
