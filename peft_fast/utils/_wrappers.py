"""Modules that are trained whole beside an adapter (a classification head, an embedding): one trained copy per adapter.

`ModulesToSaveWrapper` takes the place of the module: state-dict keys are `<name>.original_module.*` and
`<name>.modules_to_save.<adapter>.*`; files carry `<name>.*` (see `adapter_state_dict`).
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..routing.batch import MixedBatch, current, wrong_length

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def _set_layer_requires_grad(layer: nn.Module | Tensor, requires_grad: bool) -> None:
    """Set the flag on a tensor or on all parameters of a module; views (sharded training makes some) keep theirs."""
    if isinstance(layer, Tensor):
        tensors: Iterable[Tensor | None] = [layer]
    else:  # an adapter's matrix has no modules inside: the general way takes ten times as long
        tensors = layer.parameters() if layer._modules else layer._parameters.values()
    for tensor in tensors:
        if tensor is not None and tensor.is_leaf and tensor.requires_grad != requires_grad:
            tensor.requires_grad_(requires_grad)


def as_names(adapter_names: str | Iterable[str]) -> list[str]:
    """One adapter name or several, as a list."""
    return [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)


class AuxiliaryTrainingWrapper(nn.Module):
    """A module of the base model together with what adapters train in its place.

    Subclasses say what is trained (`init_modules`, `update`) and what runs now (`_active_module`); attributes that the
    wrapper lacks are looked up on that module.

    Args:
        module_to_save: the module that is wrapped; its parameters are frozen.
        adapter_name: the first adapter that trains it.
    Raises: TypeError where the module cannot be wrapped (a container, an adapter layer).
    """

    # attributes that hold one trained thing per adapter
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, module_to_save: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.original_module = module_to_save
        self._active_adapter: str | list[str] = [adapter_name]
        self._disable_adapters = False
        self._adapters: set[str] = set()
        self.check_module()
        self.init_modules(adapter_name, **kwargs)
        self.update(adapter_name, **kwargs)
        for module in (self, *(self.get_submodule(name) for name in self.adapter_layer_names)):
            module.training = module_to_save.training

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        """Create the containers that `update` fills."""
        raise NotImplementedError

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Make this module part of one more adapter's training."""
        self._adapters.add(adapter_name)

    def _error_message_name(self) -> str:
        return "training wrapper"

    def check_module(self) -> None:
        """Refuse what cannot be wrapped: containers, which have no forward, and modules that carry adapters."""
        original = self.original_module
        if isinstance(original, _CONTAINERS) or hasattr(type(original), "adapter_layer_names"):
            raise TypeError(f"{self._error_message_name()} cannot be applied to modules of type {type(original)}")

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return as_names(self._active_adapter)

    def _get_available_adapters(self) -> set[str]:
        """Names of all adapters that train this module."""
        return set(self._adapters)

    def _active_module(self) -> nn.Module:
        """What a forward runs now: the active adapter's module, or the original."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # while unpickling there is nothing to ask yet, and asking would come back here for ever
            if name.startswith("__") or "original_module" not in self.__dict__.get("_modules", ()):
                raise
        return getattr(self._active_module(), name)

    def _module_of(self, adapter_name: str) -> nn.Module | None:
        """What runs for an adapter's rows in a mixed batch; None where it does not train this module."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The active adapter's module, or the original one; the arguments are that module's own.

        In a mixed batch, which the model's call or `adapter_names` (one per row of the first argument) says, every
        adapter's module runs at most once, on all rows, and each row gets its own adapter's output. So no module needs
        to be able to take a part of its arguments.
        Raises: ValueError if adapter_names has another length than the first argument.
        """
        names = kwargs.pop("adapter_names", None)
        if names is not None and args and len(args[0]) != len(names):
            raise wrong_length(len(names), len(args[0]))
        batch = current() if names is None else None if self._disable_adapters else MixedBatch(names)
        if batch is None:
            return self._active_module()(*args, **kwargs)
        modules = {name: self._module_of(name) for name in batch.candidates(self._adapters)}
        outputs = {name: module(*args, **kwargs) for name, module in modules.items() if module is not None}
        return batch.select(outputs, self.original_module(*args, **kwargs))

    def enable_adapters(self, enabled: bool) -> None:
        """Use the adapters' modules (True) or the original (False)."""
        self._disable_adapters = not enabled

    def check_set_adapter(self, adapter_name: str | Sequence[str]) -> str | None:
        """The one of these adapters that `set_adapter` would activate here; None if this module has none of them.

        Raises: ValueError if it has more than one of them.
        """
        raise NotImplementedError

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate an adapter of this module; an empty list means the original module."""
        raise NotImplementedError

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None) -> None:
        """Forget an adapter; where it was active, one of `new_active_adapters` (or the original module) takes its
        place.
        """
        raise NotImplementedError

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch gradients of these adapters on or off."""
        for container_name in self.adapter_layer_names:
            container = self.get_submodule(container_name)
            for name in as_names(adapter_names):
                if name in container:  # type: ignore[operator]
                    _set_layer_requires_grad(container[name], requires_grad)  # type: ignore[index]

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """One adapter's tensors under the keys of a file, taken from `state_dict` (this module's own state dict)."""
        return {file_key: state_dict[key] for file_key, key in self.adapter_state_dict_load_map(adapter_name).items()}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Key in a file -> key in this module's state dict, for all of one adapter's tensors; empty if it has none
        here.
        """
        raise NotImplementedError

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that remains when the adapters are taken off the model."""
        raise NotImplementedError


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module with one fully trained copy per adapter; one copy is active at a time.

    Args: as `AuxiliaryTrainingWrapper`. The copy starts equal to the original.
    Source: PEFT's `modules_to_save`.
    """

    adapter_layer_names: tuple[str, ...] = ("modules_to_save",)

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        self.modules_to_save = nn.ModuleDict()

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Copy the original for one more adapter; the copy is trainable if that adapter is the active one."""
        super().update(adapter_name)
        if adapter_name not in self.modules_to_save:
            self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module)
        self.original_module.requires_grad_(False)
        _set_layer_requires_grad(self.modules_to_save[adapter_name], adapter_name in self.active_adapters)

    def _error_message_name(self) -> str:
        return "modules_to_save"

    def _active_module(self) -> nn.Module:
        if not self._disable_adapters:
            for name in self.active_adapters[:1]:
                if name in self.modules_to_save:
                    return self.modules_to_save[name]
        return self.original_module

    def _module_of(self, adapter_name: str) -> nn.Module | None:
        return self.modules_to_save[adapter_name] if adapter_name in self.modules_to_save else None

    def enable_adapters(self, enabled: bool) -> None:
        """Use the active adapter's copy, trainable, or the original with every copy frozen."""
        super().enable_adapters(enabled)
        for name, module in self.modules_to_save.items():
            if not enabled or name in self.active_adapters:
                _set_layer_requires_grad(module, enabled)

    def check_set_adapter(self, adapter_name: str | Sequence[str]) -> str | None:
        here = [name for name in as_names(adapter_name) if name in self.modules_to_save]
        if len(here) > 1:
            raise ValueError(
                f"Only one adapter can be set at a time for modules_to_save, got {len(here)} that train this "
                f"{type(self.original_module).__name__}: {here}. Activate one of them."
            )
        return here[0] if here else None

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate one adapter's copy, trainable unless `inference_mode`; an empty list activates the original.

        Raises: ValueError for several names or one that has no copy here.
        """
        names = as_names(adapter_names)
        if len(names) > 1:
            raise ValueError(f"Attempted to set multiple ({names}) adapters at once for modules_to_save.")
        if names and names[0] not in self.modules_to_save:
            raise ValueError(f"Adapter {names[0]} not found in {sorted(self._adapters)}")
        for old in self.active_adapters:
            if old in self.modules_to_save:
                _set_layer_requires_grad(self.modules_to_save[old], False)
        self._active_adapter = names[0] if names else []
        if names:
            _set_layer_requires_grad(self.modules_to_save[names[0]], not inference_mode)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None) -> None:
        if adapter_name not in self.modules_to_save:
            return
        if adapter_name in self.active_adapters:
            others = [name for name in new_active_adapters or [] if name != adapter_name]
            successor = self.check_set_adapter(others)
            self.set_adapter([] if successor is None else successor)
        del self.modules_to_save[adapter_name]
        self._adapters.discard(adapter_name)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self.modules_to_save:
            return {}
        keys = self.modules_to_save[adapter_name].state_dict()
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in keys}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The active adapter's copy, or the original where none is active (whether or not adapters are merged)."""
        for name in self.active_adapters[:1]:
            if name in self.modules_to_save:
                return self.modules_to_save[name]
        return self.original_module
