"""PromptEncoder: from the indices of virtual tokens to their embeddings, through a network while they are learned."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from .._prompt_encoder import BasePromptEncoder, count_tokens
from .config import PromptEncoderConfig, PromptEncoderReparameterizationType

__all__ = ["PromptEncoder"]


class PromptEncoder(BasePromptEncoder):
    """Embeddings (B, T, token_dim) for indices (B, T) int64, T = num_virtual_tokens * num_transformer_submodules.

    Args:
        config: with the sizes of the base model filled in (`_prepare_prompt_learning_config`). In `inference_mode`
            there is no network: the embedding is its output, as it stands in a file.
    Attributes: embedding; mlp_head and, for LSTM, lstm_head, where there is a network.
    Raises: ValueError for an unknown `encoder_reparameterization_type`.
    """

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__()
        if config.token_dim is None:
            raise ValueError("PromptEncoder: the config needs token_dim")
        self.token_dim = self.input_size = self.output_size = config.token_dim
        self.hidden_size = config.encoder_hidden_size
        self.total_virtual_tokens = count_tokens(config)
        self.encoder_type = config.encoder_reparameterization_type
        self.embedding = nn.Embedding(self.total_virtual_tokens, self.token_dim)
        if not config.inference_mode:
            self._add_network(config, self.token_dim, self.token_dim if self.hidden_size is None else self.hidden_size)

    def _add_network(self, config: PromptEncoderConfig, width: int, hidden: int) -> None:
        if self.encoder_type == PromptEncoderReparameterizationType.LSTM:
            self.lstm_head = nn.LSTM(
                width,
                hidden,
                num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            self.mlp_head = nn.Sequential(nn.Linear(hidden * 2, hidden * 2), nn.ReLU(), nn.Linear(hidden * 2, width))
        elif self.encoder_type == PromptEncoderReparameterizationType.MLP:
            if config.encoder_num_layers != PromptEncoderConfig.encoder_num_layers:
                warnings.warn(
                    "for MLP, the argument `encoder_num_layers` is ignored. Exactly "
                    f"{PromptEncoderConfig.encoder_num_layers} MLP layers are used.",
                    stacklevel=3,
                )
            layers = (nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
            self.mlp_head = nn.Sequential(*layers, nn.Linear(hidden, width))
        else:
            raise ValueError("Prompt encoder type not recognized. Please use one of MLP (recommended) or LSTM.")

    @property
    def is_reparameterized(self) -> bool:
        return "mlp_head" in self._modules

    def forward(self, indices: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(indices)
        if "lstm_head" in self._modules:
            embedded = self.lstm_head(embedded)[0]
        return self.mlp_head(embedded) if self.is_reparameterized else embedded
