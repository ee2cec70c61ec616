"""Gradient checkpointing of the base model: whether it is on, and what adapters need of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["checkpoints_activations", "make_inputs_require_grad"]


def make_inputs_require_grad(model: nn.Module) -> None:
    """Let the embeddings' output require grad; quantized models are left alone."""
    if any(getattr(model, name, False) for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")):
        return
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # type: ignore[operator]
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(_require_grad)  # type: ignore[operator]


def checkpoints_activations(model: nn.Module) -> bool:
    """Whether the model uses gradient checkpointing; of a model that cannot tell, it is assumed."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):  # the second until transformers 5.20
        if hasattr(type(model), name):
            return bool(getattr(model, name))
    return True


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)
