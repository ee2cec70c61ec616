"""How the names in an adapter's file become those in a model with injected adapters, for transformers' loader.

`model.load_adapter` of transformers asks for it. Its rules that merge the experts of a mixture into one parameter are
left out: no adapter of this library targets such parameters.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ._survey import PREFIX

if TYPE_CHECKING:
    from ._survey import Survey


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """transformers' rules for an adapter's names: no prefix of files, with the adapter's name, then the model's own.

    Args:
        weight_conversions: `WeightRenaming`s and `WeightConverter`s of the base model; nothing is done without any.
        adapter_name: what the adapter is called in the model.
        peft_config: its configuration; LoRA's is the only kind that transformers can inject.
    Returns: `WeightRenaming`s, in the order in which they are applied.
    """
    from transformers.core_model_loading import WeightRenaming

    if not weight_conversions:
        return []
    return [
        WeightRenaming("base_model.model.model.", "model."),
        WeightRenaming("base_model.model.", ""),
        WeightRenaming(source_patterns=r"(lora_[^\.]*)", target_patterns=rf"\1.{adapter_name}"),
        *(rule for rule in weight_conversions if isinstance(rule, WeightRenaming)),
    ]


def renaming_of(model: Any, survey: "Survey", names: Iterable[str]) -> Callable[[str], str]:
    """How transformers' rules for the base's architecture rename what an adapter's file has, for the names that the
    model does not have: files from before transformers moved the layers of Gemma 3, LLaVA and others.

    A layer is renamed as its weight would be. Prompt learning has no such names.
    """
    known = {name.removeprefix(PREFIX) for name in (*survey.own, *survey.base)}
    strange = [name for name in names if name.removeprefix(PREFIX) not in known]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not strange or survey.encoder is not None or not hasattr(getattr(base, "config", None), "model_type"):
        return lambda name: name
    rules = _renamings(base)
    if not rules:
        return lambda name: name
    from transformers.core_model_loading import rename_source_key

    there = {f"{name}.weight": None for name, _ in base.named_modules() if name}
    new: dict[str, str] = {}
    for name in strange:
        prefix = PREFIX if name.startswith(PREFIX) else ""
        head, lora, tail = name.removeprefix(prefix).partition(".lora_")
        key, _ = rename_source_key(f"{head}.weight" if lora else head, rules, [], base.base_model_prefix, there)
        renamed = (key.removesuffix(".weight") if lora else key) + lora + tail
        if renamed in known:
            new[name] = prefix + renamed
    return lambda name: new.get(name, name)


def _renamings(base: Any) -> list[Any]:
    """transformers' rules that rename weights of a model; none for a version that has no such rules."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return []
    return [rule for rule in get_model_conversion_mapping(base) if isinstance(rule, WeightRenaming)]
