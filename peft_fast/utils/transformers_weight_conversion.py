"""How the names in an adapter's file become those in a model with injected adapters, for transformers' loader.

`model.load_adapter` of transformers asks for it. Its rules that merge the experts of a mixture into one parameter are
left out: no adapter of this library targets such parameters.
"""

from collections.abc import Sequence
from typing import Any


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
