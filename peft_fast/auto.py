"""AutoPeftModel and its task classes: the base model that an adapter names, with the adapter on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar

from torch import nn

from .config import PeftConfig
from .peft_model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .utils.constants import TOKENIZER_CONFIG_NAME

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "check_import_allowlist",
    "get_default_import_allowlist",
]

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def get_default_import_allowlist() -> list[str]:
    """Packages that an adapter's configuration may name for its base model's class."""
    return ["transformers"]


def check_import_allowlist(allowlist: Sequence[str], parent_name: str) -> bool:
    """Whether the module `parent_name` is one of these packages, or inside one."""
    return any(parent_name == allowed or parent_name.startswith(f"{allowed}.") for allowed in allowlist)


class _BaseAutoPeftModel:
    _target_class: ClassVar[str | None] = None  # transformers' class that loads the base model
    _target_peft_class: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(f"{name} is made with `{name}.from_pretrained(pretrained_model_name_or_path)`, not directly.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load an adapter together with the base model that its configuration names.

        If the adapter comes with a tokenizer that has more tokens than the base model, the embeddings are enlarged.

        Args:
            pretrained_model_name_or_path: the adapter: a directory, or the id of a repository on the Hub.
            revision: of the adapter; that of the base model is in the adapter's configuration.
            import_allowlist: packages that the configuration of an adapter without a task type may name; None means
                `get_default_import_allowlist()`. Loading a model means running its package's code: add what you trust.
            kwargs: for the base model's from_pretrained (dtype, device_map, ...) and the adapter's (subfolder, ...).
        Raises: ValueError if the adapter is for another task than this class, names a package outside the allowlist
            or does not tell its base model; otherwise as `PeftModel.from_pretrained`.
        """
        saved = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **kwargs)
        allowlist = get_default_import_allowlist() if import_allowlist is None else import_allowlist
        loader = cls._base_loader(saved, allowlist)
        if not saved.base_model_name_or_path:
            raise ValueError(
                f"the adapter at {pretrained_model_name_or_path} does not name its base model: load the base and use "
                "PeftModel.from_pretrained"
            )
        for_base = {key: value for key, value in kwargs.items() if key != "subfolder"}
        base: Any = loader.from_pretrained(saved.base_model_name_or_path, revision=saved.revision, **for_base)
        _make_room_for_tokens(base, os.fspath(pretrained_model_name_or_path), revision, kwargs)
        return cls._target_peft_class.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **kwargs,
        )

    @classmethod
    def _base_loader(cls, config: PeftConfig, allowlist: Sequence[str]) -> Any:
        """The class whose from_pretrained gives the base model."""
        task = getattr(config.task_type, "value", config.task_type)
        if task is not None:
            if cls._target_class is None:
                raise ValueError(
                    "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type. "
                    "(e.g. `AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`)"
                )
            expected, asked = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__, cls._target_peft_class.__name__
            if asked != expected:
                raise ValueError(
                    f"Expected target PEFT class: {expected}, but you have asked for: {asked} "
                    "make sure that you are loading the correct model for your task type."
                )
            return getattr(import_module("transformers"), cls._target_class)
        if not config.auto_mapping:
            raise ValueError(
                "Cannot infer the auto class from the config, please make sure that you are loading the correct "
                "model for your task type."
            )
        return _class_named_by(config.auto_mapping, allowlist)


def _class_named_by(auto_mapping: dict[str, Any], allowlist: Sequence[str]) -> Any:
    """The model class that a configuration names. Raises: ValueError if it is not in the allowlist, or none."""
    library, name = auto_mapping.get("parent_library"), auto_mapping.get("base_model_class")
    if not isinstance(library, str) or not isinstance(name, str):
        raise ValueError(f"auto_mapping should name parent_library and base_model_class, got {auto_mapping!r}")
    if not check_import_allowlist(allowlist, library):
        raise ValueError(
            f"The auto mapping wants to import '{library}' which is not in the import allowlist. If you are sure that "
            f"importing this library is safe, specify `import_allowlist=['{library}']` in `from_pretrained()`."
        )
    found = getattr(import_module(library), name, None)
    if not isinstance(found, type) or not issubclass(found, nn.Module) or not hasattr(found, "from_pretrained"):
        raise ValueError(f"auto_mapping: {library}.{name} is no model class with a from_pretrained")
    return found


def _make_room_for_tokens(base: Any, adapter: str, revision: str | None, kwargs: dict[str, Any]) -> None:
    """Enlarge the embeddings if the adapter's tokenizer has more tokens; they never shrink."""
    token = kwargs.get("token")
    if not hasattr(base, "get_input_embeddings"):
        return
    if not _has_tokenizer(adapter, revision, kwargs.get("repo_type"), token):
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        adapter, revision=revision, token=token, trust_remote_code=kwargs.get("trust_remote_code", False)
    )
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))


def _has_tokenizer(adapter: str, revision: str | None, repo_type: str | None, token: Any) -> bool:
    if os.path.isdir(adapter):
        return os.path.exists(os.path.join(adapter, TOKENIZER_CONFIG_NAME))
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(try_to_load_from_cache(adapter, TOKENIZER_CONFIG_NAME, revision=revision, repo_type=repo_type), str):
        return True
    try:
        return bool(file_exists(adapter, TOKENIZER_CONFIG_NAME, revision=revision, repo_type=repo_type, token=token))
    except (HfHubHTTPError, OSError):  # offline: what is not in the cache is not there
        return False


class AutoPeftModel(_BaseAutoPeftModel):
    """For adapters without a task type, whose configuration names the class of the base model."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """For adapters of task type CAUSAL_LM."""

    _target_class = "AutoModelForCausalLM"
    _target_peft_class = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """For adapters of task type SEQ_2_SEQ_LM."""

    _target_class = "AutoModelForSeq2SeqLM"
    _target_peft_class = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """For adapters of task type SEQ_CLS."""

    _target_class = "AutoModelForSequenceClassification"
    _target_peft_class = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """For adapters of task type TOKEN_CLS."""

    _target_class = "AutoModelForTokenClassification"
    _target_peft_class = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """For adapters of task type QUESTION_ANS."""

    _target_class = "AutoModelForQuestionAnswering"
    _target_peft_class = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """For adapters of task type FEATURE_EXTRACTION."""

    _target_class = "AutoModel"
    _target_peft_class = PeftModelForFeatureExtraction
