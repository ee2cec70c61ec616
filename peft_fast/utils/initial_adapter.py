"""From an adapter initialised out of the base weights (PiSSA, OLoRA) to a plain LoRA adapter of the same effect."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import open_weights

__all__ = ["relative_to_initial"]


def relative_to_initial(
    config: Any, tensors: Mapping[str, Tensor], initial: str | os.PathLike[str]
) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and weights of a LoRA adapter with the effect that training had.

    Training began at scaling * B0 @ A0, which initialisation took out of the base weight; what it added is
    scaling * (B @ A - B0 @ A0) = scaling * [B, -B0] @ [A; A0]: rank 2r, and lora_alpha grows so that scaling stays.

    Args:
        config: LoraConfig of the trained adapter, not changed.
        tensors: its weights by their names in a file: lora_A (r, ...), lora_B (N, r, ...).
        initial: directory that the adapter was saved to before training.
    Returns: (new config, new weights); weights that are no part of LoRA are kept.
    Raises: ValueError if the directory has no weights for one of them, or their shapes disagree, or use_rslora is
        combined with a rank_pattern or alpha_pattern.
    Source: PEFT's `path_initial_model_for_weight_conversion`.
    """
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when using "
            "`rank_pattern` or `alpha_pattern` at the same time as `use_rslora=True`."
        )
    if not str(config.init_lora_weights).lower().startswith(("pissa", "olora", "true")):
        warnings.warn(
            "`path_initial_model_for_weight_conversion` only works for converting a PiSSA/OLoRA adapter to a LoRA "
            "adapter",
            stacklevel=3,
        )
    before = open_weights(Path(initial)).load("cpu")
    converted = {name: _joined(name, tensor, before, initial) for name, tensor in tensors.items()}
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    config.r *= 2
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    config.rank_pattern = {key: 2 * value for key, value in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {key: 2 * value for key, value in (config.alpha_pattern or {}).items()}
    return config, converted


def _joined(name: str, after: Tensor, before: Mapping[str, Tensor], initial: str | os.PathLike[str]) -> Tensor:
    is_a = "lora_A" in name or "lora_embedding_A" in name
    if not is_a and "lora_B" not in name and "lora_embedding_B" not in name:
        return after
    if name not in before or before[name].shape != after.shape:
        found = tuple(before[name].shape) if name in before else "no such tensor"
        raise ValueError(f"{initial}: expected {name!r} with shape {tuple(after.shape)}, got {found}")
    start = before[name].to(after.device, after.dtype)
    return torch.cat([after, start], 0) if is_a else torch.cat([after, -start], 1)
