"""The methods: one folder or file each, on the base classes of `tuners_utils`. Names are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS: dict[str, tuple[str, ...]] = {
    "lora": ("LoraConfig", "LoraModel"),
    "multitask_prompt_tuning": ("MultitaskPromptEmbedding", "MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"),
    "p_tuning": ("PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"),
    "prefix_tuning": ("PrefixEncoder", "PrefixTuningConfig"),
    "prompt_tuning": ("PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:  # "X as X": type checkers take it for a public name
    from .lora import LoraConfig as LoraConfig, LoraModel as LoraModel
    from .multitask_prompt_tuning import (
        MultitaskPromptEmbedding as MultitaskPromptEmbedding,
        MultitaskPromptTuningConfig as MultitaskPromptTuningConfig,
        MultitaskPromptTuningInit as MultitaskPromptTuningInit,
    )
    from .p_tuning import (
        PromptEncoder as PromptEncoder,
        PromptEncoderConfig as PromptEncoderConfig,
        PromptEncoderReparameterizationType as PromptEncoderReparameterizationType,
    )
    from .prefix_tuning import PrefixEncoder as PrefixEncoder, PrefixTuningConfig as PrefixTuningConfig
    from .prompt_tuning import (
        PromptEmbedding as PromptEmbedding,
        PromptTuningConfig as PromptTuningConfig,
        PromptTuningInit as PromptTuningInit,
    )


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
