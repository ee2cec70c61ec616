"""LoRA, on PEFT's module paths. Names are imported on first use: the configuration alone needs none of the layers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS: dict[str, tuple[str, ...]] = {
    "config": ("LoraConfig", "LoraRuntimeConfig"),
    "layer": ("Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer"),
    "model": ("LoraModel",),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:  # "X as X": type checkers take it for a public name
    from .config import LoraConfig as LoraConfig, LoraRuntimeConfig as LoraRuntimeConfig
    from .layer import (
        Conv1d as Conv1d,
        Conv2d as Conv2d,
        Conv3d as Conv3d,
        Embedding as Embedding,
        Linear as Linear,
        LoraLayer as LoraLayer,
    )
    from .model import LoraModel as LoraModel


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
