"""`BasePromptEncoder`: the learned tokens of one prompt learning adapter, and what of them stands in a file."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["BasePromptEncoder", "count_tokens"]


def count_tokens(config: Any) -> int:
    """Rows of the embedding of prompt tuning and p-tuning: an encoder with a decoder has tokens for both."""
    submodules = config.num_transformer_submodules
    if submodules is None:
        submodules = 2 if config.task_type == "SEQ_2_SEQ_LM" else 1
    tokens: int = config.num_virtual_tokens * submodules
    return tokens


class BasePromptEncoder(nn.Module):
    """Base class of the modules that make virtual tokens from their indices.

    Attributes: embedding, one row for each virtual token. With a network behind it (`is_reparameterized`, for training
        only) a file holds what comes out of the network, which nobody can put back into it.
    """

    embedding: nn.Embedding

    @property
    def is_reparameterized(self) -> bool:
        """Whether a network maps the embedding to what a model sees."""
        return False

    def file_tensors(self) -> dict[str, str]:
        """Name in a file -> name in this module's state dict, when nothing is reparameterized."""
        return {"prompt_embeddings": "embedding.weight"}

    def prompt_embeddings(self, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """What a file holds as `prompt_embeddings`: (virtual tokens, width), the network evaluated, without gradient.

        Args:
            weights: used in place of the encoder's own, by their names in its state dict (shards that were gathered).
        """
        if not self.is_reparameterized:
            return self.embedding.weight.detach() if weights is None else weights["embedding.weight"]
        used = dict(self.named_parameters()) if weights is None else weights
        used = {name: tensor.detach().requires_grad_() for name, tensor in used.items()}
        indices = torch.arange(self.embedding.num_embeddings, device=used["embedding.weight"].device)
        training = self.training
        self.eval()  # no dropout: what is saved is what inference uses
        try:
            with torch.enable_grad():  # an LSTM rounds in another way without: a file has what training saw
                output: Tensor = functional_call(self, used, (indices.unsqueeze(0),))
        finally:
            self.train(training)
        return output[0].detach()

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Write what a file holds into the embedding.

        Raises: ValueError for another shape, and if the encoder has a network, for which there is no way back.
        """
        if self.is_reparameterized:
            raise ValueError(self.no_way_back())
        weight = self.embedding.weight
        if prompt_embeddings.shape != weight.shape:
            raise ValueError(
                f"Invalid `prompt_embeddings` shape. Expected {tuple(weight.shape)}, got "
                f"{tuple(prompt_embeddings.shape)}."
            )
        with torch.no_grad():
            weight.copy_(prompt_embeddings)

    def no_way_back(self) -> str:
        """Why nothing can be loaded into an encoder with a network."""
        return (
            f"this {type(self).__name__} has a network behind its embedding for training, and a file holds what comes "
            "out of it: load it under another name"
        )
