"""PeftModel: a base model with adapters. Running, adding, switching; its files are in `files.py`."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import nn

from ..checkpoint import check_adapter_name
from ..config import PeftConfig
from ..mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from ..prompts.call import use_prompt
from ..quantized.weights import restore_all
from ..routing.bank import AdapterBank
from ..utils.other import _set_adapter, as_names
from ..utils.peft_types import PeftType
from .checkpointing import checkpoints_activations, make_inputs_require_grad
from .files import AdapterFiles
from .prompt import SWITCHING, PromptLearning
from .status import (
    TunerLayerStatus,
    TunerModelStatus,
    adapters_enabled,
    count_parameters,
    get_layer_status,
    get_model_status,
)

__all__ = ["PeftModel", "warn_if_in_prefix"]

_PROMPT_LEARNING_ONLY = ("prompt_encoder", "prompt_tokens", "transformer_backbone_name", "word_embeddings")


class PeftModel(PromptLearning, AdapterFiles):
    """A base model with adapters. Attributes that are not found here are those of `base_model`, then the base's.

    Args:
        model: the base model, changed in place.
        peft_config: the first adapter's configuration.
        adapter_name: its name; see `check_adapter_name`.
        autocast_adapter_dtype: keep adapters of fp16, bf16 and fp8 bases in fp32, for stable training.
        low_cpu_mem_usage: create the adapter on the meta device, to be loaded.
    Attributes: base_model (the tuner, such as LoraModel; with prompt learning the base model itself), peft_config (by
        adapter name), active_adapter, peft_type, modules_to_save; those of `PromptLearning`.
    Raises: ValueError for a bad name, a configuration that cannot be applied to the model or a method that is not
        supported yet; the model is as it was then.
    """

    _head_names: ClassVar[tuple[str, ...]] = ()  # trained and saved as well, where the base model has them

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self.training = model.training
        check_adapter_name(adapter_name)
        if peft_config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
            name = getattr(peft_config.peft_type, "value", peft_config.peft_type)
            raise ValueError(f"{type(peft_config).__name__} ({name}) is not supported by peft_fast yet")
        self._add_head(peft_config)
        self.active_adapter = adapter_name
        self.peft_type = PeftType(peft_config.peft_type)
        # arguments of a forward that are for the adapters, not for the base model
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._is_prompt_learning = peft_config.is_prompt_learning
        self._prompt_configs = {}
        self._fused = False
        self._adapters_disabled = False
        self._disabled_by: list[int] = []  # threads inside disable_adapter
        self._to_enable = False  # what the last of them restores
        self._flags: list[tuple[nn.Parameter, bool]] = []
        if self._is_prompt_learning:
            self.special_peft_forward_args.add("task_ids")
            self.base_model = model
            self._add_prompt(adapter_name, peft_config)
        else:
            make: Any = PEFT_TYPE_TO_TUNER_MAPPING[self.peft_type]
            self.base_model = make(
                model, {adapter_name: peft_config}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
            )
            self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if checkpoints_activations(model):
            self.prepare_model_for_gradient_checkpointing(model)
        # old Llama configs: a loop over slices of the weight that imitates tensor parallel rounding
        if hasattr(getattr(model, "config", None), "pretraining_tp"):
            model.config.pretraining_tp = 1  # type: ignore[union-attr]
        self._name_head(model)

    # ------------------------------------------------------------------------------------------------- attributes
    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter name -> configuration."""
        if self._is_prompt_learning:
            return self._prompt_configs
        configs: dict[str, PeftConfig] = self.base_model.peft_config
        return {**configs, **self._prompt_configs} if self._prompt_configs else configs

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        if self._is_prompt_learning:
            self._prompt_configs = value
        else:
            self.base_model.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that take part in a forward."""
        if self._is_prompt_learning or self._active_prompt_config is not None:
            return as_names(self.active_adapter)
        names: list[str] = self.base_model.active_adapters
        return names

    @property
    def active_peft_config(self) -> PeftConfig:
        """Configuration of the active adapter."""
        return self.peft_config[self.active_adapter]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether a forward uses an adapter: there is an active one, and `disable_adapter` is not in force."""
        return not self._adapters_disabled and bool(self.active_adapters)

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """dtype of the base model, None if it does not tell."""
        return getattr(self.base_model, "dtype", None)

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters train and save whole; None if there are none."""
        configs = self.peft_config.values()
        return {name for config in configs for name in getattr(config, "modules_to_save", None) or ()} or None

    @property
    def adapter_bank(self) -> AdapterBank:
        """The adapters for mixed batches: registered ones, limits, statistics. Raises: AttributeError for a method that
        has no bank."""
        if self._is_prompt_learning:
            raise AttributeError(f"{self.peft_type.value} has no adapter_bank: it is for LoRA")
        bank: AdapterBank = self.base_model.adapter_bank
        bank.load, bank.prefixes = self._load_registered, self._prompt_configs
        return bank

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not there yet: unpickling, or __init__ failed early
                raise
        try:
            return getattr(self.base_model, name)
        except AttributeError as error:
            if name in _PROMPT_LEARNING_ONLY:
                raise self._only_for_prompt_learning(name) from error
            raise

    def get_base_model(self) -> nn.Module:
        """The base model, with the adapters' layers in it."""
        model: nn.Module = self.base_model if self._is_prompt_learning else self.base_model.model
        return model

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type[nn.Module]:
        return type(self.get_base_model())

    # ---------------------------------------------------------------------------------------------------- running
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with the active adapters, or an adapter for each row.

        Args: those of the base model, and for LoRA and prefixes:
            adapter_names: one per row of the batch, or (LoRA) per sequence packed into one row; "__base__" for none.
            adapter_ids: the same as a tensor (rows,) int32 of ids from `adapter_slots`, -1 for none: for torch.compile
                and CUDA graphs, which are the same for all values. For LoRA.
            task_ids: (rows,) int64, for multitask prompt tuning.
        Raises: ValueError for unknown adapters, another number of them than of rows, merged adapters or training mode;
            ValueError for `alora_offsets`, which is not supported yet.
        """
        kwargs = self._without_ignored(kwargs)
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.base_model(*args, **self._for_base_model(kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate with the active adapters, or an adapter for each prompt; a prompt's beams and
        returned sequences have its adapter. Arguments for adapters and errors as in `forward`."""
        if "generation_config" in self.__dict__:  # set on this model by the user
            self.get_base_model().generation_config = self.generation_config
        kwargs = self._without_ignored(kwargs)
        with self._enable_peft_forward_hooks(*args, **kwargs):
            kwargs = self._with_room(self._for_base_model(kwargs))
            prompted = self._before_the_encoder(kwargs)
            # the encoder has its learned tokens; the forwards that follow are the decoder's
            with nullcontext() if prompted is kwargs else use_prompt(None):
                return self.get_base_model().generate(*args, **prompted)  # type: ignore[operator]

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; for training, 4-bit weights that inference packed are unpacked."""
        super().train(mode)
        if mode:
            restore_all(self)
        return self

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if self._is_prompt_learning:
            with self._prompts_of(args, kwargs):
                yield
            return
        if self._names_adapters(kwargs) and self._is_disabled_here():  # PEFT's rule
            kwargs = {**kwargs, "adapter_names": None, "adapter_ids": None}
        prompt, beside = self._prompts_beside(kwargs)
        with (
            self.base_model._enable_peft_forward_hooks(*args, beside=beside, **kwargs),
            use_prompt(prompt),
        ):
            yield

    def _is_disabled_here(self) -> bool:
        """Whether this thread's calls run without adapters; those of other threads say themselves what they want."""
        if self._disabled_by:
            return threading.get_ident() in self._disabled_by
        if torch.compiler.is_compiling() or not self._has_bank:
            return False
        layers = self.adapter_bank.layers  # all are switched together
        return bool(layers) and layers[0].disable_adapters

    @property
    def _has_bank(self) -> bool:
        return not self._is_prompt_learning and hasattr(type(self.base_model), "adapter_bank")

    @staticmethod
    def _names_adapters(kwargs: Mapping[str, Any]) -> bool:
        return kwargs.get("adapter_names") is not None or kwargs.get("adapter_ids") is not None

    def _for_base_model(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        ours = {*self.special_peft_forward_args, "adapter_ids"}
        return {key: value for key, value in kwargs.items() if key not in ours}

    def _with_tasks(self, task_ids: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A task class's arguments; `task_ids` is for methods that have tasks, and dropped for others."""
        return {**kwargs, "task_ids": task_ids} if "task_ids" in self.special_peft_forward_args else kwargs

    def _returns_dict(self, return_dict: bool | None) -> bool:
        return getattr(getattr(self, "config", None), "return_dict", True) if return_dict is None else return_dict

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Make the embeddings' output require grad: reentrant checkpointing gives no gradient where no input needs one.

        Quantized models are left to `prepare_model_for_kbit_training`.
        """
        make_inputs_require_grad(model)

    # ------------------------------------------------------------------------------------------- adapters: change
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a new adapter, frozen and inactive; `set_adapter` activates it. Arguments as in the class.

        Raises: ValueError if the name is bad or taken, the method another one than the model's, or the configuration
            cannot be applied; the model is as it was then.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        warn_if_in_prefix(adapter_name, peft_config)
        beside = self.peft_type == PeftType.LORA and peft_config.peft_type == PeftType.PREFIX_TUNING
        if peft_config.peft_type != self.peft_type and not beside:
            raise ValueError(
                "Cannot combine adapters with different peft types. "
                f"Found {self.peft_type} and {peft_config.peft_type}."
            )
        if beside and adapter_name in self.adapter_bank.registered():
            raise ValueError(f"Adapter with name '{adapter_name}' already exists: it is registered in adapter_bank.")
        self._add_head(peft_config)
        if peft_config.is_prompt_learning:
            self._add_prompt(adapter_name, peft_config)
            return
        with self._changing_adapters(adapter_name):
            configs: dict[str, PeftConfig] = self.base_model.peft_config
            configs[adapter_name] = peft_config
            try:
                self.base_model.inject_adapter(self.get_base_model(), adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
            except BaseException:
                configs.pop(adapter_name, None)
                raise
            self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was active another one becomes active, with a warning. Waits for mixed batches of
        other threads that use it.

        Raises: ValueError for an unknown name, or one whose slot id is handed out; RuntimeError if this thread's own
            call uses it.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        if adapter_name in self._prompt_configs:
            self._delete_prompt(adapter_name)
            return
        with self._changing_adapters(adapter_name):
            self.base_model.delete_adapter(adapter_name=adapter_name)
            if len(self.active_adapters) == 1:
                self.active_adapter = self.active_adapters[0]
            if self._has_bank:
                self.adapter_bank.forget(adapter_name)

    @contextmanager
    def _changing_adapters(self, adapter_name: str) -> Iterator[None]:
        """One change at a time, and not while a mixed batch uses the adapter.

        Python's cycle collector rests: an adapter is thousands of objects that all stay, and looking through those of
        the other adapters again and again takes longer than making it.
        """
        with ExitStack() as stack:
            if self._has_bank:
                # the wait comes first: calls that are waited for may have to read other adapters
                stack.enter_context(self.adapter_bank.alone(adapter_name))
                stack.enter_context(self.adapter_bank.changing)
            if gc.isenabled():
                gc.disable()
                stack.callback(gc.enable)
            yield

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Activate one adapter, trainable unless `inference_mode`; those active until now are frozen.

        `base_model.set_adapter` takes several. Raises: ValueError for an unknown name.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} not found.")
        if self._is_prompt_learning:
            _set_adapter(self.base_model, adapter_name, inference_mode=inference_mode)
        elif adapter_name in self._prompt_configs:  # of LoRA's adapters none is active then
            self.base_model.set_adapter([], inference_mode=inference_mode)
            _set_adapter(self.base_model, adapter_name, inference_mode=inference_mode)
            self._train_prompt(None if inference_mode else adapter_name)
        else:
            self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)
            self._train_prompt(None)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make these adapters trainable or frozen, whether or not they are active.

        Raises: TypeError with prompt learning, as in PEFT.
        """
        if self._is_prompt_learning:
            raise TypeError(
                f"Setting `requires_grad` is not supported for prompt learning methods like {self.peft_type.value}."
            )
        self.base_model.set_requires_grad(adapter_names=adapter_names, requires_grad=requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base model alone inside the `with`; after it everything is as before, requires_grad included.

        Warns if only some layers were enabled: all are afterwards.
        """
        if self._is_prompt_learning:
            with self._without_prompts():
                yield
            return
        enabled = adapters_enabled(self.base_model)
        if enabled == "irregular":
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. This is most "
                "likely unintentional. After exiting the disable_adapter context, all adapters will be enabled",
                stacklevel=3,
            )
        # of several threads the first to come switches off and the last to leave switches on
        with SWITCHING:
            if not self._disabled_by:
                self._to_enable = enabled is not False
                self._flags = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
            self._disabled_by.append(threading.get_ident())
        try:
            with SWITCHING:
                self.base_model.disable_adapter_layers()
                self._adapters_disabled = True
            yield
        finally:
            with SWITCHING:
                if len(self._disabled_by) == 1:
                    self._switch_on()
                # last: until then other threads' calls know why the layers are switched off
                self._disabled_by.remove(threading.get_ident())

    def _switch_on(self) -> None:
        flags, self._flags = self._flags, []
        if self._to_enable:
            self.base_model.enable_adapter_layers()
            for parameter, requires_grad in flags:
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
        self._adapters_disabled = False

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter can be converted to LoRA."""
        supports = None if self._is_prompt_learning else getattr(self.base_model, "supports_lora_conversion", None)
        return bool(supports is not None and supports())

    def _add_head(self, peft_config: PeftConfig) -> None:
        """Make the task's head part of what the adapter trains and saves."""
        if self._head_names and hasattr(peft_config, "modules_to_save"):
            given = list(peft_config.modules_to_save or ())
            peft_config.modules_to_save = [*given, *(name for name in self._head_names if name not in given)]

    def _name_head(self, model: nn.Module) -> None:
        """Set `cls_layer_name` to the child of the base model that is its head, if it has one."""
        for name, _ in model.named_children():
            if self._head_names and any(head in name for head in self.modules_to_save or ()):
                self.cls_layer_name = name
                return

    # ------------------------------------------------------------------------------------------ adapters: look at
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(number of trainable parameters, number of all)."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters, of all, and their ratio in per cent."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The status of each adapter layer."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The status of all adapter layers together; "irregular" where they differ."""
        return get_model_status(self)


def warn_if_in_prefix(adapter_name: str, peft_config: PeftConfig) -> None:
    """Warn of names that can be mistaken for a part of a parameter's name, as PEFT does."""
    peft_type: Any = peft_config.peft_type
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(peft_type)
    if prefix and adapter_name in prefix:
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. "
            "This may lead to reinitialization of the adapter weights during loading.",
            stacklevel=3,
        )
