"""Where an adapter is: a local directory, or a repository of the Hugging Face Hub, whose files come to the cache."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .atomic import locate, recover
from .names import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # "name" or "owner/name"


def find_adapter(
    model_id: str | os.PathLike[str], subfolder: str | None = None, *, config_needed: bool = True, **hub_kwargs: Any
) -> Path:
    """The local directory that holds an adapter's weights (and config); the Hub is asked only for what is not local.

    Args:
        model_id: a directory, or "owner/name" on the Hub. A directory that holds an adapter's file is never looked up.
        subfolder: of the directory or the repository. config_needed: False: the weights are enough.
        hub_kwargs: for `huggingface_hub.hf_hub_download` (revision, token, cache_dir, local_files_only, ...).
    Raises: ValueError, naming what was looked for and where: a path that does not exist or holds no adapter, a file
        that the repository does not have, the Hub out of reach and the file not in the cache.
    """
    directory = Path(model_id) / subfolder if subfolder is not None else Path(model_id)
    needed = CONFIG_NAME if config_needed else f"{SAFETENSORS_WEIGHTS_NAME}' or '{WEIGHTS_NAME}"
    if directory.is_dir():
        recover(directory)
        if any(locate(directory, name) for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            return directory
    name = os.fspath(model_id)
    if not _HUB_ID.fullmatch(name):
        state = "the directory has no such file" if directory.is_dir() else "there is no such directory"
        raise ValueError(f"Can't find '{needed}' at '{directory}': {state} (nor is it the id of a Hub repository)")
    return _download(name, subfolder, config_needed, hub_kwargs)


def _download(model_id: str, subfolder: str | None, config_needed: bool, hub_kwargs: dict[str, Any]) -> Path:
    """Bring an adapter's files to the cache and return the folder of the snapshot."""
    config = _fetch(model_id, subfolder, (CONFIG_NAME,), hub_kwargs) if config_needed else None
    weights = _fetch(model_id, subfolder, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME), hub_kwargs)
    if config is not None and config.parent != weights.parent:
        raise ValueError(
            f"{model_id} changed while it was downloaded: config from {config.parent.name}, weights from "
            f"{weights.parent.name}. Load it again, or pass a revision."
        )
    return weights.parent


def _fetch(model_id: str, subfolder: str | None, names: tuple[str, ...], hub_kwargs: dict[str, Any]) -> Path:
    """The first of several files that the repository has."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    last: Exception | None = None
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(model_id, name, subfolder=subfolder, **hub_kwargs))
        except EntryNotFoundError as error:
            last = error
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            last = error
            break
    where = f"'{model_id}'" + (f", folder '{subfolder}'" if subfolder else "")
    reason = f"{type(last).__name__}: {str(last).strip().splitlines()[0] if str(last).strip() else ''}"
    if isinstance(last, (LocalEntryNotFoundError, ConnectionError)):
        reason = "it is not in the local cache and the Hub cannot be reached (offline, or HF_HUB_OFFLINE is set)"
    raise ValueError(
        f"Can't find {' or '.join(repr(name) for name in names)} at {where}: no such local directory, and on the "
        f"Hugging Face Hub: {reason}"
    ) from last
