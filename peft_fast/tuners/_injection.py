"""One adapter's injection: which modules it takes, what it warns of, how everything is put back when it fails."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..checkpoint.validate import listed, short
from ..utils.constants import (
    DUMMY_TARGET_MODULES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
)  # fmt: skip
from ..utils.error import NoMatchingPeftModuleError
from ..utils.other import AuxiliaryTrainingWrapper, Site, _set_layer_requires_grad, nearest, walk
from ._base_layer import BaseTunerLayer
from ._matching import (
    PatternBudget,
    TargetMatcher,
    _ExcludedModule,
    _find_minimal_target_modules,
    _suffixes,
    resolve_all_linear,
    unused_patterns,
)
from ._special_targets import refuse_experts

_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_NOT_IN_MAMBA = {"out_proj", "conv1d"}


class Snapshot:
    """A model's structure, active adapters and gradient flags, taken in one walk that no adapter makes longer.

    Args:
        model: the base model with whatever adapters it has.
        adapter_name: the adapter that is about to come; whether it is there already is noted.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.adapter_name = adapter_name
        self.sites = list(walk(model))
        self._places = [(site.module, key, child) for site in self.sites for key, child in site.module._modules.items()]
        adapted = [s.module for s in self.sites if isinstance(s.module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        self.has_adapters = any(isinstance(module, BaseTunerLayer) for module in adapted)
        self.had_this_one = any(adapter_name in module._get_available_adapters() for module in adapted)
        self._states = [(module, module._active_adapter, module._disable_adapters) for module in adapted]
        tensors = [tensor for site in self.sites for tensor in site.module._parameters.values() if tensor is not None]
        for layer in adapted:
            if isinstance(layer, BaseTunerLayer):
                tensors += _adapter_tensors(layer, layer.active_adapters)
        self._flags = [(tensor, tensor.requires_grad) for tensor in tensors]

    def restore_flags(self) -> None:
        """Give every parameter that was there the gradient flag that it had."""
        for tensor, requires_grad in self._flags:
            _set_layer_requires_grad(tensor, requires_grad)

    def restore(self) -> None:
        """Hang every module where it was, forget the new adapter, and give back active adapters and gradient flags."""
        for parent, key, child in self._places:
            if parent._modules.get(key) is not child and not isinstance(parent, BaseTunerLayer):
                setattr(parent, key, child)
        for module, active, disabled in self._states:
            if not self.had_this_one:
                # it is not active, so no other adapter is chosen in its place
                module._active_adapter = []
                if isinstance(module, BaseTunerLayer):
                    module.delete_adapter(self.adapter_name)
                else:
                    module.delete_adapter(self.adapter_name, [])
            module._active_adapter, module._disable_adapters = active, disabled
        self.restore_flags()


def _adapter_tensors(layer: BaseTunerLayer, names: Iterable[str]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for container in layer._containers():
        for name in names:
            if name in container:
                entry = container[name]
                tensors += [entry] if isinstance(entry, Tensor) else entry.parameters()
    return tensors


def find_targets(
    config: Any, model: nn.Module, state_dict: Mapping[str, Any] | None, prefix: str, budget: PatternBudget
) -> list[Site]:
    """The modules that an adapter adapts: those its config means, or, with a state dict, those that it has weights for.

    Insides of adapter layers and of modules that are trained whole are not looked at. `config.target_modules` is
    rewritten: names
    for "all-linear", and the shortest equivalent for long lists.
    Raises: NoMatchingPeftModuleError if there are none; ValueError for patterns that are wrong or take too long.
    """
    if getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES:
        return []
    if getattr(config, "target_parameters", None):
        raise ValueError("target_parameters is not supported by peft_fast yet; leave it at None")
    # a parametrization's own modules are how a weight is made, not layers
    sites = [site for site in list(walk(model, "nothing"))[1:] if ".parametrizations." not in f".{site.name}"]
    asked = getattr(config, "target_modules", None)
    everything = str(getattr(config, "target_modules", None)).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    resolve_all_linear(config, model, sites)
    _shorten_targets(config, [site.name for site in sites])
    matcher = TargetMatcher(config, budget)
    if state_dict is None:
        refuse_experts(sites, _all_but_excluded(config, budget) if everything else matcher)
    results = {site.name: matcher(site.name.removeprefix("_orig_mod.")) for site in sites}
    targets = [site for site in sites if results[site.name]]
    if state_dict is not None:
        wanted = {key.rsplit("." + prefix, 1)[0].removeprefix("_orig_mod.") for key in state_dict}
        refuse_experts(sites, lambda name: False, wanted)
        by_config, targets = targets, [site for site in sites if site.name.removeprefix("_orig_mod.") in wanted]
        _warn_different(by_config, targets)
    any_excluded = any(isinstance(result, _ExcludedModule) for result in results.values())
    any_unmatched = any(result is False for result in results.values()) or state_dict is not None
    if not targets:
        raise NoMatchingPeftModuleError(_no_match_message(config, any_excluded and state_dict is None, any_unmatched))
    _warn_unused(config, [site.name for site in targets], any_excluded, budget)
    if state_dict is None and isinstance(asked, list | set | tuple):
        _warn_unmatched(config, asked, [site.name for site in sites], [site.name for site in targets])
    return targets


def _all_but_excluded(config: Any, budget: PatternBudget) -> Callable[[str], bool]:
    """What "all-linear" means of layers that are not there: all that exclude_modules does not name."""
    excluded = TargetMatcher(replace(config, target_modules=".*"), budget)
    return lambda name: bool(excluded(name))


def _shorten_targets(config: Any, names: list[str]) -> None:
    targets = config.target_modules
    if isinstance(targets, str) or not targets or len(targets) < MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        return
    others = {name for name in names if set(targets).isdisjoint(_suffixes(name))}
    shorter = _find_minimal_target_modules(targets, others - set(targets))
    if len(shorter) < len(targets):
        config.target_modules = shorter


def _warn_different(by_config: list[Site], by_state_dict: list[Site]) -> None:
    config_names, file_names = ({site.name for site in sites} for sites in (by_config, by_state_dict))
    if config_names == file_names:
        return
    message = (
        "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the provided "
        "state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
    )
    if config_names - file_names:
        more = listed(sorted(config_names - file_names))
        message += f"The PEFT config contained these additional target modules: [{more}]. "
    if file_names - config_names:
        more = listed(sorted(file_names - config_names))
        message += f"The state_dict contained these additional target modules: [{more}]. "
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def _no_match_message(config: Any, any_excluded: bool, any_unmatched: bool) -> str:
    if any_excluded and not any_unmatched:
        return (
            "All modules were excluded. This is likely unintended. "
            "Check your `target_modules`, `exclude_modules` and `modules_to_save` configuration."
        )
    if not any_excluded and not config.target_modules:
        return (
            "No `target_modules` passed but also no `target_parameters` found. Please check the values for these "
            "arguments."
        )
    if any_excluded:
        message = (
            "No modules were targeted for adaptation. This might be caused by a combination of mismatched target "
            "modules and excluded modules. Please check your `target_modules` and `exclude_modules` configuration. "
            "You may also have only targeted modules that are marked to be saved (`modules_to_save`)."
        )
    else:
        message = (
            f"Target modules {short(config.target_modules)} not found in the base model. "
            "Please check the target modules and try again."
        )
    if getattr(config, "layers_to_transform", None) is not None:
        message += f" Note: You specified 'layers_to_transform': {config.layers_to_transform}."
    if getattr(config, "layers_pattern", None) is not None:
        message += f" You also specified 'layers_pattern': {config.layers_pattern}."
    return message


def _warn_unused(config: Any, names: list[str], any_excluded: bool, budget: PatternBudget) -> None:
    """Warn of settings that had no effect on any module."""
    excluded = getattr(config, "exclude_modules", None)
    if excluded and not any_excluded:
        warnings.warn(
            f"You have passed exclude_modules={excluded} but no modules were excluded. "
            "Please check that exclude_modules was set correctly.",
            stacklevel=5,
        )
    for field in ("rank_pattern", "alpha_pattern"):
        unused = unused_patterns(config, field, names, budget)
        if unused:
            warnings.warn(
                f"The following {field} keys did not match any targeted module and were ignored: {unused}.",
                RuntimeWarning,
                stacklevel=5,
            )


def _warn_unmatched(config: Any, asked: Iterable[str], names: list[str], targeted: list[str]) -> None:
    """Warn of target modules and layers that are not in the model, beside others that are."""
    known = {ending for name in names for ending in _suffixes(name.removeprefix("_orig_mod."))}
    if missing := sorted(name for name in asked if name not in known):
        shown = ", ".join(f"{name!r}{nearest(name, names)}" for name in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        warnings.warn(f"target_modules: no module of the model is called {shown}{more}.", stacklevel=6)
    layers = getattr(config, "layers_to_transform", None)
    layers = [layers] if isinstance(layers, int) else layers or []
    numbers = {part for name in targeted for part in name.split(".") if part.isdigit()}
    if absent := [layer for layer in layers if str(layer) not in numbers]:
        warnings.warn(f"layers_to_transform: no target module is in a layer {listed(absent)}.", stacklevel=6)


def check_mamba(config: Any, model: nn.Module, target_name: str) -> None:
    """Raises: ValueError for parts of a Mamba block whose kernels read the weight past the layer, so that LoRA has no
    effect.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _MAMBA and target_name in _NOT_IN_MAMBA and config.peft_type in {"LORA", "ADALORA"}:
        raise ValueError(
            f"[PEFT:{config.peft_type}] Module '{target_name}' is incompatible with Mamba-based models "
            f"(model_type='{model_type}'). Incompatible modules: {_NOT_IN_MAMBA}. "
            "Please remove it from `target_modules` to avoid compatibility issues."
        )
