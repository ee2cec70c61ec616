"""`BaseTuner`: puts a method's layers into a model, switches, merges and removes them. PEFT's module of that name.

A walk over the model never enters the weights of adapters (`utils.other.walk`), so nothing here gets slower with
their number.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..prompts.attention.interface import give_back
from ..utils.constants import DUMMY_MODEL_CONFIG, EMBEDDING_LAYER_NAMES
from ..utils.error import NoMatchingPeftModuleError
from ..utils.other import (
    AuxiliaryTrainingWrapper,
    _get_module_names_tied_with_embedding,
    _get_submodules,
    adapter_modules,
    as_names,
    set_additional_trainable_modules,
    walk,
)
from ._adapters import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad, tuner_layers
from ._base_layer import BaseTunerLayer, check_adapters_to_merge
from ._injection import Snapshot, check_mamba, find_targets
from ._matching import (
    PatternBudget,
    _find_minimal_target_modules,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    get_pattern_key,
    match_target_against_key,
)
from ._offload import onload_layer
from ._prompt_encoder import BasePromptEncoder
from ._special_targets import (
    check_targets_run,
    give_back_the_fast_path,
    hang_everywhere,
    keep_off_the_fast_path,
    note_shared_weights,
)

__all__ = [
    "BasePromptEncoder",
    "BaseTuner",
    "BaseTunerLayer",
    "NoMatchingPeftModuleError",
    "_find_minimal_target_modules",
    "_get_submodules",
    "_maybe_include_all_linear_layers",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "delete_adapter",
    "get_pattern_key",
    "inspect_matched_modules",
    "match_target_against_key",
    "onload_layer",
    "set_adapter",
    "set_requires_grad",
    "tuner_layers",
]


class BaseTuner(nn.Module):
    """A base model with adapters of one method in it. `forward`, and any attribute that is not found here, are the
    base model's.

    A method's subclass sets `prefix` (how its parameters' names begin), `tuner_layer_cls` and `target_module_mapping`
    (targets by
    model type) and implements `_create_and_replace`.

    Args:
        model: the base model, changed in place.
        peft_config: the adapter's config, or a dict of adapter name -> config.
        adapter_name: the adapter that is injected, and active.
        low_cpu_mem_usage: create its weights on the meta device, to be replaced by loaded ones.
        state_dict: take the targets from the keys of these weights instead of from the config.
    Raises: as `inject_adapter`; the model is as it was then.
    """

    model: Any
    peft_config: Any  # adapter name -> config
    prefix: str
    tuner_layer_cls: type[BaseTunerLayer]
    target_module_mapping: Mapping[str, list[str] | str]

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        configs = dict(peft_config) if isinstance(peft_config, dict) else {adapter_name: peft_config}
        self.peft_config = getattr(model, "peft_config", None) or {}
        if self.peft_config:
            warnings.warn(
                "Already found a `peft_config` attribute in the model. This will lead to having multiple adapters "
                "in the model. Make sure to know what you are doing!",
                stacklevel=2,
            )
        self.peft_config.update(configs)
        self.active_adapter: str | list[str] = adapter_name
        self.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
        self.model.peft_config = self.peft_config

    @property
    def active_adapters(self) -> list[str]:
        return as_names(self.active_adapter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet: unpickling, or __init__ failed early
                raise
            return getattr(self.model, name)

    # --------------------------------------------------------------------------------------- for the methods to fill
    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: Any,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        """Put the adapter into `target`: a new layer in its place under `parent`, or one more adapter in its layer."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it adapts a layer")

    def _prepare_adapter_config(self, peft_config: Any, model_config: Mapping[str, Any]) -> Any:
        """Fill in target_modules=None by the model's type. Raises: ValueError for an unknown type."""
        if peft_config.target_modules is None:
            targets = self.target_module_mapping.get(model_config["model_type"])
            if targets is None:
                raise ValueError("Please specify `target_modules` in `peft_config`")
            peft_config.target_modules = targets if isinstance(targets, str) else set(targets)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Change the model before its targets are looked for."""

    def _check_new_adapter_config(self, config: Any) -> None:
        """Raises: ValueError if the config does not go together with the other adapters'."""
        with_bias = [name for name, other in self.peft_config.items() if getattr(other, "bias", "none") != "none"]
        if len(with_bias) > 1:
            raise ValueError(
                f"{type(self).__name__} supports only 1 adapter with bias. When using multiple adapters, "
                "set bias to 'none' for all adapters."
            )

    def _check_targets(self, peft_config: Any, targets: Sequence[tuple[str, nn.Module]]) -> None:
        """Raises what `_create_and_replace` would for these (name, module)s, before the first of them is changed."""

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        check_mamba(peft_config, model, target_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around each forward and generate of a PeftModel, whose arguments these are.

        Raises: ValueError for arguments that are for adapters and that the method does not know.
        """
        for name in ("adapter_names", "adapter_ids", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not supported by peft_fast yet; activate one adapter with set_adapter")
        yield

    # ----------------------------------------------------------------------------------------------------- injection
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Create the layers of the adapter whose config is in `peft_config`.

        The first adapter of a model freezes the rest of it. A further one changes nothing for the others, and is
        frozen unless it
        is one of `active_adapters`.

        Args:
            autocast_adapter_dtype: not used here, see `_cast_adapter_dtype`. Others: as the class.
        Raises: NoMatchingPeftModuleError (a ValueError) if nothing is targeted; ValueError for a config or a module
            that the method cannot do. The model, its adapters and `peft_config` are as they were then.
        """
        config = self.peft_config[adapter_name]
        given_targets = getattr(config, "target_modules", None)
        before = Snapshot(model, adapter_name)
        try:
            targets = self._create_layers(model, adapter_name, low_cpu_mem_usage, state_dict)
            active = adapter_name in self.active_adapters
            if not before.has_adapters:
                self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
                self._mark_only_adapters_as_trainable(model)
            elif active:
                self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            else:
                for name in targets:
                    layer = model.get_submodule(name)
                    if isinstance(layer, BaseTunerLayer):
                        if adapter_name in layer.active_adapters:  # a new layer
                            layer.set_adapter(self.active_adapters)
                        layer.set_requires_grad(adapter_name, False)
            set_additional_trainable_modules(model, config, self.get_model_config(model), adapter_name, active)
            if before.has_adapters:
                before.restore_flags()
        except BaseException:
            before.restore()
            config.target_modules = given_targets
            if not before.had_this_one:
                self.peft_config.pop(adapter_name, None)
            raise
        self.targeted_module_names = list(dict.fromkeys([*self.targeted_module_names, *targets]))

    def _create_layers(
        self, model: nn.Module, adapter_name: str, on_meta: bool, state_dict: Mapping[str, Tensor] | None
    ) -> list[str]:
        """Find the targets and put the adapter's layers there; returns the targets' names."""
        config = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        self._check_tied_modules(model, config)
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        self._prepare_model(config, model)
        targets = find_targets(config, model, state_dict, self.prefix, PatternBudget())
        for site in targets:
            self._check_target_module_compatiblity(config, model, site.child_name)
        check_targets_run(config, model, targets)
        self._check_targets(config, [(site.name, site.module) for site in targets])
        replaced: dict[nn.Module, nn.Module] = {}
        for site in targets:
            with torch.device("meta") if on_meta else nullcontext():
                self._create_and_replace(
                    config, adapter_name, site.module, site.child_name, site.parent, current_key=site.name
                )
            new: Any = None if site.parent is None else site.parent._modules[site.child_name]
            if new is not None and new is not site.module:
                replaced[site.module] = new
        if replaced:
            hang_everywhere(model, replaced)
            keep_off_the_fast_path(model, replaced.values())
        return [site.name for site in targets]

    def _mark_only_adapters_as_trainable(self, model: Any) -> None:
        """Freeze the base model; of its biases, train what the active adapters' `bias` says.

        Raises: NotImplementedError for an unknown `bias`.
        """
        base = [site for site in walk(model, "base") if not isinstance(site.module, AuxiliaryTrainingWrapper)]
        for site in base:
            for parameter in site.module._parameters.values():
                if parameter is not None and parameter.is_leaf:
                    parameter.requires_grad = False
        for adapter_name in self.active_adapters:
            bias = getattr(self.peft_config[adapter_name], "bias", "none")
            if bias == "none":
                continue
            if bias == "all":
                owners = [site.module for site in base]
            elif bias.endswith("_only"):
                owners = [
                    site.module.get_base_layer() for site in base if isinstance(site.module, self.tuner_layer_cls)
                ]
            else:
                raise NotImplementedError(f"Requested bias: {bias}, is not implemented.")
            for owner in owners:
                if (parameter := owner._parameters.get("bias")) is not None:
                    parameter.requires_grad = True

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Hang `new_module` in the place of `child`; what is new in it takes the child's mode, training or not."""
        base = set(child.modules())
        for module in new_module.modules():
            if module not in base:
                module.training = child.training
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return check_target_module_exists(peft_config, key)

    @staticmethod
    def get_model_config(model: Any) -> dict[str, Any]:
        """The base model's config as a dict; {"model_type": "custom"} if it has none."""
        config = getattr(model, "config", DUMMY_MODEL_CONFIG)
        if hasattr(config, "to_dict"):
            config = config.to_dict()
        elif dataclasses.is_dataclass(config):
            config = dataclasses.asdict(config)  # type: ignore[arg-type]
        return config

    # ----------------------------------------------------------------------------------------------------- switching
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one or several adapters, trainable unless `inference_mode`; merged ones are unmerged first.

        Raises: ValueError for an unknown adapter, or if two of them train the same module whole. Nothing has changed
            then.
        """
        for name in as_names(adapter_name):
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} not found. There are: {sorted(self.peft_config)}")
        set_adapter(self.model, adapter_name, inference_mode, self.tuner_layer_cls)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch gradients of these adapters on or off, whether or not they are active."""
        set_requires_grad(self.model, adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Run with the active adapters again."""
        for module in adapter_modules(self.model):
            module.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Run the base model alone. Warns where trained biases make a difference that stays."""
        for name in self.active_adapters:
            bias = getattr(self.peft_config[name], "bias", "none")
            if bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the "
                    "same output as the base model would without adaption.",
                    stacklevel=2,
                )
        for module in adapter_modules(self.model):
            module.enable_adapters(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; where it was the only active one, another becomes active, with a warning.

        Raises: ValueError for an unknown adapter or one that is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        with self._leaving(adapter_name):
            active = delete_adapter(self.model, adapter_name, self.prefix, self.tuner_layer_cls)
            del self.peft_config[adapter_name]
            self.active_adapter = active or []

    def _leaving(self, adapter_name: str) -> AbstractContextManager[None]:
        """Around an adapter's deletion: a method that can be asked for it by name in a call waits for such calls."""
        return nullcontext()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer's adapter can be written as LoRA."""
        return all(layer.supports_lora_conversion(adapter_name) for layer in tuner_layers(self.model))

    # ------------------------------------------------------------------------------------------------------- merging
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the active (or the named) adapters into the base weights; they are kept, and can be taken out again.

        Raises: what a layer's merge raises, for instance ValueError with `safe_merge` where the result is not finite.
            The layers that this call has merged are unmerged then.
        """
        self._check_merge_allowed()
        layers = tuner_layers(self.model)
        note_shared_weights(self.model, layers)
        before = [(layer, list(layer.merged_adapters)) for layer in layers]
        try:
            for layer in layers:
                with onload_layer(layer):
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        except BaseException:
            for layer, names in before:
                if layer.merged_adapters != names:
                    with onload_layer(layer):
                        layer.unmerge()
                        layer.merge(adapter_names=names)
            raise

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights."""
        for layer in tuner_layers(self.model):
            with onload_layer(layer):
                layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge the active (or the named) adapters and take the layers off; returns the base model with its own layers.

        Args:
            progressbar: show one.
            safe_merge: refuse a weight that is not finite.
            adapter_names: what to merge; None means the active ones.
        Raises: as `merge_adapter`.
        """
        return self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """Take the layers off without merging; returns the base model with its own layers."""
        return self._unload_and_optionally_merge(merge=False)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        from tqdm.auto import tqdm

        if merge:
            self.merge_adapter(adapter_names, safe_merge)
        sites = [s for s in walk(self.model) if isinstance(s.module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        replaced: dict[nn.Module, nn.Module] = {}
        # from the inside out: a wrapper's copy may hold adapter layers
        for site in tqdm(sites[::-1], disable=not progressbar, desc=f"Unloading {'and merging ' * merge}model"):
            child = site.module
            if hasattr(child, "unload_and_optionally_merge_module"):
                base = child.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
            else:
                base = child.get_base_layer()
            if site.parent is not None:
                setattr(site.parent, site.child_name, base)
                replaced[child] = base
        hang_everywhere(self.model, replaced)
        give_back_the_fast_path(self.model)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        give_back(self.model)  # of prefixes beside the adapters
        if merge:
            self._untie_config_if_weights_differ()
        model: nn.Module = self.model
        return model

    def _untie_config_if_weights_differ(self) -> None:
        """A model whose embeddings are no longer tied must not be saved as one whose are."""
        tied = self.get_model_config(self.model).get("tie_word_embeddings")
        if not tied or not hasattr(self.model, "get_output_embeddings"):
            return
        embeddings = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        weight_in, weight_out = (getattr(module, "weight", None) for module in embeddings)
        if weight_in is not None and weight_out is not None and weight_in.data_ptr() != weight_out.data_ptr():
            self.model.config.tie_word_embeddings = False
            warnings.warn(
                "Input and output embeddings are no longer tied after merging. "
                "Setting `tie_word_embeddings=False` in the model config.",
                stacklevel=4,
            )

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        if not self.get_model_config(model).get("tie_word_embeddings"):
            return []
        return [name for name in self.targeted_module_names if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]

    def _check_merge_allowed(self) -> None:
        """Warn of adapters on tied embeddings. Raises: ValueError where a method cannot merge."""
        tied_target_modules = self._get_tied_target_modules(self.model)
        if tied_target_modules:
            warnings.warn(
                f"Model with `tie_word_embeddings=True` and the {tied_target_modules=} are part of the adapter. "
                "Merging gives them a weight of their own: afterwards the embeddings are no longer tied.",
                stacklevel=4,
            )

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Warn if a module with a tied weight is adapted or trained: merging changes the other, or unties them."""
        names = [*(getattr(peft_config, "modules_to_save", None) or [])]
        targets = getattr(peft_config, "target_modules", None) or []
        if isinstance(targets, str):
            budget = PatternBudget()
            names += [n for n in EMBEDDING_LAYER_NAMES if budget.match("target_modules", targets, n, full=True)]
        else:
            names += targets
        hit = any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in names)
        if hit and _get_module_names_tied_with_embedding(model):
            warnings.warn(
                "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but "
                "`ensure_weight_tying` is not set to True. This can lead to complications, for example when merging "
                "the adapter or converting your model to formats other than safetensors. "
                "See https://github.com/huggingface/peft/issues/2777",
                stacklevel=6,
            )


def inspect_matched_modules(tuner: BaseTuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """The names of the modules that an adapter's config means ("matched") and of all others ("unmatched")."""
    config = tuner.peft_config[adapter_name]
    result: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for site in walk(tuner.model, "nothing"):
        result["matched" if tuner._check_target_module_exists(config, site.name) else "unmatched"].append(site.name)
    return result
