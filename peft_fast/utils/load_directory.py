"""Loading an adapter directory that nobody vouches for into a model: the strict way."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from ..checkpoint import (
    CheckedNames,
    TensorInfo,
    WeightsFile,
    check_config,
    check_finite,
    check_prompt_shapes,
    check_ranks,
    check_tensors,
    open_weights,
    tensor_info,
)
from ..checkpoint.names import plain_name
from ..checkpoint.validate import listed
from ..tuners._adapters import taken_out
from ..tuners.lora.init import changes_base
from ._survey import (
    Slot,
    Survey,
    bias_names,
    embedding_layers,
    embedding_names,
    join,
    missing_prefix,
    move_to_base_layers,
    survey_adapter,
    warn_mismatched,
)
from .transformers_weight_conversion import renaming_of


def check_adapter_directory(
    directory: str | os.PathLike[str],
    config: Any,
    *,
    adapter_name: str | None = None,
    ignore_mismatched_sizes: bool = False,
) -> WeightsFile:
    """Check a local adapter directory against its config BEFORE anything is injected; reads the header only.

    Call it with the config that will be injected, then inject, then `load_adapter_weights`. After it, injecting cannot
    allocate more than the file's own ranks and sizes justify (`r=10**9` is refused here). A prompt learning config has
    its sizes from the base model (`_prepare_prompt_learning_config`).

    Returns: the opened weights. Raises: ValueError for a malformed file or numbers in the config that are not finite;
    RuntimeError ("size mismatch") for ranks and prompts of sizes that the config does not allow.
    """
    weights = open_weights(directory, adapter_name=adapter_name)
    weights.map_names(plain_name, "without the levels of torch.compile and of an adapter's name it")
    check_config(config, weights.where)
    check_ranks(weights, config, ignore_mismatched_sizes=ignore_mismatched_sizes)
    check_prompt_shapes(weights, config)
    return weights


def load_adapter_weights(
    model: Any,
    directory: str | os.PathLike[str],
    adapter_name: str,
    config: Any = None,
    *,
    strict: bool = False,
    ignore_mismatched_sizes: bool = False,
    device: str | torch.device | None = None,
    low_cpu_mem_usage: bool = False,
    key_mapping: Mapping[str, str] | None = None,
) -> _IncompatibleKeys:
    """Load the weights of a local directory into an adapter that was injected; PEFT's loading made strict.

    Everything is checked before the first weight is written: on an error the model's weights are as they were, and
    the caller removes the adapter again. Only the adapter's own weights are written, and the base weights that PEFT's
    files may bring: biases if `config.bias` is not "none", and input and output embeddings.

    Args:
        directory: what `find_adapter` returned. config: the adapter's, None takes `model.peft_config[adapter_name]`.
        strict: raise for missing weights instead of warning.
        device: where the data is read to before it is copied; tensors of a meta adapter stay there until they are
            moved to their base layers. None: CPU.
        low_cpu_mem_usage: the adapter was injected on the meta device.
        key_mapping: pattern -> replacement for the names in the file, as in `load_peft_weights`.
    Returns: (missing_keys, []): the adapter's keys that the file lacks; PEFT's warning about them has been given.
    Raises: RuntimeError ("size mismatch") for shapes; ValueError for everything else that is wrong with the files, and
        for a prompt learning adapter with a network that is being trained, for which there is no way back.
    """
    config = model.peft_config[adapter_name] if config is None else config
    weights = check_adapter_directory(
        directory, config, adapter_name=adapter_name, ignore_mismatched_sizes=ignore_mismatched_sizes
    )
    if narrow := [name for name, info in weights.tensors.items() if info.dtype.lower().startswith(("f8", "float8"))]:
        warnings.warn(
            f"{weights.where}: {len(narrow)} tensors have 8 bits ({listed(narrow)}): they are read as float32, with "
            "the few digits that they have. Save the adapter in bfloat16 or float32 to keep what was trained",
            stacklevel=4,
        )
    weights.rename(key_mapping)
    survey = survey_adapter(model, adapter_name)
    weights.map_names(renaming_of(model, survey, weights.tensors), "transformers' rules for this architecture")
    if survey.encoder is not None and survey.encoder.is_reparameterized:
        raise ValueError(f"{weights.where}: {survey.encoder.no_way_back()}")
    prefix = missing_prefix(survey, weights.tensors)
    own = {prefix + name: slot for name, slot in survey.own.items()}
    duplicates = _duplicates(weights, prefix, survey)
    optional = {prefix + name: slot for name, slot in _optional_names(model, config, survey).items()} | duplicates
    base = {prefix + survey.file_name(name) for slot in survey.base.values() for name in (slot.key, slot.bare)}
    checked = check_tensors(
        weights,
        _infos(own),
        _infos(optional),
        is_base_weight=base.__contains__,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
    )
    missing = _report_missing(checked, own, weights.where, adapter_name, strict)
    # PEFT writes some tensors twice: the second name is checked, its data is not needed
    wanted = [name for name in checked.accepted if name not in duplicates]
    tensors = weights.load("cpu" if device is None else device, wanted)
    check_finite(tensors, weights.where)
    of_base = {name: tensor for name, tensor in tensors.items() if name not in own}
    _check_isolation(model, adapter_name, weights.where, of_base, optional)
    with taken_out(model, adapter_name):
        for name, tensor in tensors.items():
            (own.get(name) or optional[name]).write(tensor)
    if low_cpu_mem_usage:
        move_to_base_layers(survey, adapter_name)
    warn_mismatched(model, checked.mismatched)
    return _IncompatibleKeys(missing, [])


def _check_isolation(
    model: Any, adapter_name: str, where: str, of_base: Mapping[str, Tensor], slots: Mapping[str, Slot]
) -> None:
    """Refuse a file that changes weights of a base which other adapters use too: they were trained with what is there.

    PEFT writes the embeddings into the file when the vocabulary has grown, and biases with `bias`; as the only adapter
    of a base it may bring them. Raises: ValueError.
    """
    changed = [name for name, tensor in of_base.items() if _differs(slots[name], tensor)]
    others = sorted(set(model.peft_config) - {adapter_name})
    if changed and others:
        raise ValueError(
            f"{where}: {listed(changed)} differs from the base model's weight, which other adapters use as well "
            f"({listed(others)}): loading it would change their outputs, and those of the base. Load this adapter onto "
            "a base model of its own"
        )
    brought = model.__dict__.setdefault("_brought_weights", {})  # adapter -> base weights that its file has changed
    for name in [name for name in brought if name not in model.peft_config]:
        del brought[name]
    reasons = {other: f"its file brought {listed(names)}" for other, names in brought.items()}
    for other in others:
        method = getattr(model.peft_config[other], "init_lora_weights", True)
        if changes_base(method):
            reasons[other] = f"init_lora_weights={method!r} took its values out of the base weights"
    for other, reason in reasons.items():
        if other != adapter_name:
            warnings.warn(
                f"Adapter {adapter_name!r} runs on a base model that adapter {other!r} has changed: {reason}. Unless "
                f"{adapter_name!r} was trained so, load it onto a base model of its own.",
                stacklevel=4,
            )
    if changed:
        brought[adapter_name] = changed


def _differs(slot: Slot, tensor: Tensor) -> bool:
    old = slot.tensor
    if old.is_meta or hasattr(old, "device_mesh"):
        return True
    return not torch.equal(old.detach(), tensor.to(old.device, old.dtype))


def _infos(slots: Mapping[str, Slot]) -> dict[str, TensorInfo]:
    return {name: tensor_info(slot.tensor) for name, slot in slots.items()}


def _optional_names(model: Any, config: Any, survey: Survey) -> dict[str, Slot]:
    """Base weights that a file may bring, under every name that PEFT gives them.

    The name depends on which adapters the layer carried when the file was written: `x.bias` or `x.base_layer.bias`.
    """
    slots = bias_names(survey, getattr(config, "bias", "none"))
    for layer in embedding_layers(model) or []:
        slots.update(embedding_names(survey, layer))
    names = dict(slots)
    for slot in slots.values():
        if slot.bare:
            parent, _, attribute = slot.bare.rpartition(".")
            names.setdefault(survey.file_name(slot.bare), slot)
            names.setdefault(survey.file_name(join(parent, "base_layer", attribute)), slot)
    return names


def _duplicates(weights: WeightsFile, prefix: str, survey: Survey) -> dict[str, Slot]:
    """Second names of modules trained whole, `x.modules_to_save.weight` beside `x.weight`, that PEFT writes with
    bias="all" or embeddings (for deep modules with the name of the adapter that was saved)."""
    found = {}
    for name in weights.tensors:
        head, level, rest = name.removeprefix(prefix).partition(".modules_to_save.")
        for path in (rest, rest.partition(".")[2]):
            if level and join(head, path) in survey.auxiliary:
                found[name] = survey.auxiliary[join(head, path)]
    return found


def _report_missing(
    checked: CheckedNames, own: Mapping[str, Slot], where: str, adapter_name: str, strict: bool
) -> list[str]:
    """Warn about (strict: refuse) what the file lacks; what has no data at all without it is refused in any case."""
    missing = [own[name].key for name in checked.missing]
    lacking = [*checked.missing, *(name for name, _, _ in checked.mismatched)]
    empty = [own[name].key for name in lacking if name in own and own[name].tensor.is_meta]
    message = f"Found missing adapter keys while loading the checkpoint: [{listed(missing)}]."
    second = [key for key, slot in ((slot.key, slot) for slot in own.values()) if ".lora_B." in key]
    if second and set(second) <= set(missing):
        message += " No lora_B is in the file: the adapter changes nothing until it is trained."
    if empty:
        raise ValueError(
            f"{where}: {message} With low_cpu_mem_usage=True there is nothing to start from for {listed(empty)}; load "
            "with low_cpu_mem_usage=False."
        )
    if missing and strict:
        raise ValueError(f"{where}: {message} strict=True needs all of them.")
    if missing:
        if adapter_name in "lora_":
            message = f"Adapter name {adapter_name!r} is part of the prefix 'lora_', choose another one. {message}"
        warnings.warn(message, stacklevel=3)
    return missing
