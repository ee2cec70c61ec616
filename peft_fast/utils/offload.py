"""Base models that accelerate keeps partly on the CPU: hooks off while an adapter is put on, then placed again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["dispatch_again", "take_hooks_off"]


def take_hooks_off(model: nn.Module) -> bool:
    """If accelerate offloads weights of the model, bring them all back and remove its hooks. Returns whether it did.

    Raises: ValueError if weights are offloaded to disk: there is no memory that they could come back to.
    """
    hooks: list[Any] = [getattr(module, "_hf_hook", None) for module in model.modules()]
    offloading = [hook for hook in hooks if getattr(hook, "offload", False)]
    if not offloading:
        return False
    if any(torch.device("meta") == torch.device(d) for hook in offloading for d in hook.original_devices.values()):
        raise ValueError(
            "Loading an adapter on a base model with weights offloaded to disk is not supported by peft_fast yet. Load "
            "the base with a device_map that uses GPU and CPU only."
        )
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    return True


def dispatch_again(model: nn.Module, base: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Distribute the model over the devices, as accelerate does when a base model is loaded.

    Args:
        model: the base with its adapter, all of it on the CPU.
        base: the base model; its inputs are moved to where it runs.
        kwargs: `device_map` ("auto" unless given, or a dict with the names of `model`), `max_memory`.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils import get_balanced_memory

    device_map, whole = kwargs.get("device_map", "auto"), list(getattr(base, "_no_split_modules", None) or ())
    if isinstance(device_map, str):
        memory = kwargs.get("max_memory")
        if device_map != "sequential":
            low_zero = device_map == "balanced_low_0"
            memory = get_balanced_memory(model, max_memory=memory, no_split_module_classes=whole, low_zero=low_zero)
        device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    dispatch_model(model, device_map=device_map)
    add_hook_to_module(base, AlignDevicesHook(io_same_device=True))
