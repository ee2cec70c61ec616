"""The state dict of one adapter: taken from a model, written into one, read from a file. PEFT's functions.

`load_directory` has the strict way to load a directory into a model.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..checkpoint import find_adapter, open_weights
from ..checkpoint.names import plain_name
from ..tuners._adapters import taken_out
from ._gather import gathered, roll_call
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
from .constants import EMBEDDING_LAYER_NAMES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from .load_directory import (
    check_adapter_directory as check_adapter_directory,
    load_adapter_weights as load_adapter_weights,
)
from .transformers_weight_conversion import renaming_of
from .warning import PeftWarning


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Any]:
    """The tensors of one adapter under their names in a file: no base weights, no adapter name.

    Args:
        model: a PeftModel, or a model with injected adapters (`peft_config` by adapter name).
        state_dict: the model's, where it has to be gathered first (FSDP, ZeRO-3); None takes `model.state_dict()`.
        unwrap_compiled: `model` is what `torch.compile` returned.
        save_embedding_layers: True adds the base weights of input and output embeddings; "auto" does so when
            "embed_tokens" or "lm_head" is targeted, or the vocabulary differs from that of the base model's config,
            which is looked for on this machine only.
    Returns: in PEFT's order. Biases are added as `config.bias` says; tensors may share memory with the model.
    Raises: KeyError for an unknown adapter; RuntimeError if a sharded tensor (DTensor) cannot be gathered: call this on
        all ranks.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    config = model.peft_config[adapter_name]
    given = state_dict is not None
    source: Mapping[str, Any] = model.state_dict() if state_dict is None else state_dict
    survey = survey_adapter(model, adapter_name)

    # name in the file -> key in the source; the first to claim a name keeps it
    names: dict[str, str] = {}
    own = {slot.key: name for name, slot in survey.layers.items()}
    names.update({own[key]: key for key in source if key in own})
    position = {key: index for index, key in enumerate(source)}
    biases = bias_names(survey, getattr(config, "bias", "none"))
    biases = dict(sorted(biases.items(), key=lambda entry: position.get(entry[1].key, 0)))
    for entries in (biases, survey.auxiliary, _embeddings_to_save(model, config, survey, save_embedding_layers)):
        for name, slot in entries.items():
            names.setdefault(name, slot.key)
    chosen = {name: source[key] for name, key in names.items() if key in source}
    of_encoder = _encoder_tensors(survey, source)
    roll_call([*chosen.values(), *of_encoder.values()], adapter_name)
    result = {name: gathered(name, value, adapter_name) for name, value in chosen.items()}
    if survey.encoder is not None:
        weights = {name: gathered(name, value, adapter_name) for name, value in of_encoder.items()}
        result.update(_prompt_tensors(survey.encoder, weights))
    if not given:
        _warn_if_partitioned(result, adapter_name)
    return result


def _encoder_tensors(survey: Survey, source: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of the adapter's prompt encoder under their names in it; empty if it has none."""
    own = {} if survey.encoder is None else survey.encoder.state_dict()
    return {name: source.get(join(survey.encoder_name, name), tensor) for name, tensor in own.items()}


def _prompt_tensors(encoder: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """What an encoder gives to a file: its tensors, with what its network makes of the embedding, if it has one."""
    tensors = {name: weights[key] for name, key in encoder.file_tensors().items()}
    if encoder.is_reparameterized:
        tensors["prompt_embeddings"] = encoder.prompt_embeddings(weights).cpu()
    return tensors


def _embeddings_to_save(model: Any, config: Any, survey: Survey, choice: bool | Literal["auto"]) -> dict[str, Slot]:
    """What `save_embedding_layers` adds to the adapter's own tensors."""
    targeted = _embedding_is_targeted(config, survey)
    if choice == "auto":
        tokens = getattr(config, "trainable_token_indices", None) is not None
        if targeted and not tokens:
            warnings.warn(
                "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=3
            )
            choice = True
        else:
            choice = _vocabulary_changed(model, config)
    if not choice:
        return {}
    layers = embedding_layers(model)
    if layers is None:
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.", stacklevel=3
        )
        return {}
    names: dict[str, Slot] = {}
    for layer in layers:
        # where the adapter targets an embedding, one that it does not target is unchanged
        if not targeted or isinstance(getattr(layer, "base_layer", None), (nn.Linear, nn.Embedding)):
            names.update(embedding_names(survey, layer))
    return names


def _embedding_is_targeted(config: Any, survey: Survey) -> bool:
    """Whether target_modules names one of EMBEDDING_LAYER_NAMES; for a pattern, whether one has the adapter."""
    target_modules = getattr(config, "target_modules", None) or []
    if target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return False
    if isinstance(target_modules, str):
        return any(part in EMBEDDING_LAYER_NAMES for name in survey.layers for part in name.split("."))
    return any(name in target_modules for name in EMBEDDING_LAYER_NAMES)


def _vocabulary_changed(model: Any, config: Any) -> bool:
    """Whether the vocabulary has another size than the base model's config says; asks no network."""
    base = getattr(config, "base_model_name_or_path", None)
    model_config = getattr(model, "config", None)
    size = getattr(model_config, "vocab_size", None)
    if not base:
        return False
    directory = _local_config_directory(base)
    if directory is None:
        warnings.warn(
            f"Could not find a config file in {base} - will assume that the vocabulary was not modified.", stacklevel=4
        )
        return False
    if model_config is None or not size or size == type(model_config).from_pretrained(directory).vocab_size:
        return False
    warnings.warn(
        "Setting `save_embedding_layers` to `True` as the embedding layer has been resized during finetuning.",
        stacklevel=4,
    )
    return True


def _local_config_directory(base: str) -> str | None:
    """The folder that has the base model's config.json: a local model, or the Hub's cache."""
    if os.path.exists(os.path.join(base, "config.json")):
        return base
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(base, "config.json")
    except HFValidationError:  # a path
        return None
    return os.path.dirname(cached) if isinstance(cached, str) else None


def _warn_if_partitioned(tensors: Mapping[str, Any], adapter_name: str) -> None:
    """Warn about LoRA matrices that are empty or flat: shards that were not gathered, a file that nobody can load."""
    bad = [
        f"{name}:{tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and re.search(r"\.lora_[AB]\b", name) and (tensor.ndim < 2 or not tensor.numel())
    ]
    if bad:
        warnings.warn(
            f"Adapter {adapter_name!r}: {len(bad)} LoRA tensor(s) have invalid shape: {', '.join(bad[:3])}"
            f"{f' and {len(bad) - 3} more' if len(bad) > 3 else ''}. The shards of ZeRO-3 or FSDP were not gathered: "
            "gather them (deepspeed.zero.GatheredParameters, FSDP.summon_full_params) and save again.",
            PeftWarning,
            stacklevel=3,
        )


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> _IncompatibleKeys:
    """Write tensors with the names of a file into an adapter of the model.

    PEFT's contract: every key of the model may be written, and what is missing or unexpected is returned, not refused.
    `load_adapter_weights` is the strict way, for directories.

    Args:
        ignore_mismatched_sizes: skip tensors of another shape with a warning instead of raising.
        low_cpu_mem_usage: the adapter is on the meta device: the tensors take its place.
    Returns: (missing_keys, unexpected_keys); missing are all keys of the model that were not given, base included.
    Raises: KeyError for an unknown adapter, and for prompt learning without "prompt_embeddings"; RuntimeError ("size
        mismatch") for another shape; ValueError for a prompt learning adapter with a network that is being trained.
    """
    if adapter_name not in model.peft_config:
        raise KeyError(adapter_name)
    survey = survey_adapter(model, adapter_name)
    if survey.encoder is not None:
        if survey.encoder.is_reparameterized:
            raise ValueError(f"adapter {adapter_name!r}: {survey.encoder.no_way_back()}")
        if "prompt_embeddings" not in peft_model_state_dict:
            raise KeyError(f"adapter {adapter_name!r}: the state dict has no 'prompt_embeddings'")
    slots = {name: slot for name, slot in survey.own.items()}
    peft_model_state_dict = _named_as_here(model, survey, peft_model_state_dict)
    prefix = missing_prefix(survey, peft_model_state_dict)
    state_dict = {}
    for name, value in peft_model_state_dict.items():
        name = name.removeprefix(prefix)
        state_dict[slots[name].key if name in slots else name] = value
    mismatched = []
    if ignore_mismatched_sizes:
        slots = {slot.key: slot for slot in (*slots.values(), *survey.base.values())}
        for key in [k for k in state_dict if k in slots and slots[k].tensor.shape != state_dict[k].shape]:
            mismatched.append((key, tuple(state_dict.pop(key).shape), tuple(slots[key].tensor.shape)))
    by_key = {slot.key: slot for slot in survey.own.values()}
    for key, value in state_dict.items():
        if key in by_key:
            state_dict[key] = by_key[key].sharded(value)
    with taken_out(model, adapter_name):
        result: _IncompatibleKeys = model.load_state_dict(state_dict, strict=False, assign=low_cpu_mem_usage)
    if low_cpu_mem_usage:
        move_to_base_layers(survey, adapter_name)
    warn_mismatched(model, mismatched)
    return result


def _named_as_here(model: Any, survey: Survey, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that the model has for them: without torch.compile's level and an adapter's name, and
    as transformers renamed the architecture's layers."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain.setdefault(name if name in survey.own or name in survey.base else plain_name(name), tensor)
    new_name = renaming_of(model, survey, plain)
    return {new_name(name): tensor for name, tensor in plain.items()}


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """The tensors in an adapter's file, from a local directory or the Hugging Face Hub, as they are.

    Args:
        device: None takes the accelerator if there is one, else the CPU.
        key_mapping: pattern -> replacement, for names without "base_model.model."; the first that matches counts.
        hf_hub_download_kwargs: subfolder, revision, token, cache_dir, ...
    Raises: ValueError if there is no such directory or repository, it has no weights, or the file is malformed.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = "cpu" if accelerator is None else accelerator
    subfolder = hf_hub_download_kwargs.pop("subfolder", None)
    hf_hub_download_kwargs.pop("use_auth_token", None)
    directory = find_adapter(model_id, subfolder, config_needed=False, **hf_hub_download_kwargs)
    weights = open_weights(directory)
    weights.rename(key_mapping)
    return weights.load(device)
