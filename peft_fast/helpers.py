"""PEFT's helpers around a model: temporary settings, signatures for documentation tools."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import update_wrapper
from types import MethodType
from typing import Any

from torch import nn

from .config import PeftConfig
from .tuners.lora.layer import LoraLayer
from .tuners.tuners_utils import tuner_layers

__all__ = [
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether there is an adapter's config that can be read, in a local directory or on the Hub."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float | int) -> Iterator[None]:
    """Multiply the scaling of all LoRA adapters while the context lasts; afterwards it is exactly what it was.

    A multiplier in [0, 1] goes from the base model to the fine-tuned one (wise-ft, arXiv:2109.01903).

    Args:
        model: any model with LoRA layers, a PeftModel or not.
        multiplier: dimensionless.
    Raises: TypeError if it is not a number; ValueError for a model without LoRA layers.
    """
    if not isinstance(multiplier, float | int):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    originals = [(layer, dict(layer.scaling)) for layer in tuner_layers(model, LoraLayer)]
    if not originals:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    try:
        for layer, scaling in originals:
            layer.scaling.update({name: value * multiplier for name, value in scaling.items()})
        yield
    finally:
        for layer, scaling in originals:
            # adapters that came or went meanwhile stay as they are
            layer.scaling.update({name: value for name, value in scaling.items() if name in layer.scaling})


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Adapter layers take their input in the dtype it has while the context lasts, if `active`."""
    originals = [(layer, layer.cast_input_dtype_enabled) for layer in (tuner_layers(model) if active else [])]
    try:
        for layer, _ in originals:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in originals:
            layer.cast_input_dtype_enabled = enabled


def update_forward_signature(model: Any) -> None:
    """Let `help(model.forward)` of a PeftModel show the base model's documentation, where its own takes anything."""
    _borrow_documentation(model, "forward")


def update_generate_signature(model: Any) -> None:
    """Let `help(model.generate)` of a PeftModel show the base model's documentation, where its own takes anything."""
    if hasattr(model, "generate"):
        _borrow_documentation(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """`update_forward_signature`, `update_generate_signature` or both.

    Raises: ValueError unless `method` is "forward", "generate" or "all".
    """
    if method not in {"forward", "generate", "all"}:
        raise ValueError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _borrow_documentation(model: Any, name: str) -> None:
    own = getattr(model, name)
    if not set(inspect.signature(own).parameters) <= {"args", "kwargs"}:
        return
    base = getattr(type(model.get_base_model()), name)
    function = update_wrapper(deepcopy(own.__func__), base, assigned=("__doc__", "__name__", "__annotations__"))
    setattr(model, name, MethodType(function, model))
