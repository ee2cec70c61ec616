"""PromptEmbedding: from the indices of virtual tokens to their embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._prompt_encoder import BasePromptEncoder, count_tokens
from .config import PromptTuningConfig, PromptTuningInit

__all__ = ["PromptEmbedding"]


class PromptEmbedding(BasePromptEncoder):
    """Embeddings (B, T, token_dim) for indices (B, T) int64, T = num_virtual_tokens * num_transformer_submodules.

    Args:
        config: with the sizes of the base model filled in (`_prepare_prompt_learning_config`). In `inference_mode` the
            embedding is about to be loaded: `prompt_tuning_init` is not looked at, and no file is opened.
        word_embeddings: the base model's, used for TEXT and SAMPLE_VOCAB.
    Attributes: embedding, in fp32.
    Raises: ValueError for an unknown `prompt_tuning_init`, and a text without any token; the tokenizer's errors.
    """

    inits: tuple[str, ...] = tuple(PromptTuningInit)

    def __init__(self, config: PromptTuningConfig, word_embeddings: Any) -> None:
        super().__init__()
        tokens, token_dim, init = count_tokens(config), config.token_dim, config.prompt_tuning_init
        if token_dim is None:
            raise ValueError(f"{type(self).__name__}: the config needs token_dim")
        if init not in self.inits and not config.inference_mode:
            raise ValueError(f"prompt_tuning_init={init!r}: expected one of {', '.join(map(str.__str__, self.inits))}")
        self.embedding = nn.Embedding(tokens, token_dim)
        if config.inference_mode or init not in (PromptTuningInit.TEXT, PromptTuningInit.SAMPLE_VOCAB):
            return
        if init == PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(0, word_embeddings.num_embeddings, (tokens,))
        else:
            ids = _text_ids(config, tokens)
        with torch.no_grad():
            embedded = word_embeddings(ids.to(word_embeddings.weight.device))
        self.embedding.weight = nn.Parameter(embedded.to(torch.float32, copy=True))

    def forward(self, indices: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(indices)
        return embedded


def _text_ids(config: PromptTuningConfig, tokens: int) -> Tensor:
    """The ids of the text's tokens, (tokens,) int64: cut, or repeated."""
    from transformers import AutoTokenizer

    kwargs = config.tokenizer_kwargs or {}
    kwargs.pop("trust_remote_code", None)  # a configuration may come from anywhere: it must not name code to run
    ids = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **kwargs)(config.prompt_tuning_init_text)[
        "input_ids"
    ]
    if not ids:
        raise ValueError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no token to start from")
    return torch.tensor((ids * (tokens // len(ids) + 1))[:tokens])
