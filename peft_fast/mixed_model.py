"""PeftMixedModel: PEFT's model for adapters of different methods at once; here is its place."""

from __future__ import annotations

from typing import Any

from torch import nn

from .config import PeftConfig

__all__ = ["PeftMixedModel"]


class PeftMixedModel(nn.Module):
    """Adapters of different methods in one model. Not supported yet: every way to make one raises ValueError."""

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default") -> None:
        super().__init__()
        raise ValueError(
            "PeftMixedModel (get_peft_model(..., mixed=True)) is not supported by peft_fast yet. Several LoRA adapters "
            "can be active at once without it: model.base_model.set_adapter([...])."
        )

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, model_id: str, adapter_name: str = "default", is_trainable: bool = False, **kwargs: Any
    ) -> PeftMixedModel:
        """Raises: ValueError, as the constructor."""
        return cls(model, PeftConfig(), adapter_name)
