"""Targets that cannot just be replaced: torch reads past them, they hang at several places, or are never called."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..utils.other import Site, walk
from ._base_layer import BaseTunerLayer

_BEFORE = "_use_nested_tensor_before"


def check_targets_run(config: Any, model: nn.Module, targets: Sequence[Site]) -> None:
    """Raises: ValueError for a target that the model computes with and never calls: an adapter would have no effect."""
    for site in targets:
        if isinstance(site.module, NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"{site.name!r} cannot be adapted: torch.nn.MultiheadAttention reads the weight of its out_proj and "
                "never calls it, so that an adapter would have no effect until it is merged. Leave it out of "
                "target_modules (exclude_modules)"
            )
    check_embeddings_run(config, model, targets)


# What the linear layers of an expert were called, before transformers made one parameter of all experts' weights.
_OF_EXPERTS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w2", "w3")


def refuse_experts(sites: Sequence[Site], means: Callable[[str], object], wanted: Iterable[str] = ()) -> None:
    """Raises: ValueError where target_modules means layers of experts, whose weights are parameters and no layers here.

    Args:
        sites: of the model.    means: whether the config means a module of that name.
        wanted: names of modules that a file has weights for.
    """
    for site in sites:
        fused = [name for name, parameter in site.module._parameters.items() if _is_fused(name, parameter)]
        if not fused:
            continue
        names = [name for name in _OF_EXPERTS if means(f"{site.name}.0.{name}") or means(f"{site.name}.{name}")]
        names += [name for name in wanted if name.startswith(f"{site.name}.")][:1]
        if names:
            raise ValueError(
                f"{', '.join(repr(name) for name in names)} means layers of the experts {site.name!r}, whose weights "
                f"are parameters ({', '.join(fused)}) and no layers: LoRA on experts is not supported by peft_fast yet."
                " Name other layers only (q_proj, k_proj, v_proj, o_proj), or leave the experts out with "
                "exclude_modules=r'.*\\.experts\\..*'"
            )


def _is_fused(name: str, parameter: Any) -> bool:
    return name in _OF_EXPERTS and parameter is not None and parameter.ndim == 3


def check_embeddings_run(config: Any, model: Any, targets: Sequence[Site]) -> None:
    """The `shared` embeddings of an encoder-decoder model: encoder and decoder have embeddings of their own with its
    weight, and only those are called.

    Raises: ValueError where the adapter is to be trained; a file that was trained so does no harm, and gets a warning.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    names = {site.name for site in targets} | set(getattr(config, "modules_to_save", None) or ())
    sites = [site for site in walk(model, "base") if isinstance(site.module, nn.Embedding)]
    by_weight: dict[int, list[Site]] = {}
    for site in sites:
        by_weight.setdefault(id(site.module.weight), []).append(site)
    for group in by_weight.values():
        unused, *others = sorted(group, key=lambda site: site.name.count("."))
        top, called = unused.name, [site.name for site in others if "." in site.name]
        wanted = top in names or top.rpartition(".")[2] in names
        if not called or not wanted or _base(unused.module) is not _base(model.get_input_embeddings()):
            continue
        text = (
            f"{top!r} is never called: {', '.join(called)} have its weight and are called in its place, so training an "
            f"adapter of {top!r} has no effect. Name {called[0].rpartition('.')[2]!r} instead"
        )
        if not config.inference_mode:
            raise ValueError(text)
        warnings.warn(text, stacklevel=5)


def _base(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def hang_everywhere(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module at every place of the module that it replaces: a model may have one module at several."""
    for site in walk(model):
        if isinstance(site.module, BaseTunerLayer) or hasattr(type(site.module), "adapter_layer_names"):
            continue
        for key, child in site.module._modules.items():
            if child is not None and child in replaced:
                setattr(site.module, key, replaced[child])


def keep_off_the_fast_path(model: nn.Module, adapted: Iterable[nn.Module]) -> None:
    """nn.TransformerEncoderLayer in evaluation reads the weights of its linear layers past them, unless one of them has
    a hook; its nn.TransformerEncoder hands it padded batches in a form that only that path can take."""
    layers = set(adapted)
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    found = False
    for encoder in encoders:
        for child in encoder.children():
            if child in layers:
                child.register_forward_pre_hook(_nothing)
                found = True
    if found:
        _allow_nested_tensors(model, False)


def give_back_the_fast_path(model: nn.Module) -> None:
    """When the adapters are gone."""
    _allow_nested_tensors(model, True)


def _allow_nested_tensors(model: nn.Module, allow: bool) -> None:
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            if allow:
                module.use_nested_tensor = module.__dict__.pop(_BEFORE, module.use_nested_tensor)
            else:
                module.__dict__.setdefault(_BEFORE, module.use_nested_tensor)
                module.use_nested_tensor = False


def note_shared_weights(model: nn.Module, layers: Iterable[Any]) -> None:
    """Tell LoRA layers whether another module has their base's weight too."""
    owners = Counter(
        id(parameter)
        for site in walk(model, "base")
        for parameter in site.module._parameters.values()
        if parameter is not None
    )
    for layer in layers:
        weight = layer.get_base_layer()._parameters.get("weight")
        if not layer.merged:
            layer.shares_weight = weight is not None and owners[id(weight)] > 1


def _nothing(module: nn.Module, args: Any) -> None:
    return None
