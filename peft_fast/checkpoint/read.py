"""Reading an adapter directory that nobody vouches for: names, shapes and dtypes first, the data afterwards.

A directory is data. Nothing in it is imported or executed: a config is JSON of bounded size, weights are a safetensors
file (or a legacy pickle, through torch's weights_only unpickler). Header and data are read through one handle, so that
the data that is loaded is the data that was checked. Every error is a ValueError that names adapter and file.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import stat
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .atomic import locate, recover
from .names import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

_MAX_CONFIG_BYTES = 16 * 2**20  # target_modules of a large mixture of experts, written out, is about 1 MB
_KINDS = {"F64": "float", "F32": "float", "F16": "float", "BF16": "float", "BOOL": "bool", "C64": "complex"}

# What torch's unpickler lets through for damaged files.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    struct.error,
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError),
)


@dataclass(frozen=True)
class TensorInfo:
    """What a file says about one tensor. kind: "float", "integer", "bool", "complex" or "other"; dtype: its name."""

    shape: tuple[int, ...]
    dtype: str
    kind: str


class WeightsFile:
    """The weights of an adapter, opened: `tensors` (name -> TensorInfo) is known, the data is read by `load`."""

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], Tensor], adapter_name: str | None
    ):
        self.path = path
        self.tensors = dict(tensors)
        self.where = describe(path, adapter_name)
        self._read = read
        self._stored_name: dict[str, str] = {}  # where `rename` changed it

    def rename(self, key_mapping: Mapping[str, str] | None) -> None:
        """Apply the caller's pattern -> replacement to names without their "base_model.model."; the first match counts.

        Raises: ValueError if a name has no such prefix, or two tensors get one name.
        """
        if not key_mapping:
            return

        def mapped(name: str) -> str:
            prefix = next((p for p in ("base_model.model.", "base_model.") if name.startswith(p)), None)
            if prefix is None:
                raise ValueError(f"{self.where}: key_mapping needs names with 'base_model.', got tensor {name!r}")
            new = name.removeprefix(prefix)
            for pattern, replacement in key_mapping.items():
                new, count = re.subn(pattern, replacement, new)
                if count:
                    break
            return prefix + new

        self.map_names(mapped, "key_mapping")

    def map_names(self, new_name: Callable[[str], str], who: str) -> None:
        """Give the tensors other names; ``who``, in an error, does. Raises: ValueError if two tensors get one name."""
        old_name: dict[str, str] = {}
        for name in self.tensors:
            new = new_name(name)
            if new in old_name:
                raise ValueError(
                    f"{self.where}: {who} gives tensors {old_name[new]!r} and {name!r} the same name {new!r}"
                )
            old_name[new] = name
        self._stored_name = {new: self._stored_name.get(name, name) for new, name in old_name.items()}
        self.tensors = {new: self.tensors[name] for new, name in old_name.items()}

    def load(self, device: str | torch.device = "cpu", names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors (all, or `names`) on `device`, owning their memory: later changes of the file do not show.

        Those of 8 bits are read as float32, the same numbers: torch has no products of them.
        Raises: ValueError if the data of a tensor cannot be read.
        """
        loaded = {}
        for name in self.tensors if names is None else names:
            try:
                # The handle gives views of the mapped file, which another program may change or cut off.
                tensor = self._read(self._stored_name.get(name, name)).detach()
                narrow = tensor.is_floating_point() and tensor.dtype.itemsize == 1
                loaded[name] = tensor.to(device, torch.float32 if narrow else tensor.dtype, copy=True)
            except SafetensorError as error:
                raise ValueError(f"{self.where}: tensor {name!r} cannot be read: {error}") from error
        return loaded


def describe(path: Path, adapter_name: str | None) -> str:
    """How errors name an adapter's file."""
    return f"file {path}" if adapter_name is None else f"adapter {adapter_name!r}, file {path}"


def read_config(directory: str | os.PathLike[str], *, adapter_name: str | None = None) -> dict[str, Any]:
    """The contents of `adapter_config.json`, checked as far as possible without knowing the method.

    An interrupted save of the directory is finished first.
    Raises: ValueError, naming adapter and file, if it is missing, no regular file, larger than 16 MiB, no JSON object
        in UTF-8, without a "peft_type", or has a number that is not finite.
    """
    recover(directory)
    path = locate(directory, CONFIG_NAME)
    if path is None:
        raise ValueError(f"Can't find '{CONFIG_NAME}' at '{os.fspath(directory)}'")
    where = describe(path, adapter_name)
    _check_regular(path, where)
    with open(path, "rb") as file:
        raw = file.read(_MAX_CONFIG_BYTES + 1)
    if len(raw) > _MAX_CONFIG_BYTES:
        raise ValueError(f"{where}: a config has at most {_MAX_CONFIG_BYTES} bytes, this file has more")
    try:
        config = json.loads(raw.decode("utf-8"))
        bad = _non_finite(config, "")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{where}: expected JSON in UTF-8, got {type(error).__name__}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(config).__name__}")
    if not isinstance(config.get("peft_type"), str):
        raise ValueError(f'{where}: expected "peft_type" to name a method, got {config.get("peft_type")!r}')
    if bad is not None:
        raise ValueError(f"{where}: expected finite numbers, got {bad}")
    return config


def _non_finite(value: Any, name: str) -> str | None:
    """The first NaN or infinity in a JSON value, as "name = value"; JSON itself has neither, Python's reader both."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} = {value}"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found = _non_finite(item, f"{name}.{key}" if name else str(key))
        if found is not None:
            return found
    return None


def open_weights(directory: str | os.PathLike[str], *, adapter_name: str | None = None) -> WeightsFile:
    """Open the weights of an adapter directory: safetensors, else the legacy `.bin` (with a UserWarning).

    Only the header of a safetensors file is read. An interrupted save of the directory is finished first.
    Raises: ValueError if there is none, or it is no regular file, truncated, malformed, or (`.bin`) anything else
        than a dictionary of plain tensors.
    """
    recover(directory)
    for name, opener in ((SAFETENSORS_WEIGHTS_NAME, open_safetensors), (WEIGHTS_NAME, open_bin)):
        path = locate(directory, name)
        if path is not None:
            return opener(path, adapter_name)
    raise ValueError(
        f"Can't find weights for adapter {adapter_name!r} in {os.fspath(directory)}: expected "
        f"{SAFETENSORS_WEIGHTS_NAME} or {WEIGHTS_NAME}, got neither"
    )


def open_safetensors(path: Path, adapter_name: str | None = None) -> WeightsFile:
    """Open one safetensors file. The library checks the header's length, its JSON, and that offsets cover the file."""
    where = describe(path, adapter_name)
    _check_regular(path, where)
    try:
        handle = safe_open(str(path), framework="pt", device="cpu")
        tensors = {}
        for name in handle.keys():  # type: ignore[no-untyped-call]
            entry = handle.get_slice(name)  # type: ignore[no-untyped-call]
            dtype = entry.get_dtype()
            tensors[name] = TensorInfo(tuple(entry.get_shape()), dtype, _kind(dtype))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{where}: expected a complete safetensors file, got: {error}") from error
    return WeightsFile(path, tensors, handle.get_tensor, adapter_name)


def _kind(dtype: str) -> str:
    """The class of a dtype as safetensors writes it."""
    if dtype.startswith("F8_"):
        return "float"
    return _KINDS.get(dtype) or ("integer" if dtype[:1] in "IU" and dtype[1:].isdigit() else "other")


def open_bin(path: Path, adapter_name: str | None = None) -> WeightsFile:
    """Open a legacy pickle with torch's weights_only unpickler, mapped where its format allows; warns."""
    where = describe(path, adapter_name)
    _check_regular(path, where)
    warnings.warn(
        f"{path} is a pickle; {SAFETENSORS_WEIGHTS_NAME} is the format to use. Load it once from a source you trust "
        "and save it again to convert it.",
        UserWarning,
        stacklevel=3,
    )
    loaded = _unpickle(path, where)
    if not isinstance(loaded, dict):
        raise ValueError(f"{where}: expected a dictionary of tensors, got {type(loaded).__name__}")
    for name, value in loaded.items():
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided and not value.is_quantized
        if not isinstance(name, str) or not plain:
            raise ValueError(f"{where}: expected plain tensors by name, got {type(value).__name__} under {name!r}")
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise ValueError(
                f"{where}: tensor {name!r}: expected the data of all {value.numel()} elements of {tuple(value.shape)}, "
                f"got {value.untyped_storage().nbytes()} bytes"
            )
    tensors = {name: tensor_info(value) for name, value in loaded.items()}
    return WeightsFile(path, tensors, loaded.__getitem__, adapter_name)


def _unpickle(path: Path, where: str) -> Any:
    """torch.load(weights_only=True). Files older than torch 1.6 cannot be mapped and are read whole."""
    mapped = True
    with open(path, "rb") as file:
        mapped = file.read(4) == b"PK\x03\x04"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _UNPICKLING_ERRORS as error:
        raise ValueError(
            f"{where}: expected a pickled dictionary of tensors that weights_only accepts, got "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def tensor_info(tensor: Tensor) -> TensorInfo:
    """What a file with this tensor would say."""
    dtype = tensor.dtype
    kind = (
        "bool"
        if dtype == torch.bool
        else "float"
        if dtype.is_floating_point
        else "complex"
        if dtype.is_complex
        else "integer"
    )
    return TensorInfo(tuple(tensor.shape), str(dtype).removeprefix("torch."), kind)


def _check_regular(path: Path, where: str) -> None:
    """A pipe or a device would block the reader or never end. Links are followed: the Hub's cache consists of them."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{where}: expected a regular file, got something else")
