"""One adapter's place in a model: which tensor has which name in a file, and which base weights a file may bring.

Names are found by walking the model's structure, never by searching for an adapter's name inside keys. The walk does
not enter the containers of other adapters, so that it does not get slower with their number.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint.names import COMPILED_LEVEL

if TYPE_CHECKING:
    from ..tuners.tuners_utils import BasePromptEncoder

PREFIX = "base_model.model."
# Levels that sharding wrappers add to module names and leave out of state dicts.
_SHARDING_LEVEL = re.compile(r"_(fsdp_wrapped|checkpoint_wrapped)_module")


@dataclass(frozen=True)
class Slot:
    """A parameter or buffer of the model: `key` in the state dict, held by `owner` under `attribute`.

    bare: the key without the levels that adapters add, for a base weight.
    """

    key: str
    owner: nn.Module
    attribute: str
    bare: str = ""

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = getattr(self.owner, self.attribute)
        return tensor

    def sharded(self, value: Tensor) -> Tensor:
        """This process's part of a whole tensor, where the model's tensor is sharded (DTensor); else `value` itself."""
        old = self.tensor
        if not hasattr(old, "device_mesh") or hasattr(value, "device_mesh"):
            return value
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(old.device), old.device_mesh, old.placements)  # type: ignore[attr-defined]

    def write(self, value: Tensor) -> None:
        """Copy into the tensor, or take its place where that has no data yet (meta device)."""
        old, value = self.tensor, self.sharded(value)
        if not old.is_meta:
            with torch.no_grad():
                old.copy_(value)
        elif self.attribute in self.owner._parameters:
            self.owner._parameters[self.attribute] = nn.Parameter(value, requires_grad=old.requires_grad)
        else:
            self.owner._buffers[self.attribute] = value


@dataclass
class Survey:
    """One adapter's place in a model.

    layers: name in a file -> slot, for what its layers hold. auxiliary: the same for modules trained whole.
    duplicates: names under which PEFT writes some of those a second time. base: key -> slot of every base weight.
    tuner_layers: names of all layers that carry an adapter, this one or another.
    encoder: of a prompt learning adapter, whose file names what follows without the tuner's level: such files come from
    models that have no tuner; encoder_name: where it is.
    """

    layers: dict[str, Slot] = field(default_factory=dict)
    auxiliary: dict[str, Slot] = field(default_factory=dict)
    duplicates: dict[str, Slot] = field(default_factory=dict)
    base: dict[str, Slot] = field(default_factory=dict)
    tuner_layers: dict[str, nn.Module] = field(default_factory=dict)
    encoder: BasePromptEncoder | None = None
    encoder_name: str = ""
    tuner_level: str = ""  # what the names in the file are without
    seen: set[int] = field(default_factory=set)

    @property
    def own(self) -> dict[str, Slot]:
        """Everything that belongs to the adapter."""
        return {**self.layers, **self.auxiliary}

    def file_name(self, key: str) -> str:
        """The name in the file for a key that has no adapter's name in it."""
        key = key.replace(COMPILED_LEVEL, "")
        if self.tuner_level and key.startswith(self.tuner_level):
            return "base_model." + key.removeprefix(self.tuner_level)
        return key

    def visit(self, module: nn.Module, name: str, bare: str, adapter_name: str) -> None:
        """Add a module and what is below it."""
        from ..tuners.tuners_utils import BasePromptEncoder, BaseTunerLayer
        from .other import AuxiliaryTrainingWrapper

        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        if isinstance(module, AuxiliaryTrainingWrapper):
            for file_key, key in module.adapter_state_dict_load_map(adapter_name).items():
                owner, _, attribute = key.rpartition(".")
                slot = Slot(join(name, key), module.get_submodule(owner), attribute)
                self.auxiliary[join(name, file_key)] = slot
                if key == f"modules_to_save.{adapter_name}.{file_key}":
                    # PEFT takes the adapter's name out of a key only where one level follows it
                    level = f"modules_to_save.{adapter_name}" if "." in file_key else "modules_to_save"
                    self.duplicates[join(name, level, file_key)] = slot
            self.visit(module.original_module, join(name, "original_module"), bare, adapter_name)
        elif isinstance(module, BaseTunerLayer):
            self.tuner_layers[name] = module
            for attribute, child in _members(module):
                if attribute == "base_layer":
                    self.visit(child, join(name, "base_layer"), bare, adapter_name)
                else:
                    self._add_own(module, attribute, child, name, adapter_name)
        elif isinstance(module, BasePromptEncoder):
            if name.rpartition(".")[2] == adapter_name:
                self.encoder, self.encoder_name = module, name
                for file_name, key in module.file_tensors().items():
                    owner, _, attribute = key.rpartition(".")
                    self.layers[file_name] = Slot(join(name, key), module.get_submodule(owner), attribute)
        else:
            for attribute in _tensor_names(module):
                key = join(name, attribute)
                self.base[key] = Slot(key, module, attribute, join(bare, attribute))
            for attribute, child in module.named_children():
                level = "" if _SHARDING_LEVEL.fullmatch(attribute) else attribute
                self.visit(child, join(name, level), join(bare, level), adapter_name)

    def _add_own(self, layer: nn.Module, attribute: str, child: Any, name: str, adapter_name: str) -> None:
        """Add what a tuner layer holds under one attribute: a container by adapter name, or something shared."""
        owner: Any = layer
        container = isinstance(child, (nn.ModuleDict, nn.ParameterDict)) or hasattr(child, "keys")
        if container and adapter_name not in child:
            return
        file_name = key = join(name, attribute)
        if container:
            owner, attribute, child = child, adapter_name, child[adapter_name]
            key = join(key, adapter_name)
        if isinstance(child, Tensor):
            self.layers[file_name] = Slot(key, owner, attribute)
        else:
            for path, holder, tensor_name in _tensors_below(child):
                self.layers[join(file_name, path)] = Slot(join(key, path), holder, tensor_name)


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _members(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Tensors and sub-modules held directly, in the order of the state dict."""
    for attribute in _tensor_names(module):
        yield attribute, getattr(module, attribute)
    yield from module.named_children()


def _tensor_names(module: nn.Module) -> list[str]:
    """Attributes of a module that its state dict has: parameters and persistent buffers."""
    buffers = [n for n, b in module._buffers.items() if b is not None and n not in module._non_persistent_buffers_set]
    return [n for n, p in module._parameters.items() if p is not None] + buffers


def _tensors_below(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(path, holder, attribute) of every tensor of a module's state dict."""
    for name, holder in module.named_modules() if module._modules else [("", module)]:
        for attribute in _tensor_names(holder):
            yield join(name, attribute), holder, attribute


def survey_adapter(model: nn.Module, adapter_name: str) -> Survey:
    """Find one adapter's tensors, and the base's, in a PeftModel or a model with injected adapters."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        # After a forward the root may hold gathered copies: what is written into those is lost.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    survey = Survey()
    survey.visit(model, "", "", adapter_name)
    if survey.encoder is not None and hasattr(type(getattr(model, "base_model", None)), "tuner_layer_cls"):
        survey.tuner_level = PREFIX
        for slots in (survey.auxiliary, survey.duplicates, survey.base):
            renamed = {survey.file_name(name): slot for name, slot in slots.items()}
            slots.clear()
            slots.update(renamed)
    if any(COMPILED_LEVEL in name for name in survey.base):  # the base, or a part of it, is what torch.compile returned
        for named in (survey.layers, survey.auxiliary, survey.duplicates, survey.base, survey.tuner_layers):
            plain: Any = {name.replace(COMPILED_LEVEL, ""): value for name, value in named.items()}
            named.clear()
            named.update(plain)
    return survey


def bias_names(survey: Survey, bias: str) -> dict[str, Slot]:
    """The biases of the base that `config.bias` makes part of the adapter, by their names in a file.

    "all" includes those of modules trained whole under the wrapper's own names, as PEFT writes them.
    """
    if bias == "none":
        return {}
    candidates = {**survey.base, **(survey.duplicates if bias == "all" else {})}
    trained = {join(name, "base_layer.bias") for name in survey.tuner_layers}
    biases = {name: slot for name, slot in candidates.items() if slot.attribute == "bias"}
    return biases if bias == "all" else {name: slot for name, slot in biases.items() if name in trained}


def embedding_layers(model: Any) -> list[nn.Module] | None:
    """Input and output embeddings of a transformers model; None for other models."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    layers = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layers.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):  # some vision models have none
            continue
    return [layer for layer in layers if layer is not None]


def embedding_names(survey: Survey, layer: nn.Module) -> dict[str, Slot]:
    """The base weights of an embedding by their names in a file; of one trained whole, PEFT's duplicates too."""
    inside = {id(module) for module in layer.modules()}
    names = {name: slot for name, slot in survey.base.items() if id(slot.owner) in inside}
    names.update({name: slot for name, slot in survey.duplicates.items() if id(slot.owner) in inside})
    return names


def missing_prefix(survey: Survey, names: Mapping[str, Any]) -> str:
    """ "base_model.model." if the file's names have it and the model, which is no PeftModel, has not; else ""."""
    if survey.encoder is not None or any(key.startswith(PREFIX) for key in (*survey.base, *survey.tuner_layers)):
        return ""
    return PREFIX if any(name.startswith(PREFIX) for name in names) else ""


def move_to_base_layers(survey: Survey, adapter_name: str) -> None:
    """Bring weights that took the place of meta tensors to the device of the layers that they adapt."""
    for layer in survey.tuner_layers.values():
        layer._move_adapter_to_device_of_base_layer(adapter_name)  # type: ignore[operator]


def warn_mismatched(model: Any, mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> None:
    """Say what `ignore_mismatched_sizes` left out."""
    if mismatched:
        lines = [
            f"- {key}: found shape {torch.Size(found)} in the checkpoint and {torch.Size(expected)} in the model "
            "instantiated"
            for key, found, expected in mismatched
        ]
        warnings.warn(
            f"Some weights of {type(model).__name__} were not initialized from the model checkpoint and are being "
            "ignored because you passed `ignore_mismatched_sizes=True`: " + "\n".join(lines) + ".",
            stacklevel=3,
        )
