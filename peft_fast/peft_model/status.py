"""What state the adapters of a model are in: which are there, active, merged, trainable, and on which devices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from ..tuners.tuners_utils import BaseTuner, BaseTunerLayer
from ..utils.other import AuxiliaryTrainingWrapper, walk

__all__ = [
    "TunerLayerStatus",
    "TunerModelStatus",
    "adapter_layers",
    "adapters_enabled",
    "count_parameters",
    "get_layer_status",
    "get_model_status",
]

T = TypeVar("T")
Irregular = Literal["irregular"]  # not the same in all layers: probably an accident


@dataclass
class TunerLayerStatus:
    """One adapter layer.

    Args:
        name: in the tuner, such as "model.encoder.block.0.layer.0.SelfAttention.q".
        module_type: such as "lora.Linear".
        enabled: its adapters take part in a forward.
        active_adapters, merged_adapters, available_adapters: names.
        requires_grad: by adapter.
        devices: types of the devices of its weights, by adapter.
        quantization_backend: of the base layer, or None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """All adapter layers of a model together; "irregular" where they differ. Fields as in `TunerLayerStatus`, and:

    Args:
        base_model_type, adapter_model_type: class names, such as "T5Model" and "LoraModel".
        peft_types: adapter name -> method.
        trainable_params, total_params, num_adapter_layers: counts.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; 4-bit weights and parameters sharded by DeepSpeed count with their real number."""
    trainable = total = 0
    for parameter in model.parameters():
        number = parameter.numel() or getattr(parameter, "ds_numel", 0)
        if type(parameter).__name__ == "Params4bit":  # two values to a byte of storage
            number *= 2 * parameter.element_size()
        total += number
        trainable += number if parameter.requires_grad else 0
    return trainable, total


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of each module that carries adapters."""
    for site in walk(model):
        if isinstance(site.module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield site.name, site.module


def adapters_enabled(model: nn.Module) -> bool | Irregular:
    """Whether the adapter layers are enabled, without looking at their parameters."""
    enabled: bool | Irregular = _common(not layer.disable_adapters for _, layer in adapter_layers(model))
    return enabled


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapter layer of a PeftModel, or of a model that adapters were injected into.

    Raises: TypeError for a PeftModel without adapter layers by design (prompt learning); ValueError if there are none.
    """
    layers = [_layer_status(name, layer) for name, layer in adapter_layers(_tuner(model, "get_layer_status"))]
    if not layers:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters "
            "injected in the model."
        )
    return layers


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of all adapter layers together. Raises: as `get_layer_status`."""
    tuner = _tuner(model, "get_model_status")
    wrapped = tuner is not model
    layers = get_layer_status(model)
    trainable, total = count_parameters(model)
    configs = tuner.peft_config if wrapped else {}
    merged = {name for layer in layers for name in layer.merged_adapters}
    partly = any(merged & (set(layer.available_adapters) - set(layer.merged_adapters)) for layer in layers)
    return TunerModelStatus(
        base_model_type=type(tuner.model).__name__ if wrapped else _plain_type(model),
        adapter_model_type=type(tuner).__name__ if wrapped else "None",
        peft_types={name: str(getattr(c.peft_type, "value", c.peft_type)) for name, c in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters=_common(layer.active_adapters for layer in layers),
        merged_adapters="irregular" if partly else sorted(merged),
        requires_grad={name: _common(values) for name, values in _by_adapter(layer.requires_grad for layer in layers)},
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={
            name: sorted({device for devices in lists for device in devices})
            for name, lists in _by_adapter(layer.devices for layer in layers)
        },
        quantization_backend=_common(layer.quantization_backend for layer in layers),
    )


def _tuner(model: Any, function: str) -> Any:
    """The tuner of a PeftModel; a model that is none, itself."""
    if "base_model" not in model._modules or not hasattr(type(model), "get_base_model"):
        return model
    if not isinstance(model.base_model, BaseTuner):
        raise TypeError(f"{function}() got a PeftModel without adapter layers; prompt learning is not supported.")
    return model.base_model


def _plain_type(model: nn.Module) -> str:
    """PEFT names the class of a transformers model and calls every other one "other"."""
    from transformers import PreTrainedModel

    return type(model).__name__ if isinstance(model, PreTrainedModel) else "other"


def _layer_status(name: str, layer: Any) -> TunerLayerStatus:
    weights = _tensors_by_adapter(layer, layer.adapter_layer_names)
    everything = _tensors_by_adapter(layer, (*layer.adapter_layer_names, *layer.other_param_names))
    backend = getattr(layer, "quantization_backend", None)
    return TunerLayerStatus(
        name=name,
        module_type=repr(layer).partition("(")[0],
        enabled=not layer.disable_adapters,
        active_adapters=layer.active_adapters,
        merged_adapters=layer.merged_adapters if isinstance(layer, BaseTunerLayer) else [],
        requires_grad={key: _common(t.requires_grad for t in tensors) for key, tensors in weights.items()},
        available_adapters=sorted(layer._get_available_adapters()),
        devices={key: sorted({t.device.type for t in tensors}) for key, tensors in everything.items()},
        quantization_backend=None if backend is None else backend.backend_name,
    )


def _tensors_by_adapter(layer: Any, attributes: Iterable[str]) -> dict[str, list[Tensor]]:
    tensors: dict[str, list[Tensor]] = defaultdict(list)
    for attribute in attributes:
        container = getattr(layer, attribute)
        if isinstance(container, nn.ModuleDict | nn.ParameterDict):
            for adapter_name, entry in container.items():
                new = [entry] if isinstance(entry, Tensor) else list(entry.parameters())
                if new:
                    tensors[adapter_name].extend(new)
    return tensors


def _by_adapter(layers: Iterable[dict[str, T]]) -> Iterable[tuple[str, list[T]]]:
    values: dict[str, list[T]] = defaultdict(list)
    for layer in layers:
        for name, value in layer.items():
            values[name].append(value)
    return values.items()


def _common(values: Iterable[Any]) -> Any:
    """The value that all share, else "irregular"."""
    first, *others = list(values) or [True]
    return first if all(other == first for other in others) else "irregular"
