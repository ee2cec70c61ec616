"""The files of a PeftModel: saving, loading, the model card."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from ..checkpoint import adapter_directory, check_adapter_name, check_finite, find_adapter, save_adapter
from ..checkpoint.atomic import replace_files
from ..config import PeftConfig, PushToHubMixin
from ..tuners._adapters import set_eval
from ..tuners._injection import Snapshot
from ..utils._survey import survey_adapter
from ..utils.initial_adapter import relative_to_initial
from ..utils.offload import dispatch_again, take_hooks_off
from ..utils.save_and_load import (
    check_adapter_directory,
    get_peft_model_state_dict,
    load_adapter_weights,
    set_peft_model_state_dict,
)
from .model_card import CARD_NAME, model_card
from .saved_prompt import fitting

if TYPE_CHECKING:
    from .base import PeftModel

__all__ = ["AdapterFiles"]


class AdapterFiles(PushToHubMixin, nn.Module):
    """What PeftModel does with directories; a part of that class in a file of its own."""

    _pipeline_tag: ClassVar[str | None] = None  # of the model card
    # what it needs of PeftModel
    base_model: Any
    peft_config: dict[str, PeftConfig]
    get_base_model: Callable[[], nn.Module]
    add_adapter: Callable[..., None]
    set_requires_grad: Callable[[str], None]
    _changing_adapters: Callable[..., AbstractContextManager[None]]
    _is_prompt_learning: bool
    _prompt_configs: dict[str, Any]
    _forget_prompt: Callable[[str], None]

    # ----------------------------------------------------------------------------------------------------- saving
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: Literal["auto"] | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters in PEFT's format: "default" into the directory itself, others into sub-folders of their names.

        A kill at any moment leaves each adapter old or new, never a mix.

        Args:
            save_directory: created if needed. The model card is written there.
            safe_serialization: False writes a pickled `adapter_model.bin`.
            selected_adapters: names; None means all.
            save_embedding_layers: save the base's embeddings too; "auto": if they are targeted or were resized.
            is_main_process: False gathers the weights (sharded models) and writes nothing.
            path_initial_model_for_weight_conversion: directory that a PiSSA or OLoRA adapter was saved to before
                training; the adapter is converted to plain LoRA of twice the rank.
            kwargs: `state_dict`, the model's if it was gathered already; others are ignored.
        Raises: ValueError if the directory is a file, or for a name that is unknown or cannot be a folder's.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        if any(name not in self.peft_config for name in names):
            raise ValueError(
                "You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{list(self.peft_config)} - got {selected_adapters}."
            )
        directories = {name: adapter_directory(save_directory, name) for name in names}
        if is_main_process and "default" not in directories:
            self.create_or_update_model_card(save_directory)
        for name, directory in directories.items():
            tensors = get_peft_model_state_dict(
                self,
                state_dict=kwargs.get("state_dict"),
                adapter_name=name,
                save_embedding_layers=save_embedding_layers,
            )
            if not is_main_process:
                continue
            config = self.peft_config[name]
            if path_initial_model_for_weight_conversion is not None:
                config, tensors = relative_to_initial(config, tensors, path_initial_model_for_weight_conversion)
            card = {CARD_NAME: model_card(self, save_directory).encode()} if name == "default" else None
            save_adapter(
                directory,
                self._file_content(config),
                tensors,
                safe_serialization=safe_serialization,
                extra_files=card,
                adapter_name=name,
            )

    def _file_content(self, config: PeftConfig) -> dict[str, Any]:
        """A configuration as its file has it: for inference; the base's name, and its class if no task tells it."""
        config = copy.copy(config)
        config.inference_mode = True
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = self.get_base_model().__dict__.get("name_or_path") or None
        base = type(self.get_base_model())
        mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        return config.file_content(mapping if config.task_type is None else None)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write README.md: library, base model, tags, versions and the base's quantization; the rest is kept."""
        text = model_card(self, output_dir).encode()
        replace_files(output_dir, {CARD_NAME: lambda path: _write(path, text)})

    # ---------------------------------------------------------------------------------------------------- loading
    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter on a base model, which is changed in place.

        Args:
            model_id: a directory, or the id of a repository on the Hub.
            is_trainable: False freezes the adapter and sets the model to eval mode.
            config: used instead of the saved one.
            ephemeral_gpu_offload: not supported yet.
            low_cpu_mem_usage: make the layers without memory for the weights that are about to come.
            key_mapping: pattern -> replacement for the names in the file, without "base_model.model.".
            kwargs: subfolder, revision, token, cache_dir, ... of the Hub; torch_device, the device to read to;
                ignore_mismatched_sizes; strict, to refuse a file that lacks weights instead of warning; device_map and
                max_memory, for a base that accelerate offloads to the CPU.
        Returns: the class that the configuration's task_type says, or `cls` without one.
        Raises: ValueError for files that are missing, malformed or do not belong to the model, and for a prompt
            learning adapter with `is_trainable`, as in PEFT; RuntimeError ("size mismatch") for shapes. The model is as
            it was then.
        """
        from ..auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        if config is not None and not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {type(config)}")
        check_adapter_name(adapter_name)
        _refuse_offload(ephemeral_gpu_offload)
        directory = find_adapter(model_id, **_hub_kwargs(kwargs))
        config = PeftConfig.from_pretrained(directory) if config is None else config
        config.inference_mode = not is_trainable
        mismatched = kwargs.get("ignore_mismatched_sizes", False)
        with fitting(directory, config, model):
            check_adapter_directory(directory, config, adapter_name=adapter_name, ignore_mismatched_sizes=mismatched)
        if key_mapping is None and not config.is_prompt_learning:
            # names that a new version of the architecture gave to its modules
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        _warn_other_base(config, model, directory)
        task = str(getattr(config.task_type, "value", config.task_type))
        target: Any = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task, cls)
        offloaded = take_hooks_off(model)
        before, had_config = Snapshot(model, adapter_name), hasattr(model, "peft_config")
        wrapped: PeftModel | None = None
        try:
            with fitting(directory, config, model):
                wrapped = target(
                    model,
                    config,
                    adapter_name,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                )
            wrapped._load_weights(
                directory, adapter_name, is_trainable, autocast_adapter_dtype, low_cpu_mem_usage, key_mapping, kwargs
            )
        except BaseException:
            if wrapped is not None:
                wrapped._forget(adapter_name)
            before.restore()
            if not had_config and hasattr(model, "peft_config"):
                del model.peft_config
            if offloaded:
                dispatch_again(model, model, kwargs)
            raise
        if offloaded:
            dispatch_again(wrapped, model, kwargs)
        return wrapped

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a saved adapter as one more, inactive; an adapter of that name that is there already gets its weights.

        Arguments as in `from_pretrained`. Returns: an object with missing_keys, the adapter's keys that the file lacks,
        and unexpected_keys, []. Raises: as `from_pretrained`; the model is as it was then.
        """
        check_adapter_name(adapter_name)
        _refuse_offload(ephemeral_gpu_offload)
        directory = find_adapter(model_id, **_hub_kwargs(kwargs))
        kwargs = {**kwargs, "torch_device": torch_device}
        with self._changing_adapters(adapter_name):
            return self._load_adapter(
                directory, adapter_name, is_trainable, autocast_adapter_dtype, low_cpu_mem_usage, key_mapping, kwargs
            )

    def _load_adapter(
        self,
        directory: Path,
        adapter_name: str,
        is_trainable: bool,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        key_mapping: Mapping[str, str] | None,
        kwargs: Mapping[str, Any],
    ) -> Any:
        before, is_new = Snapshot(self.get_base_model(), adapter_name), adapter_name not in self.peft_config
        try:
            if is_new:
                config = PeftConfig.from_pretrained(directory)
                config.inference_mode = not is_trainable
                _warn_other_base(config, self.get_base_model(), directory)
                with fitting(directory, config, self.get_base_model()):
                    check_adapter_directory(
                        directory,
                        config,
                        adapter_name=adapter_name,
                        ignore_mismatched_sizes=kwargs.get("ignore_mismatched_sizes", False),
                    )
                    self._check_new_adapter_config(config, is_trainable=is_trainable)
                    self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
                if is_trainable:
                    self.set_requires_grad(adapter_name)
            loaded = self._load_weights(
                directory, adapter_name, is_trainable, autocast_adapter_dtype, low_cpu_mem_usage, key_mapping, kwargs
            )
            if not is_new and hasattr(self.base_model, "take_scaling"):
                self.base_model.take_scaling(adapter_name, PeftConfig.from_pretrained(directory))
            return loaded
        except BaseException:
            if is_new:
                self._forget(adapter_name)
                before.restore()
            raise

    def _forget(self, adapter_name: str) -> None:
        """Take a new adapter's configuration and prompt away again; `Snapshot.restore` does the rest."""
        if adapter_name in self._prompt_configs:
            self._forget_prompt(adapter_name)
        elif not self._is_prompt_learning:
            self.base_model.peft_config.pop(adapter_name, None)

    def _load_registered(self, source: Any, adapter_name: str) -> None:
        """Load what `AdapterBank.register` was given: a directory, or a configuration and a state dict.

        Raises: as `load_adapter`; ValueError for a state dict that lacks weights or has others, and for prompt
            learning. The model is as it was then.
        """
        is_directory = not isinstance(source, tuple)
        saved = PeftConfig.from_pretrained(find_adapter(source)) if is_directory else source[0]
        if saved.is_prompt_learning:
            raise ValueError(
                f"adapter {adapter_name!r} ({type(saved).__name__}) cannot be registered and read when it is needed: "
                "add it with load_adapter"
            )
        if is_directory:
            self.load_adapter(source, adapter_name)
            return
        config, tensors = source
        config = copy.copy(config)
        config.inference_mode = True
        before = Snapshot(self.get_base_model(), adapter_name)
        try:
            self.add_adapter(adapter_name, config)
            found = set_peft_model_state_dict(self, tensors, adapter_name)
            own = {slot.key for slot in survey_adapter(self, adapter_name).own.values()}
            missing = sorted(own.intersection(found.missing_keys))
            if missing or found.unexpected_keys:
                raise ValueError(
                    f"adapter {adapter_name!r}: expected exactly the weights that its configuration describes on this "
                    f"model; the state dict lacks {missing[:5]} and has {found.unexpected_keys[:5]} besides"
                )
            check_finite(dict(tensors), f"adapter {adapter_name!r}")
            set_eval(self, adapter_name)
        except BaseException:
            self._forget(adapter_name)
            before.restore()
            raise

    def _load_weights(
        self,
        directory: Path,
        adapter_name: str,
        is_trainable: bool,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        key_mapping: Mapping[str, str] | None,
        kwargs: Mapping[str, Any],
    ) -> Any:
        result = load_adapter_weights(
            self,
            directory,
            adapter_name,
            strict=kwargs.get("strict", False),
            ignore_mismatched_sizes=kwargs.get("ignore_mismatched_sizes", False),
            device=kwargs.get("torch_device"),
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
        )
        if low_cpu_mem_usage and adapter_name not in self._prompt_configs:
            # the tensors of the file took the place of meta tensors, in their own dtype
            self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not is_trainable:
            set_eval(self, adapter_name)
        return result

    def _check_new_adapter_config(self, peft_config: PeftConfig, is_trainable: bool) -> None:
        """Warn where an adapter that changed the base weights would be combined with others."""
        inits = {getattr(config, "init_lora_weights", None) for config in (peft_config, *self.peft_config.values())}
        for init, name in (("pissa", "PiSSA"), ("olora", "OLoRA")):
            if init in inits:
                warnings.warn(
                    f"{name} changes the base weights of the model and should thus not be used with other adapters. "
                    f"Consider converting the {name} adapter into a normal LoRA adapter: "
                    "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
                    stacklevel=3,
                )
                return


def _warn_other_base(config: PeftConfig, base: nn.Module, directory: Path) -> None:
    """Warn where an adapter's file names another base than the one that it is put on; a name is what its end is."""
    made_for, this = config.base_model_name_or_path, base.__dict__.get("name_or_path")
    if made_for and this and _model_name(made_for) != _model_name(this):
        warnings.warn(
            f"{directory}: this adapter was made for the base model {made_for!r}, and is loaded onto {this!r}. If "
            "these are not the same weights, it does not do what it was trained for.",
            stacklevel=3,
        )


def _model_name(path: str) -> str:
    """The last part of a repository's id or of a directory; of the Hub's cache, the repository's."""
    parts = Path(path).parts
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return (cached or [parts[-1] if parts else ""])[-1].lower()


def _hub_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that are for the download."""
    from huggingface_hub import hf_hub_download

    names = set(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename"}
    return {key: value for key, value in kwargs.items() if key in names and value is not None}


def _refuse_offload(ephemeral_gpu_offload: bool) -> None:
    if ephemeral_gpu_offload:
        raise ValueError("ephemeral_gpu_offload=True is not supported by peft_fast yet")


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
