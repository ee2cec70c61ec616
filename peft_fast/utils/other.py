"""Helpers on modules that the tuners, the models and the files share, under PEFT's names."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from ._fsdp import fsdp_auto_wrap_policy
from ._prompt_config import _prepare_prompt_learning_config
from ._wrappers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, _set_layer_requires_grad, as_names

__all__ = [
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "Site",
    "_freeze_adapter",
    "_get_batch_size",
    "_get_input_embeddings_name",
    "_get_module_names_tied_with_embedding",
    "_get_submodules",
    "_get_submodules_with_grandparent",
    "_is_valid_match",
    "_prepare_prompt_learning_config",
    "_set_adapter",
    "_set_layer_requires_grad",
    "_set_trainable",
    "adapter_modules",
    "as_names",
    "cast_mixed_precision_params",
    "fsdp_auto_wrap_policy",
    "get_quantization_config",
    "id_tensor_storage",
    "infer_device",
    "prepare_model_for_kbit_training",
    "set_additional_trainable_modules",
    "set_wrappers",
    "shift_tokens_right",
    "transpose",
    "walk",
]


class Site(NamedTuple):
    """A module and the place it hangs at; the root has neither parent nor child name."""

    name: str
    module: nn.Module
    parent: nn.Module | None
    child_name: str


def walk(
    model: nn.Module, through: Literal["nothing", "base", "all"] = "all", remove_duplicate: bool = True
) -> Iterator[Site]:
    """The modules of a model, parents first, without the insides of its adapters: the time does not grow with their
    number.

    Args:
        model: any module.
        through: what is visited inside an adapter layer or a `modules_to_save` wrapper, both of which are always
            visited themselves: "nothing"; "base", the module of the base model in them; "all", the trained copies of
            wrappers too.
        remove_duplicate: visit a module that hangs at several places once, as `nn.Module.named_modules`.
    Yields: `Site`s, in the order of `named_modules`.
    """
    stack = [Site("", model, None, "")]
    seen: set[nn.Module] = set()
    while stack:
        site = stack.pop()
        module = site.module
        if remove_duplicate:
            if module in seen:
                continue
            seen.add(module)
        yield site
        # looked up after the yield: a caller may have replaced children
        children = module._modules
        if hasattr(type(module), "adapter_layer_names"):
            if through == "nothing":
                continue
            if through == "base" or "base_layer" in children:
                children = {key: children[key] for key in ("base_layer", "original_module") if key in children}
        prefix = site.name + "." if site.name else ""
        for key, child in reversed(children.items()):
            if child is not None:
                stack.append(Site(prefix + key, child, module, key))


def adapter_modules(model: nn.Module) -> list[Any]:
    """The adapter layers and wrappers of a model in the order of `walk`, in a third of its time."""
    found = []
    stack = [model]
    seen: set[nn.Module] = set()
    while stack:
        module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        children = module._modules
        if hasattr(type(module), "adapter_layer_names"):
            found.append(module)
            if "base_layer" in children:
                stack.append(children["base_layer"])  # type: ignore[arg-type]
                continue
        stack.extend([child for child in children.values() if child is not None][::-1])
    return found


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, the module's name in its parent) for a dotted name."""
    parent_name, _, target_name = key.rpartition(".")
    return model.get_submodule(parent_name), model.get_submodule(key), target_name


def _get_submodules_with_grandparent(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, nn.Module, str]:
    """(parent, grandparent, module, the module's name in its parent) for a dotted name; the root is its own parent."""
    parent, target, target_name = _get_submodules(model, key)
    return parent, model.get_submodule(".".join(key.split(".")[:-2])), target, target_name


def _get_input_embeddings_name(model: Any, default: str | None = None) -> str | None:
    """Dotted name of the input embeddings; `default` where the model does not tell or they are not found."""
    if not hasattr(model, "get_input_embeddings"):
        return default
    embeddings = model.get_input_embeddings()
    return next((name for name, module in model.named_modules() if module is embeddings), default)


def _get_module_names_tied_with_embedding(model: Any) -> list[str]:
    """Names (relative to the base model) of the modules that share their weight with the input embeddings, sorted.

    Empty where `config.tie_word_embeddings` is False or the model declares no `_tied_weights_keys`.
    Raises: ValueError if the model declares a mapping of tied weights but cannot tell its input embeddings.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if hasattr(model, "tuner_layer_cls"):
        model = model.model
    declared = getattr(model, "_tied_weights_keys", None)
    if not declared or getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False:
        return []
    if not isinstance(declared, Mapping):  # a plain list of parameter names: models that transformers does not manage
        return sorted({name.rpartition(".")[0] for name in declared})
    if not hasattr(model, "get_input_embeddings"):
        raise ValueError(
            f"{type(model).__name__} declares `_tied_weights_keys` as a mapping but has no `get_input_embeddings`, "
            "so which weights are tied to the embeddings cannot be told. Add that method."
        )
    embeddings = model.get_input_embeddings()
    shared, own = set(embeddings.parameters()), set(embeddings.modules())
    return sorted(
        site.name
        for site in walk(model, "base", remove_duplicate=False)
        if site.module not in own and not shared.isdisjoint(site.module.parameters(recurse=False))
    )


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freeze every parameter that has the adapter's name in its own name."""
    for name, parameter in model.named_parameters():
        if adapter_name in name.split("."):
            parameter.requires_grad = False


# what the task classes add to modules_to_save, whatever the base's head is called
_HEADS = {"classifier", "score", "qa_outputs"}


def nearest(name: str, names: Iterable[str]) -> str:
    """What a message says of a name that matches none of the modules called ``names``: those that are most like it."""
    ends = {ending: None for known in names for ending in (known, known.rpartition(".")[2])}
    found = get_close_matches(name, ends, 2) or get_close_matches(name.rpartition(".")[2], ends, 2)
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


def _warn_missing_modules(names: Iterable[str], model: nn.Module) -> None:
    """Warn of modules_to_save that are not there; of a task's usual heads a model has one."""
    missing = sorted(set(names) - _HEADS)
    if missing:
        known = [site.name for site in walk(model, "base")]
        shown = ", ".join(f"{name!r}{nearest(name, known)}" for name in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        warnings.warn(
            f"modules_to_save: no module of the model is called {shown}{more}; nothing is trained whole for that.",
            stacklevel=6,
        )


def _set_trainable(
    model: nn.Module,
    adapter_name: str,
    module_names: Iterable[str] | None,
    inference_mode: bool,
    strict_module_check: bool = False,
    wrapper_cls: type[AuxiliaryTrainingWrapper] | None = None,
    activate_adapter: bool = True,
    **wrapper_kwargs: Any,
) -> list[AuxiliaryTrainingWrapper] | None:
    """Wrap the modules whose name ends with one of `module_names`, so that the adapter trains them whole.

    Args:
        model: the base model, changed in place. A module that is wrapped already gets one more adapter.
        module_names: endings of module names.
        inference_mode: an activated copy is frozen.
        strict_module_check: it is an error if no module is found.
        wrapper_cls: `ModulesToSaveWrapper` unless told otherwise; `wrapper_kwargs` are its arguments.
        activate_adapter: the adapter becomes the active one of these modules; otherwise they stay as they are.
    Returns: the new wrappers; None without module names.
    Raises: ValueError if a name is the adapter's own, or (strict) if nothing is found; TypeError for a module that
        cannot be wrapped.
    """
    wrapper_cls = wrapper_cls or ModulesToSaveWrapper
    endings = tuple(module_names or ())
    if not endings:
        return None
    found, wrappers = set[str](), []
    for site in list(walk(model, "base", remove_duplicate=False)):
        if "base_layer" in site.module._modules and adapter_name.endswith(endings):
            raise ValueError(
                f"modules_to_save={sorted(endings)} targets the insides of the adapter layer {site.name!r}, whose "
                f"parts are called {adapter_name!r} after the adapter. Rename the adapter or the entry."
            )
        if site.parent is None or not site.name.endswith(endings):
            continue
        found.update(ending for ending in endings if site.name.endswith(ending))
        wrapper = site.module
        if isinstance(wrapper, wrapper_cls):
            wrapper.update(adapter_name, **wrapper_kwargs)
        else:
            wrapper = wrapper_cls(wrapper, adapter_name, **wrapper_kwargs)
            setattr(site.parent, site.child_name, wrapper)
            wrappers.append(wrapper)
            wrapper.set_adapter([])
        if activate_adapter:
            wrapper.set_adapter(adapter_name, inference_mode=inference_mode)
    if strict_module_check and not found:
        raise ValueError(
            f"Target modules {set(endings)} not found in the base model. Please check the target modules and try again."
        )
    _warn_missing_modules(set(endings) - found, model)
    return wrappers


def _set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Activate the adapter(s) in every wrapper that has one of them, and the original module in the others.

    Raises: ValueError if two of them train the same module; nothing has changed then.
    """
    wrappers = [module for module in adapter_modules(model) if isinstance(module, AuxiliaryTrainingWrapper)]
    set_wrappers(wrappers, adapter_name, inference_mode)


def set_wrappers(
    wrappers: list[AuxiliaryTrainingWrapper], adapter_name: str | list[str], inference_mode: bool = False
) -> None:
    """`_set_adapter` for the wrappers of a model."""
    chosen = [wrapper.check_set_adapter(adapter_name) for wrapper in wrappers]
    for wrapper, name in zip(wrappers, chosen, strict=True):
        wrapper.set_adapter([] if name is None else name, inference_mode=inference_mode)


def set_additional_trainable_modules(
    model: nn.Module, peft_config: Any, model_config: Any, adapter_name: str, activate_adapter: bool = True
) -> None:
    """Wrap what the config asks to train beside the adapter: `modules_to_save`.

    Raises: as `_set_trainable`; ValueError for `trainable_token_indices`.
    """
    if getattr(peft_config, "trainable_token_indices", None) is not None:
        raise ValueError("trainable_token_indices is not supported by peft_fast yet; leave it at None")
    _set_trainable(
        model,
        adapter_name,
        module_names=getattr(peft_config, "modules_to_save", None),
        inference_mode=peft_config.inference_mode,
        activate_adapter=activate_adapter,
    )


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """weight.T for a layer that stores (in, out), weight itself otherwise; a Parameter stays one."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether `target_key` is the dotted name `key` or its last components."""
    return key == target_key or key.endswith("." + target_key)


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """Rows of the batch. Raises: ValueError if both are None."""
    inputs = inputs_embeds if input_ids is None else input_ids
    if inputs is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return inputs.shape[0]


def infer_device() -> str:
    """The accelerator of this machine as torch calls it ("cuda", "xpu", "mps", ...), else "cpu"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> Tensor:
    """Decoder inputs made of labels (B, T): the start token, then all but the last; -100 becomes the padding token.

    Raises: ValueError if `pad_token_id` is None.
    """
    if pad_token_id is None:
        raise ValueError("shift_tokens_right: pad_token_id is None; give the model's config one")
    shifted = torch.cat([torch.full_like(input_ids[:, :1], decoder_start_token_id), input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen parameters to `dtype` and trainable ones to float32, in place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What identifies a tensor's storage (device, address, bytes): equal for two tensors that share all of it."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Make a quantized model ready for training adapters, in place; returns it. As PEFT's function.

    Everything is frozen. What is in 16 bits and not quantized (norms, embeddings, the head) becomes fp32, except in
    formats whose layers need it as it is. Then gradient checkpointing is switched on.

    Args:
        model: of transformers.
        use_gradient_checkpointing: for quantized models only.
        gradient_checkpointing_kwargs: of `gradient_checkpointing_enable`. Unless "use_reentrant" is False in it, the
            embeddings' output requires grad, without which such checkpoints have no gradient.
        auto_clear_cache: give the memory that the casts freed back to the GPU's driver.
    """
    method = getattr(model, "quantization_method", None)
    method = "hqq" if getattr(model, "hqq_quantized", False) else getattr(method, "value", method)
    keeps_dtypes = method in ("gptq", "aqlm", "eetq", "torchao", "hqq")
    model.requires_grad_(False)
    if not keeps_dtypes:
        for parameter in model.parameters():
            # packed 4-bit codes may be stored in a 16-bit type
            if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit":
                parameter.data = parameter.data.to(torch.float32)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    bits = any(getattr(model, f"is_loaded_in_{name}", False) for name in ("8bit", "4bit"))
    if use_gradient_checkpointing and (bits or keeps_dtypes):
        settings, transformers_model = gradient_checkpointing_kwargs or {}, cast(Any, model)
        if settings.get("use_reentrant", True):
            if hasattr(model, "enable_input_require_grads"):
                transformers_model.enable_input_require_grads()
            else:
                transformers_model.get_input_embeddings().register_forward_hook(_require_grad)
        transformers_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    return model


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """`model.config.quantization_config` if the model is quantized by `method`, else None."""
    if getattr(model, "quantization_method", None) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)
