"""peft_fast: PEFT's API and PEFT's files, at the speed of the base model.

Public names are those of `peft` (LoraConfig, get_peft_model, PeftModel, ...). They are imported on first use (PEP 562):
`import peft_fast` costs next to nothing on top of `import torch` and needs neither triton, nor bitsandbytes, nor a GPU.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .integrations.trainers import introduce as _introduce

__version__ = "0.1.0"

# where each public name lives: module of this package -> names
_EXPORTS: dict[str, tuple[str, ...]] = {
    "auto": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "config": ("PeftConfig", "PromptLearningConfig"),
    "mapping": ("PEFT_TYPE_TO_CONFIG_MAPPING", "get_peft_config", "inject_adapter_in_model"),
    "mapping_func": ("get_peft_model",),
    "mixed_model": ("PeftMixedModel",),
    "peft_model": (
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "get_layer_status",
        "get_model_status",
    ),
    "tuners.lora": ("LoraConfig", "LoraModel"),
    "tuners.multitask_prompt_tuning": ("MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"),
    "tuners.p_tuning": ("PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"),
    "tuners.prefix_tuning": ("PrefixEncoder", "PrefixTuningConfig"),
    "tuners.prompt_tuning": ("PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"),
    "utils": (
        "PeftType",
        "TaskType",
        "get_peft_model_state_dict",
        "load_peft_weights",
        "prepare_model_for_kbit_training",
        "set_peft_model_state_dict",
    ),
}
_SUBMODULES = ("auto", "config", "functional", "helpers", "mapping", "mixed_model", "peft_model", "tuners", "utils")
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

# this library's own, beside PEFT's
_OWN = {"run_as_peft": "integrations.run_as_peft", "tune": "tuning"}

__all__ = [*sorted(_MODULE_OF), *_OWN, "__version__"]

if TYPE_CHECKING:  # "X as X": type checkers take it for a public name
    from .auto import (
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        AutoPeftModel as AutoPeftModel,
        AutoPeftModelForCausalLM as AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
    )
    from .config import PeftConfig as PeftConfig, PromptLearningConfig as PromptLearningConfig
    from .integrations.run_as_peft import run_as_peft as run_as_peft
    from .mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING,
        get_peft_config as get_peft_config,
        inject_adapter_in_model as inject_adapter_in_model,
    )
    from .mapping_func import get_peft_model as get_peft_model
    from .mixed_model import PeftMixedModel as PeftMixedModel
    from .peft_model import (
        PeftModel as PeftModel,
        PeftModelForCausalLM as PeftModelForCausalLM,
        PeftModelForFeatureExtraction as PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering as PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification as PeftModelForSequenceClassification,
        PeftModelForTokenClassification as PeftModelForTokenClassification,
        get_layer_status as get_layer_status,
        get_model_status as get_model_status,
    )
    from .tuners.lora import LoraConfig as LoraConfig, LoraModel as LoraModel
    from .tuners.multitask_prompt_tuning import (
        MultitaskPromptTuningConfig as MultitaskPromptTuningConfig,
        MultitaskPromptTuningInit as MultitaskPromptTuningInit,
    )
    from .tuners.p_tuning import (
        PromptEncoder as PromptEncoder,
        PromptEncoderConfig as PromptEncoderConfig,
        PromptEncoderReparameterizationType as PromptEncoderReparameterizationType,
    )
    from .tuners.prefix_tuning import PrefixEncoder as PrefixEncoder, PrefixTuningConfig as PrefixTuningConfig
    from .tuners.prompt_tuning import (
        PromptEmbedding as PromptEmbedding,
        PromptTuningConfig as PromptTuningConfig,
        PromptTuningInit as PromptTuningInit,
    )
    from .tuning import tune as tune
    from .utils import (
        PeftType as PeftType,
        TaskType as TaskType,
        get_peft_model_state_dict as get_peft_model_state_dict,
        load_peft_weights as load_peft_weights,
        prepare_model_for_kbit_training as prepare_model_for_kbit_training,
        set_peft_model_state_dict as set_peft_model_state_dict,
    )


def __getattr__(name: str) -> Any:
    """Import a public name, or a sub-module such as `peft_fast.helpers`, on first use."""
    if name in _MODULE_OF or name in _OWN:
        value = getattr(import_module(f"{__name__}.{_MODULE_OF.get(name) or _OWN[name]}"), name)
        globals()[name] = value  # the next look-up does not come here
        return value
    if name in _SUBMODULES:  # `import peft_fast; peft_fast.utils.other...`, as in PEFT
        return import_module(f"{__name__}.{name}")
    if name.startswith("_"):  # asked for by the import system and by tools, often
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .utils.missing import missing_text

    raise AttributeError(missing_text(sys.modules[__name__], name))


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, *_OWN, *_SUBMODULES})


_introduce()  # to transformers' Trainer and TRL, which ask whether a model is peft's
