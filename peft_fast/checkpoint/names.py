"""Names of the files of an adapter, and of the folders that adapters are saved to.

An adapter's name becomes a key of torch containers and the name of a folder; both come from files and requests that
the library does not control, so a name is checked before it is used for either.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"

DEFAULT_ADAPTER = "default"
# Folder names that Windows keeps for devices, with any extension.
_WINDOWS_DEVICES = {"con", "prn", "aux", "nul"} | {f"{stem}{i}" for stem in ("com", "lpt") for i in range(1, 10)}
_FORBIDDEN = set('/\\<>:"|?*.')
_MAX_BYTES = 200


COMPILED_LEVEL = "_orig_mod."  # that torch.compile puts before the modules of what it compiles
_ADAPTER_LEVEL = re.compile(r"\.(?:(lora_[AB])\.[^.]+(?=\.(?:weight|bias)$)|(lora_embedding_[AB])\.[^.]+$)")


def plain_name(name: str) -> str:
    """The name that PEFT gives a tensor in a file: without torch.compile's level, and without an adapter's name."""
    name = name.replace(COMPILED_LEVEL, "")
    return _ADAPTER_LEVEL.sub(lambda found: f".{found[1] or found[2]}", name)


def check_adapter_name(name: str) -> str:
    """Return `name` if it can be the name of an adapter: one key of a torch module, one folder on any system.

    Raises: TypeError if it is no string; ValueError, naming it and the reason, if it is empty, contains a separator,
        a dot (torch refuses dots in module names; "..", "." and hidden folders are excluded with them), a control
        character or another one that Windows forbids, starts with "~", ends in a space, is a Windows device, is longer
        than 200 bytes or is not valid Unicode.
    """
    if not isinstance(name, str):
        raise TypeError(f"an adapter name must be a string, got {type(name).__name__}: {name!r}")
    reason = _why_not(name)
    if reason is not None:
        raise ValueError(f"{name!r} cannot be the name of an adapter: {reason}. Use letters, digits, '_' and '-'.")
    return name


def _why_not(name: str) -> str | None:
    """The reason why `name` is refused, or None."""
    if not name:
        return "it is empty"
    bad = sorted({c for c in name if c in _FORBIDDEN or ord(c) < 32 or ord(c) == 127})
    if bad:
        return f"it contains {', '.join(repr(c) for c in bad)}"
    if name.startswith("~"):
        return "it starts with '~'"
    if name != name.strip():
        return "it starts or ends with a space"
    if name.lower() in _WINDOWS_DEVICES:
        return "Windows keeps this name for a device"
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    return f"it is longer than {_MAX_BYTES} bytes" if length > _MAX_BYTES else None


def adapter_directory(save_directory: str | os.PathLike[str], adapter_name: str) -> Path:
    """The folder of an adapter: `save_directory` itself for "default", else its sub-folder of that name.

    Nothing is created. Raises: ValueError for a bad name (`check_adapter_name`), and when the sub-folder is a link, so
    that writing to it would write somewhere else.
    """
    root = Path(save_directory)
    if check_adapter_name(adapter_name) == DEFAULT_ADAPTER:
        return root
    real_root = os.path.realpath(root)
    real = os.path.realpath(root / adapter_name)
    if real != os.path.join(real_root, adapter_name):
        raise ValueError(
            f"adapter {adapter_name!r}: {root / adapter_name} is a link to {real}. An adapter is saved only inside the "
            f"directory given ({real_root}); remove the link or save to {real} directly."
        )
    return root / adapter_name
