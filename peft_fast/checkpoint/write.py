"""Writing an adapter directory in PEFT's format, all files at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .atomic import Writer, replace_files
from .names import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME


def save_adapter(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    safe_serialization: bool = True,
    extra_files: Mapping[str, bytes] | None = None,
    adapter_name: str | None = None,
) -> None:
    """Write the config and the weights of one adapter; a kill at any moment leaves the old adapter or the new one.

    Args:
        directory: the adapter's own folder (`adapter_directory`), created if needed. Other files in it are kept.
        config: what becomes `adapter_config.json` (sets become lists; the keys are sorted).
        tensors: by their names in the file. Views of larger storages are copied, never written whole.
        safe_serialization: True writes `adapter_model.safetensors`; False `adapter_model.bin`, and a safetensors file
            of an earlier save, which readers would prefer, goes away.
        extra_files: more files that belong to the same save (a model card), by name.
        adapter_name: named in errors.
    Raises: ValueError if there is no tensor at all (shards were not gathered), a tensor is on the meta device or the
        config cannot be written as JSON; OSError from the file system: the directory is as it was.
    """
    who = f"adapter {adapter_name!r} cannot be saved to {os.fspath(directory)}"
    if not tensors:
        raise ValueError(
            f"{who}: there is no tensor to save. With a sharded model (FSDP, ZeRO-3), gather the weights on all ranks "
            "and pass them as state_dict."
        )
    text = config_json(config, who)
    owned = _own_storage(tensors, who, clone_aliases=safe_serialization)

    def write_config(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    def write_weights(path: Path) -> None:
        if safe_serialization:
            save_file(owned, path, metadata={"format": "pt"})
        else:
            torch.save(owned, path)

    weights_name = SAFETENSORS_WEIGHTS_NAME if safe_serialization else WEIGHTS_NAME
    writers: dict[str, Writer] = {CONFIG_NAME: write_config, weights_name: write_weights}
    for name, content in (extra_files or {}).items():
        writers[name] = lambda path, content=content: _write_bytes(path, content)  # type: ignore[misc]
    replace_files(directory, writers, removed=() if safe_serialization else (SAFETENSORS_WEIGHTS_NAME,))


def config_json(config: Mapping[str, Any], who: str = "the config cannot be saved") -> str:
    """The text of `adapter_config.json`. Raises: ValueError if a value has no place in JSON (NaN included)."""
    plain = {key: list(value) if isinstance(value, (set, frozenset)) else value for key, value in config.items()}
    try:
        return json.dumps(plain, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{who}: its config is not JSON: {error}") from error


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _own_storage(tensors: Mapping[str, Tensor], who: str, *, clone_aliases: bool) -> dict[str, Tensor]:
    """The same tensors, contiguous, none a view of a larger storage (an adapter pool would be written whole).

    clone_aliases: also copy the second of two tensors that share a storage, which safetensors cannot express.
    """
    owned: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{who}: {name!r} is no tensor but {type(tensor).__name__}")
        if tensor.is_meta:
            raise ValueError(f"{who}: {name!r} is on the meta device, it has no data. Load the weights first.")
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or (clone_aliases and storage.data_ptr() in seen and tensor.numel()):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        owned[name] = tensor
    return owned
