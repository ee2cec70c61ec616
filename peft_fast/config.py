"""Configurations of adapters: what stands in an `adapter_config.json`, byte for byte as PEFT 0.21.2 writes it.

A configuration read from a file is data: unknown keys are dropped with a warning (the file may come from a newer PEFT),
values that the library could not honour are refused, nothing is imported or executed on its behalf.
"""

from __future__ import annotations

import inspect
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from .checkpoint import CONFIG_NAME, check_prompt_config, config_json, locate, read_config
from .checkpoint.atomic import replace_files
from .utils.error import UnknownMethodError
from .utils.peft_types import PeftType, TaskType

__all__ = ["PeftConfig", "PeftConfigMixin", "PromptLearningConfig", "PushToHubMixin", "config_class"]

FORMAT_VERSION = "0.21.2"  # of the files: the PEFT release whose format they have

# Where the configuration class of each method lives. By name, looked up at the first use: this module stays below the
# methods, and a file of one method does not import the others.
CONFIG_CLASSES: dict[PeftType, str] = {
    PeftType.LORA: "peft_fast.tuners.lora.config:LoraConfig",
    PeftType.PREFIX_TUNING: "peft_fast.tuners.prefix_tuning.config:PrefixTuningConfig",
    PeftType.PROMPT_TUNING: "peft_fast.tuners.prompt_tuning.config:PromptTuningConfig",
    PeftType.P_TUNING: "peft_fast.tuners.p_tuning.config:PromptEncoderConfig",
    PeftType.MULTITASK_PROMPT_TUNING: "peft_fast.tuners.multitask_prompt_tuning.config:MultitaskPromptTuningConfig",
}


def config_class(peft_type: Any) -> type[PeftConfig]:
    """The configuration class of a method.

    Raises: UnknownMethodError (a ValueError, and a KeyError as in PEFT) if PEFT knows no such method; ValueError if
        PEFT has it and peft_fast has not.
    """
    if peft_type not in list(PeftType):
        known = ", ".join(kind.value for kind in CONFIG_CLASSES)
        raise UnknownMethodError(
            f"peft_type {peft_type!r} is not known (supported: {known}). The file may come from a newer version of "
            "peft, or from another library"
        )
    peft_type = PeftType(peft_type)
    if peft_type not in CONFIG_CLASSES:
        supported = ", ".join(sorted(t.value for t in CONFIG_CLASSES))
        raise ValueError(f"peft_type {peft_type.value} is not supported by peft_fast yet (supported: {supported})")
    module, _, name = CONFIG_CLASSES[peft_type].partition(":")
    cls: type[PeftConfig] = getattr(import_module(module), name)
    return cls


class PushToHubMixin:
    """`push_to_hub` for whatever has `save_pretrained`; transformers' mixin without importing transformers."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the object's files into `save_directory`; the class that mixes this in does it."""
        raise NotImplementedError(f"{type(self).__name__} has no save_pretrained, which push_to_hub needs")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: list[str] | None = None,
        **save_kwargs: Any,
    ) -> Any:
        """Save into a temporary directory and upload it as one commit; the repository is created if it does not exist.

        Args:
            repo_id: "name" or "organization/name".
            private: None leaves it to the account's default; ignored when the repository exists.
            revision: branch to push to, created if it does not exist.
            max_shard_size: accepted as transformers accepts it; an adapter is one file.
            tags: added to the tags of the model card.
            save_kwargs: passed on to `save_pretrained`.
        Returns: huggingface_hub's CommitInfo.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, **save_kwargs)
            _add_tags(Path(directory) / "README.md", tags)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                commit_message=commit_message or f"Upload {'config' if isinstance(self, PeftConfigMixin) else 'model'}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def _add_tags(card_file: Path, tags: list[str] | None) -> None:
    if not tags or not card_file.exists():
        return
    from huggingface_hub import ModelCard

    card = ModelCard.load(card_file)
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), *tags})
    card.save(card_file)


@dataclass
class PeftConfigMixin(PushToHubMixin):
    """What all configurations share: reading, writing, choosing the class by `peft_type`.

    Args:
        task_type: one of `TaskType` or None.
        peft_type: one of `PeftType`; set by the class itself.
        auto_mapping: class and module of a base model without a task type; written on saving.
        peft_version: version of the file's format, filled in.
    Raises: ValueError for an unknown task type.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, str] | None = None
    peft_version: str | None = None

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ValueError(
                f"Invalid task type: '{self.task_type}'. Must be one of the following task types: "
                f"{', '.join(task.value for task in TaskType)}."
            )
        if self.peft_version is None:
            self.peft_version = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The fields that belong into a file, as a new dict; sets stay sets."""
        return asdict(self)

    def file_content(self, auto_mapping_dict: dict[str, str] | None = None) -> dict[str, Any]:
        """What `adapter_config.json` holds: the fields, sets as sorted lists: equal configs give equal files."""
        content = {key: sorted(value) if isinstance(value, set) else value for key, value in self.to_dict().items()}
        return content if auto_mapping_dict is None else {**content, "auto_mapping": auto_mapping_dict}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` into `save_directory`, which is created if needed.

        Args:
            kwargs: `auto_mapping_dict` replaces the field auto_mapping in the file; others are ignored, as in PEFT.
        Raises: AssertionError (as PEFT) if `save_directory` is a file.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        text = config_json(self.file_content(kwargs.get("auto_mapping_dict")))
        replace_files(save_directory, {CONFIG_NAME: lambda path: _write(path, text)})

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Build the configuration of the class that `peft_type` names, or of this class without one.

        Keys that the class does not have are dropped with a UserWarning: a file may come from a newer PEFT.
        Raises: KeyError or ValueError as `config_class`; TypeError if keys are unknown and there is no `peft_type`.
        """
        target: Any = config_class(kwargs["peft_type"]) if "peft_type" in kwargs else cls
        known = {field.name for field in fields(target) if field.init}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            if "peft_type" not in kwargs:
                raise TypeError(
                    f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
                )
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {target.__name__}, these are ignored. The "
                "configuration was probably saved by a newer version of PEFT.",
                stacklevel=2,
            )
        config: PeftConfig = target(**{key: value for key, value in kwargs.items() if key in known})
        return config

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read the configuration of a saved adapter.

        Args:
            pretrained_model_name_or_path: a directory, or the id of a repository on the Hub.
            subfolder: folder of the adapter inside it.
            kwargs: those of `huggingface_hub.hf_hub_download` (revision, token, cache_dir, ...).
        Raises: ValueError if there is no such file, or it holds what the library cannot honour.
        """
        hub_kwargs, class_kwargs, _ = cls._split_kwargs(kwargs)
        attributes = _read(pretrained_model_name_or_path, subfolder=subfolder, **hub_kwargs)
        return cls.from_peft_type(**cls.check_kwargs(**{**class_kwargs, **attributes}))

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The content of a configuration file as a dict, without a `runtime_config`, which no file may set.

        Raises: ValueError if the file is not a JSON object.
        """
        with open(path_json_file, encoding="utf-8") as file:
            attributes = json.load(file)
        if not isinstance(attributes, dict):
            raise ValueError(f"{path_json_file} should hold a JSON object, it holds a {type(attributes).__name__}")
        return _without_runtime_config(attributes)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Look at the values of a file before the configuration is built; a subclass may change or refuse them."""
        return kwargs

    @classmethod
    def _get_peft_type(cls, model_id: str | os.PathLike[str], **hf_hub_download_kwargs: Any) -> Any:
        """The method named in a saved configuration."""
        return _read(model_id, **hf_hub_download_kwargs)["peft_type"]

    @classmethod
    def _split_kwargs(cls, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """(those of hf_hub_download, this class's own fields, the rest)."""
        from huggingface_hub import hf_hub_download

        hub_names = set(inspect.signature(hf_hub_download).parameters)
        own_names = set(cls.__annotations__)
        hub = {key: value for key, value in kwargs.items() if key in hub_names}
        own = {key: value for key, value in kwargs.items() if key in own_names - hub_names}
        return hub, own, {key: value for key, value in kwargs.items() if key not in hub_names | own_names}

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method learns virtual tokens rather than changing layers."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether this is an adaption prompt configuration."""
        return False


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _without_runtime_config(attributes: dict[str, Any]) -> dict[str, Any]:
    if "runtime_config" in attributes:
        warnings.warn(
            "The configuration file contains a `runtime_config` key. This is ignored: it is valid at run time only.",
            stacklevel=3,
        )
        del attributes["runtime_config"]
    return attributes


def _read(model_id: str | os.PathLike[str], subfolder: str | None = None, **hub_kwargs: Any) -> dict[str, Any]:
    """The content of a local configuration file, else of its download. Raises: ValueError if there is none."""
    directory = Path(model_id, subfolder or "")
    if locate(directory, CONFIG_NAME) is None:
        directory = _download(os.fspath(model_id), subfolder, **hub_kwargs).parent
    return _without_runtime_config(read_config(directory))


def _download(repo_id: str, subfolder: str | None, **hub_kwargs: Any) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repo_id, CONFIG_NAME, subfolder=subfolder, **hub_kwargs))
    except (HFValidationError, HfHubHTTPError, OSError) as error:  # not found, not reachable, no repository's name
        raise ValueError(f"Can't find '{CONFIG_NAME}' at '{repo_id}'") from error


@dataclass
class PeftConfig(PeftConfigMixin):
    """Base class of the configurations of adapters.

    Args:
        base_model_name_or_path: the base that the adapter was made for; filled in by `get_peft_model`.
        revision: revision of the base model.
        inference_mode: the adapter's parameters are frozen.
    """

    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False


@dataclass
class PromptLearningConfig(PeftConfig):
    """Base class of the configurations that learn virtual tokens.

    Args:
        num_virtual_tokens: number of learned tokens.
        token_dim: hidden size of the base model; for prefix tuning that of its keys and values.
        num_transformer_submodules: 2 for an encoder with a decoder, else 1.
        num_attention_heads, num_layers: of the base model; for prefix tuning the heads of its keys and values.
        modules_to_save: further modules to train and save, such as a classification head.
        All but num_virtual_tokens are filled in from the base model's configuration where they are None.
    Raises: ValueError for a size that is no positive integer, naming the field, and a dropout outside [0, 1].
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prompt_config(self, type(self).__name__)

    @property
    def is_prompt_learning(self) -> bool:
        """True."""
        return True
