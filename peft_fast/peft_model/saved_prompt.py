"""A saved prompt learning adapter on its way to a base model: its sizes, and errors that name what they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..prompts.attention import DoesNotFit
from ..utils.other import _prepare_prompt_learning_config

__all__ = ["fitting"]

_SIZES = ("num_layers", "num_attention_heads", "token_dim")


@contextmanager
def fitting(directory: Path, config: Any, base: nn.Module) -> Iterator[None]:
    """Around what compares an adapter with its file or puts it on the base model; does nothing for other methods.

    The sizes that follow from the base model are filled in first. Errors about sizes that the base does not have say
    that the directory was made for another one.
    Raises: ValueError if it should be trainable, and as `_prepare_prompt_learning_config`.
    """
    if not config.is_prompt_learning:
        yield
        return
    if not config.inference_mode:
        raise ValueError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")
    saved = {name: getattr(config, name) for name in _SIZES}
    _prepare_prompt_learning_config(config, getattr(base, "config", {}))
    try:
        yield
    except DoesNotFit as error:
        raise ValueError(f"{directory} was made for another base model: {error.sizes}") from error
    except RuntimeError as error:
        differ = [name for name, size in saved.items() if size is not None and size != getattr(config, name)]
        if not differ or "size mismatch" not in str(error):
            raise
        got, expected = (" and ".join(f"{name}={sizes[name]}" for name in differ) for sizes in (saved, vars(config)))
        raise RuntimeError(
            f"{error} {directory} was made for another base model: expected {expected} of the keys and values of "
            f"{type(base).__name__}, got {got}"
        ) from error
