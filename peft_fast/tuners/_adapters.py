"""What can be done to the adapters of any model that has adapter layers, whoever put them there."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.constants import UPCAST_DTYPES
from ..utils.other import AuxiliaryTrainingWrapper, adapter_modules, set_wrappers, walk
from ._base_layer import BaseTunerLayer, warn_deleted_active


def tuner_layers(model: nn.Module, layer_cls: type[BaseTunerLayer] = BaseTunerLayer) -> list[Any]:
    """All adapter layers of a model."""
    return [module for module in adapter_modules(model) if isinstance(module, layer_cls)]


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
    modules = adapter_modules(model)
    set_wrappers([m for m in modules if isinstance(m, AuxiliaryTrainingWrapper)], adapter_name, inference_mode)
    for layer in modules:
        if not isinstance(layer, layer_cls):
            continue
        if layer.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            layer.unmerge()
        layer.set_adapter(adapter_name, inference_mode=inference_mode)


@contextmanager
def taken_out(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Around a change of an adapter's weights: layers that have it merged take it out, and merge it again after."""
    with ExitStack() as stack:
        for layer in adapter_modules(model):
            if adapter_name in getattr(layer, "merged_adapters", ()):
                stack.enter_context(layer.taken_out(adapter_name))
        yield


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Switch gradients of these adapters on or off in all layers and wrappers."""
    for module in adapter_modules(model):
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
    modules = adapter_modules(model)
    layers: list[Any] = [module for module in modules if isinstance(module, layer_cls)]
    wrappers = [module for module in modules if isinstance(module, AuxiliaryTrainingWrapper)]
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
        set_wrappers(wrappers, active)
        for layer in layers:
            layer.set_adapter(active)
    for layer in layers:
        layer.delete_adapter(adapter_name)
    for wrapper in wrappers:
        wrapper.delete_adapter(adapter_name, active)
    return active or None


def set_eval(model: nn.Module, adapter_name: str) -> None:
    """`model.eval()`, without a visit to the adapters of layers that are in eval mode but for this one."""
    for site in walk(model):
        module = site.module
        if isinstance(module, BaseTunerLayer) and site.module.training:
            site.module.eval()
        elif isinstance(module, BaseTunerLayer):
            for container in module._containers():
                if adapter_name in container and isinstance(container[adapter_name], nn.Module):
                    container[adapter_name].training = False
        else:
            module.training = False


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
            if isinstance(entry, Tensor):
                owners = [(container, adapter_name, entry)]
            else:
                modules = entry.modules() if entry._modules else (entry,)
                owners = [(module, name, tensor) for module in modules for name, tensor in module._parameters.items()]
            for owner, name, tensor in owners:
                if tensor is not None and tensor.dtype in narrow:
                    wide = nn.Parameter(tensor.detach().to(torch.float32), requires_grad=tensor.requires_grad)
                    if isinstance(owner, nn.ParameterDict):
                        owner[name] = wide
                    else:
                        setattr(owner, name, wide)
