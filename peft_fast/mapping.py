"""From the name of a method to its classes, and the functions that need no more than that."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .checkpoint import check_adapter_name
from .config import PeftConfig, config_class
from .tuners.lora import LoraConfig, LoraModel
from .tuners.multitask_prompt_tuning import MultitaskPromptEmbedding, MultitaskPromptTuningConfig
from .tuners.p_tuning import PromptEncoder, PromptEncoderConfig
from .tuners.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from .tuners.prompt_tuning import PromptEmbedding, PromptTuningConfig
from .tuners.tuners_utils import BaseTuner
from .utils.peft_types import PeftType

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "inject_adapter_in_model",
]

PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {
    PeftType.LORA: LoraConfig,
    PeftType.PREFIX_TUNING: PrefixTuningConfig,
    PeftType.PROMPT_TUNING: PromptTuningConfig,
    PeftType.P_TUNING: PromptEncoderConfig,
    PeftType.MULTITASK_PROMPT_TUNING: MultitaskPromptTuningConfig,
}
# a BaseTuner changes layers; a BasePromptEncoder makes virtual tokens, and is made from a configuration
PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, Any] = {
    PeftType.LORA: LoraModel,
    PeftType.PREFIX_TUNING: PrefixEncoder,
    PeftType.PROMPT_TUNING: PromptEmbedding,
    PeftType.P_TUNING: PromptEncoder,
    PeftType.MULTITASK_PROMPT_TUNING: MultitaskPromptEmbedding,
}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[PeftType, type[BaseTuner]] = {}
PEFT_TYPE_TO_PREFIX_MAPPING: dict[PeftType, str] = {t: f"{t.value.lower()}_" for t in PEFT_TYPE_TO_TUNER_MAPPING}

# Keys of early versions of PEFT that its documentation still shows; they meant nothing when None.
_LEGACY_KEYS = ("enable_lora", "postprocess_past_key_value_function")


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """Build the configuration that a dictionary describes.

    Args:
        config_dict: "peft_type" and the arguments of its configuration class. The keys "enable_lora" and
            "postprocess_past_key_value_function" of PEFT's old examples are dropped with a UserWarning when None.
    Raises: KeyError without a "peft_type" or for one that PEFT does not have; ValueError for one that peft_fast does
        not have yet; TypeError for any other unknown key.
    """
    legacy = [key for key in _LEGACY_KEYS if key in config_dict and config_dict[key] is None]
    cls = config_class(config_dict["peft_type"])
    if legacy:
        warnings.warn(f"get_peft_config: the keys {legacy} of early versions of PEFT are ignored", stacklevel=2)
    return cls(**{key: value for key, value in config_dict.items() if key not in legacy})


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter's layers into `model`, in place, without wrapping it in a PeftModel.

    Args:
        adapter_name: see `check_adapter_name`.
        low_cpu_mem_usage: the new parameters are on the meta device until weights are loaded.
        state_dict: adapt the modules whose keys stand here; only the keys are used.
    Returns: `model` itself; its attribute `peft_config` maps adapter names to configurations.
    Raises: ValueError for prompt learning and for a name that cannot be an adapter's.
    """
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise ValueError("`inject_adapter_in_model` does not support prompt learning and adaption prompt.")
    tuner_class = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(peft_config.peft_type))
    if tuner_class is None:
        raise ValueError(f"`inject_adapter_in_model` does not support {peft_config.peft_type} yet.")
    check_adapter_name(adapter_name)
    tuner = tuner_class(
        model, peft_config, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
    )
    injected: nn.Module = tuner.model
    return injected
