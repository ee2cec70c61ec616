"""What can be done to the adapters of any model that has adapter layers, whoever put them there."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.constants import UPCAST_DTYPES
from ..utils.other import AuxiliaryTrainingWrapper, _set_adapter, walk
from ._base_layer import BaseTunerLayer, warn_deleted_active


def adapted_modules(model: nn.Module) -> list[Any]:
    """All adapter layers and wrappers of a model."""
    return [s.module for s in walk(model) if isinstance(s.module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def tuner_layers(model: nn.Module, layer_cls: type[BaseTunerLayer] = BaseTunerLayer) -> list[Any]:
    """All adapter layers of a model."""
    return [site.module for site in walk(model) if isinstance(site.module, layer_cls)]


def set_adapter(
    model: nn.Module,
    adapter_name: str | list[str],
    inference_mode: bool = False,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> None:
    """Activate adapter(s) in all layers and wrappers, trainable unless `inference_mode`; merged layers are unmerged
    first.

    Raises: ValueError if two of them train the same module whole.
    """
    _set_adapter(model, adapter_name, inference_mode=inference_mode)
    for layer in tuner_layers(model, layer_cls):
        if layer.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            layer.unmerge()
        layer.set_adapter(adapter_name, inference_mode=inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Switch gradients of these adapters on or off in all layers and wrappers."""
    for module in adapted_modules(model):
        module.set_requires_grad(adapter_names, requires_grad)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str, layer_cls: type[BaseTunerLayer] = BaseTunerLayer
) -> list[str] | None:
    """Remove an adapter's weights and settings from all layers and wrappers; a config that the model has is not
    touched.

    Where it was the only active adapter, the first of the others (by name) becomes active everywhere, with a warning.

    Args:
        prefix: the method's; layers are found by their class, so it is not needed, and is taken for PEFT's sake.
    Returns: the active adapters after it; None if there are none.
    Raises: ValueError if the adapter is merged.
    """
    layers = tuner_layers(model, layer_cls)
    wrappers = [module for module in adapted_modules(model) if isinstance(module, AuxiliaryTrainingWrapper)]
    if any(adapter_name in layer.merged_adapters for layer in layers if layer.merged):
        raise ValueError(f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first.")
    active = list(layers[0].active_adapters) if layers else []
    if adapter_name in active:
        active.remove(adapter_name)
        if not active:
            left = {name for layer in layers for name in layer._all_available_adapter_names()} - {adapter_name}
            active = sorted(left)[:1]
            if active:
                warn_deleted_active(adapter_name, active)
        # before it goes, so that no layer chooses a successor of its own
        _set_adapter(model, active)
        for layer in layers:
            layer.set_adapter(active)
    for layer in layers:
        layer.delete_adapter(adapter_name)
    for wrapper in wrappers:
        wrapper.delete_adapter(adapter_name, active)
    return active or None


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Widen one adapter's fp16, bf16 and fp8 weights to fp32, as new parameters; nothing if `autocast_adapter_dtype`
    is False.
    """
    if not autocast_adapter_dtype:
        return
    narrow = {torch.float16, torch.bfloat16, *(getattr(torch, name) for name in UPCAST_DTYPES if hasattr(torch, name))}
    for layer in tuner_layers(model):
        for container in layer._containers():
            if adapter_name not in container:
                continue
            entry = container[adapter_name]
            owners = (
                [(container, adapter_name, entry)]
                if isinstance(entry, Tensor)
                else [
                    (module, name, tensor) for module in entry.modules() for name, tensor in module._parameters.items()
                ]
            )
            for owner, name, tensor in owners:
                if tensor is not None and tensor.dtype in narrow:
                    wide = nn.Parameter(tensor.detach().to(torch.float32), requires_grad=tensor.requires_grad)
                    if isinstance(owner, nn.ParameterDict):
                        owner[name] = wide
                    else:
                        setattr(owner, name, wide)
