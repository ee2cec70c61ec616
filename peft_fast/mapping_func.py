"""`get_peft_model`: from a model and a configuration to a PeftModel."""

from __future__ import annotations

import warnings

from torch import nn

from .auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from .checkpoint import check_adapter_name
from .config import PeftConfig
from .mixed_model import PeftMixedModel
from .peft_model import PeftModel
from .peft_model.base import warn_if_in_prefix
from .peft_model.status import adapter_layers
from .tuners.tuners_utils import BaseTunerLayer
from .utils.error import UnknownTaskError

__all__ = ["get_peft_model"]


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a new adapter on a model, which is changed in place.

    Args:
        peft_config: its base_model_name_or_path becomes the model's, with a warning if it was another one.
        adapter_name: see `check_adapter_name`.
        mixed: adapters of different methods in one model; not supported yet.
        autocast_adapter_dtype: keep adapters of fp16, bf16 and fp8 bases in fp32, for stable training.
        revision: of the base model, noted in the configuration.
        low_cpu_mem_usage: create the adapter on the meta device; only if weights are loaded into it.
    Returns: the class that `peft_config.task_type` says, PeftModel without one.
    Raises: as PeftModel; ValueError for `mixed`, and (a KeyError too, as in PEFT) for prompt learning without a task.
    """
    check_adapter_name(adapter_name)
    if mixed:
        PeftMixedModel(model, peft_config, adapter_name=adapter_name)  # raises
    old_name, new_name = peft_config.base_model_name_or_path, model.__dict__.get("name_or_path") or None
    peft_config.base_model_name_or_path = new_name
    if any(isinstance(layer, BaseTunerLayer) for _, layer in adapter_layers(model)):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=2,
        )
    if old_name is not None and old_name != new_name:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old_name}' to '{new_name}'. "
            "Please ensure that the correct base model is loaded when loading this checkpoint.",
            stacklevel=2,
        )
    if revision is not None:
        if peft_config.revision is not None and peft_config.revision != revision:
            warnings.warn(
                f"peft config has already set base model revision to {peft_config.revision}, overwriting with revision "
                f"{revision}",
                stacklevel=2,
            )
        peft_config.revision = revision
    warn_if_in_prefix(adapter_name, peft_config)
    task = getattr(peft_config.task_type, "value", peft_config.task_type)
    if peft_config.is_prompt_learning and task not in MODEL_TYPE_TO_PEFT_MODEL_MAPPING:
        raise UnknownTaskError(
            f"{type(peft_config).__name__} needs a task_type, it is {task}: set it to one of "
            f"{', '.join(sorted(MODEL_TYPE_TO_PEFT_MODEL_MAPPING))}"
        )
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(task), PeftModel)(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
