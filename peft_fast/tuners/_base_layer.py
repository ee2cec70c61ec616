"""`BaseTunerLayer`: what every adapter layer can do, whatever its method."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..utils._wrappers import _set_layer_requires_grad, as_names


class BaseTunerLayer:
    """Mixin of the modules that take the place of a base layer and keep it as `base_layer`.

    A subclass names its attributes that hold one entry per adapter: `adapter_layer_names` those with weights
    (ModuleDict or
    ParameterDict), `other_param_names` all others. It creates them, and `merged_adapters = []`, in its `__init__`.
    Methods never change `base_layer`, except for merging. `weight` and `bias` are the base layer's.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    # names of the adapters that are added into the base weight now, in order
    merged_adapters: list[str]
    # whether a forward may cast its input to the adapter's dtype, see `helpers.disable_input_dtype_casting`
    cast_input_dtype_enabled: bool = True
    _disable_adapters: bool = False
    _frozen_by_disabling: Sequence[Tensor] = ()
    _active_adapter: str | list[str] = "default"

    def get_base_layer(self) -> nn.Module:
        """The layer of the base model, under all adapter layers."""
        layer: Any = self
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        base_layer: nn.Module = layer
        return base_layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: some models read `layer.weight` (T5)."""
        base_layer: Any = self.get_base_layer()
        weight: Tensor = base_layer.qweight if hasattr(base_layer, "qweight") else base_layer.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        base_layer: Any = self.get_base_layer()
        bias: Tensor | None = base_layer.bias
        return bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active (or the named) adapters into the base weight. `safe_merge` refuses a result that is not
        finite.
        """
        raise NotImplementedError

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged now."""
        return bool(getattr(self, "merged_adapters", None))

    @property
    def disable_adapters(self) -> bool:
        """Whether only the base layer runs; see `enable_adapters`."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return as_names(self._active_adapter)

    def _get_available_adapters(self) -> set[str]:
        """Names of the adapters with weights in this layer."""
        return {name for container in self._containers() for name in container}

    def _all_available_adapter_names(self) -> list[str]:
        """Names of the adapters with weights or settings in this layer, sorted."""
        names = self._get_available_adapters()
        for attribute in self.other_param_names:
            entries = getattr(self, attribute)
            if hasattr(entries, "keys"):
                names.update(entries.keys())
        return sorted(names)

    def _containers(self) -> list[Any]:
        """The ModuleDicts and ParameterDicts with weights."""
        # from _modules: adding an adapter asks this of every layer, and nn.Module's own look-up is slow
        modules: Any = self.__dict__["_modules"]
        candidates = [modules[name] for name in self.adapter_layer_names if name in modules]
        return [entry for entry in candidates if (entry._modules or entry._parameters) and _is_container(entry)]

    def enable_adapters(self, enabled: bool) -> None:
        """Run with the active adapters (True), or without any, all of them frozen (False).

        Enabled again, every tensor requires gradients as it did when it was disabled, and none that did not: PEFT makes
        the active adapters trainable, those that were loaded for inference too.
        """
        if enabled:
            for tensor in self._frozen_by_disabling:
                tensor.requires_grad = True
            self._frozen_by_disabling = []
        elif not self._disable_adapters:
            tensors = [tensor for container in self._containers() for tensor in container.parameters()]
            self._frozen_by_disabling = [tensor for tensor in tensors if tensor.requires_grad]
            for tensor in self._frozen_by_disabling:
                tensor.requires_grad = False
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate adapters and make them trainable (frozen in `inference_mode`); those active until now are frozen.

        A name that this layer does not have is allowed: adapters may adapt different layers.
        """
        names = as_names(adapter_names)
        self.set_requires_grad([name for name in self.active_adapters if name not in names], False)
        self.set_requires_grad(names, not inference_mode)
        object.__setattr__(self, "_active_adapter", names)  # a module's own way looks for tensors first

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch gradients of these adapters on or off, whether or not they are active."""
        names = as_names(adapter_names)
        for container in self._containers() if names else ():
            for name in names:
                # by what nn.Module keeps them in: asking the container costs more than setting the flags
                entry = container._modules.get(name)
                entry = container._parameters.get(name) if entry is None else entry
                if entry is not None:
                    _set_layer_requires_grad(entry, requires_grad)
                    if self._frozen_by_disabling:  # who says it now knows better
                        said = {id(t) for t in (entry.parameters() if isinstance(entry, nn.Module) else (entry,))}
                        self._frozen_by_disabling = [t for t in self._frozen_by_disabling if id(t) not in said]

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Where it was the only active one, the first of the others becomes active: a warning.

        Raises: ValueError if it is merged.
        """
        if adapter_name in getattr(self, "merged_adapters", ()):
            raise ValueError(f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Unmerge them first.")
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            entries = getattr(self, attribute)
            if hasattr(entries, "keys") and adapter_name in entries:
                del entries[adapter_name]
        if adapter_name not in self.active_adapters:
            return
        active = [name for name in self.active_adapters if name != adapter_name]
        if not active and (active := self._all_available_adapter_names()[:1]):
            warn_deleted_active(adapter_name, active)
        self.set_adapter(active)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move one adapter to the base layer's device (or `device`) and to its dtype if that is a float type.

        Adapters on the meta device stay there; integer entries keep their dtype.
        """
        base_layer: Any = self.get_base_layer()
        if isinstance(base_layer, nn.MultiheadAttention):
            base_layer = base_layer.out_proj
        weight = getattr(base_layer, "weight", None)
        weight = getattr(base_layer, "qweight", None) if weight is None else weight
        if weight is None:
            return
        device = weight.device if device is None else device
        dtype = (
            getattr(base_layer, "compute_dtype", None) or weight.dtype
        )  # bitsandbytes' layers say what they compute in
        containers: Any = self.__dict__["_modules"]
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            entries: Any = containers.get(attribute)
            if entries is None or not _is_container(entries) or adapter_name not in entries:
                continue
            entry: Any = entries[adapter_name]
            if isinstance(entry, Tensor):
                tensors = [entry]
            elif entry._modules:
                tensors = [*entry.parameters(), *entry.buffers()]
            else:
                tensors = [t for t in (*entry._parameters.values(), *entry._buffers.values()) if t is not None]
            if any(tensor.is_meta for tensor in tensors):
                continue
            if all(t.device == device and t.dtype == dtype for t in tensors):
                continue
            keeps_dtype = not dtype.is_floating_point or (isinstance(entry, Tensor) and not entry.is_floating_point())
            moved = entry.to(device) if keeps_dtype else entry.to(device, dtype)
            if moved is not entry:
                entries[adapter_name] = (
                    nn.Parameter(moved.detach(), entry.requires_grad) if isinstance(entry, nn.Parameter) else moved
                )

    def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Refuse what a layer of this method cannot do. Raises: ValueError if adapter_names is given."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names (several adapters in one batch) is not supported by peft_fast yet")

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        """x in `dtype`, or x itself if it is None, has that dtype, or casting is switched off."""
        if x is None or x.dtype == dtype or not self.cast_input_dtype_enabled:
            return x
        return x.to(dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter can be written as LoRA: it adds a matrix to the base weight."""
        return False


def _is_container(entries: Any) -> bool:
    return isinstance(entries, nn.ModuleDict | nn.ParameterDict)


def warn_deleted_active(adapter_name: str, successors: Sequence[str]) -> None:
    """Tell that another adapter is used now."""
    warnings.warn(
        f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {successors[0]}.",
        stacklevel=3,
    )


def check_adapters_to_merge(module: BaseTunerLayer, adapter_names: list[str] | None = None) -> list[str]:
    """The adapters that a merge of `adapter_names` (None: the active ones) still has to add; warns if some are merged
    already.

    Raises: TypeError if `adapter_names` is a string.
    """
    names = module.active_adapters if adapter_names is None else adapter_names
    if isinstance(names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {names!r}.")
    if not module.merged:
        return list(names)
    names = [name for name in names if name not in module.merged_adapters]
    if names:
        warnings.warn(
            f"Already following adapters were merged {','.join(module.merged_adapters)}. "
            f"You are now additionally merging {','.join(names)}.",
            stacklevel=2,
        )
    else:
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
    return names
