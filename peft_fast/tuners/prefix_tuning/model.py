"""PrefixEncoder: from the indices of virtual tokens to the keys and values of all layers."""

from __future__ import annotations

from torch import Tensor, nn

from .._prompt_encoder import BasePromptEncoder
from .config import PrefixTuningConfig

__all__ = ["PrefixEncoder"]


class PrefixEncoder(BasePromptEncoder):
    """Keys and values (B, P, 2 * num_layers * token_dim) for indices (B, P) int64, P = num_virtual_tokens.

    Args:
        config: with the sizes of the base model filled in (`_prepare_prompt_learning_config`). In `inference_mode`
            there is no projection: the embedding is its output, as it stands in a file.
    Attributes: embedding; transform, the projection, where there is one.
    Raises: ValueError for unknown `init_weights`.
    """

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        tokens, token_dim, layers = config.num_virtual_tokens, config.token_dim, config.num_layers
        hidden = config.encoder_hidden_size
        if config.init_weights not in (None, "zero") and not config.inference_mode:
            raise ValueError(f"PrefixTuningConfig(init_weights={config.init_weights!r}): expected None or 'zero'")
        if tokens is None or token_dim is None or layers is None:
            raise ValueError("PrefixEncoder: the config needs num_virtual_tokens, token_dim and num_layers")
        self.prefix_projection = config.prefix_projection
        width = layers * 2 * token_dim
        if config.prefix_projection and not config.inference_mode:
            if hidden is None:
                raise ValueError("PrefixEncoder: prefix_projection needs encoder_hidden_size")
            self.embedding = nn.Embedding(tokens, token_dim)
            self.transform = nn.Sequential(nn.Linear(token_dim, hidden), nn.Tanh(), nn.Linear(hidden, width))
        else:
            self.embedding = nn.Embedding(tokens, width)
        if config.init_weights == "zero":
            last = self.transform[-1] if self.is_reparameterized else self.embedding
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    @property
    def is_reparameterized(self) -> bool:
        return "transform" in self._modules

    def forward(self, prefix: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(prefix)
        return self.transform(embedded) if self.is_reparameterized else embedded

    def no_way_back(self) -> str:
        return f"Cannot load flattened prompt embeddings when `prefix_projection=True`: {super().no_way_back()}"
