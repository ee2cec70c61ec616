"""PEFT's `utils`: types, state dicts, helpers. Names are imported on first use: modules below may import from here."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS: dict[str, tuple[str, ...]] = {
    "constants": (
        "CONFIG_NAME",
        "INCLUDE_LINEAR_LAYERS_SHORTHAND",
        "SAFETENSORS_WEIGHTS_NAME",
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        "WEIGHTS_NAME",
    ),
    "other": (
        "AuxiliaryTrainingWrapper",
        "ModulesToSaveWrapper",
        "_freeze_adapter",
        "_get_batch_size",
        "_get_submodules",
        "_prepare_prompt_learning_config",
        "_set_adapter",
        "_set_trainable",
        "cast_mixed_precision_params",
        "get_quantization_config",
        "id_tensor_storage",
        "infer_device",
        "prepare_model_for_kbit_training",
        "set_additional_trainable_modules",
        "shift_tokens_right",
        "transpose",
    ),
    "peft_types": ("PeftType", "TaskType"),
    "save_and_load": ("get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(name for name in _MODULE_OF if not name.startswith("_"))

if TYPE_CHECKING:  # "X as X": type checkers take it for a public name
    from .constants import (
        CONFIG_NAME as CONFIG_NAME,
        INCLUDE_LINEAR_LAYERS_SHORTHAND as INCLUDE_LINEAR_LAYERS_SHORTHAND,
        SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME,
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
        WEIGHTS_NAME as WEIGHTS_NAME,
    )
    from .other import (
        AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper,
        ModulesToSaveWrapper as ModulesToSaveWrapper,
        _freeze_adapter as _freeze_adapter,
        _get_batch_size as _get_batch_size,
        _get_submodules as _get_submodules,
        _prepare_prompt_learning_config as _prepare_prompt_learning_config,
        _set_adapter as _set_adapter,
        _set_trainable as _set_trainable,
        cast_mixed_precision_params as cast_mixed_precision_params,
        get_quantization_config as get_quantization_config,
        id_tensor_storage as id_tensor_storage,
        infer_device as infer_device,
        prepare_model_for_kbit_training as prepare_model_for_kbit_training,
        set_additional_trainable_modules as set_additional_trainable_modules,
        shift_tokens_right as shift_tokens_right,
        transpose as transpose,
    )
    from .peft_types import PeftType as PeftType, TaskType as TaskType
    from .save_and_load import (
        get_peft_model_state_dict as get_peft_model_state_dict,
        load_peft_weights as load_peft_weights,
        set_peft_model_state_dict as set_peft_model_state_dict,
    )


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
