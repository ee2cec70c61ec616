"""Prompt learning: the part of PeftModel that makes, runs and removes learned tokens and prefixes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from ..prompts.attention import (
    DoesNotFit,
    PrefixCall,
    check_positions,
    filled_cache,
    fit_sizes,
    give_back,
    install,
    prefix_layers,
)
from ..prompts.call import PromptCall, acquire, current_prompt, use_prompt
from ..prompts.soft_prompts import SoftPromptCall, before_the_encoder
from ..routing.batch import BASE, MixedBatch, check_names, number_of_rows, use, wrong_length
from ..utils.other import (
    AuxiliaryTrainingWrapper,
    _prepare_prompt_learning_config,
    adapter_modules,
    set_additional_trainable_modules,
    walk,
)
from ..utils.peft_types import PeftType

__all__ = ["SWITCHING", "PromptLearning"]

SWITCHING = threading.RLock()  # while adapters are switched off or on; a model cannot have a lock of its own
_WITHOUT_TOKEN_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")


class PromptLearning(nn.Module):
    """What PeftModel does with prompt learning; a part of that class in a file of its own.

    Attributes: prompt_encoder, adapter name -> encoder; prompt_tokens, adapter name -> indices of its virtual tokens;
        word_embeddings; transformer_backbone_name. They exist with prompt learning only.
    """

    _task: ClassVar[str] = ""  # the value of TaskType that the class is for
    # what it needs of PeftModel
    base_model: Any
    active_adapter: Any
    peft_config: Any  # a property
    get_base_model: Callable[[], nn.Module]
    prompt_encoder: nn.ModuleDict
    prompt_tokens: dict[str, Tensor]
    word_embeddings: nn.Module | None
    _is_prompt_learning: bool  # the model's method is prompt learning: `base_model` is no tuner
    _prompt_configs: dict[str, Any]
    peft_type: PeftType
    _disabled_by: list[int]
    _adapters_disabled: bool
    _fused: bool  # the base's attention reads prefixes

    @property
    def _active_prompt_config(self) -> Any:
        """The active adapter's configuration, None if it is none of prompt learning."""
        return self._prompt_configs.get(self.active_adapter) if isinstance(self.active_adapter, str) else None

    # ----------------------------------------------------------------------------------------------------- changing
    def _add_prompt(self, adapter_name: str, peft_config: Any) -> None:
        """Make an adapter's encoder, and copies of the modules that it trains whole.

        Raises: ValueError for a configuration that does not fit the base model, TypeError for one of another class; the
            base model is as it was then.
        """
        base, config = self.get_base_model(), peft_config
        expected: Any = PEFT_TYPE_TO_CONFIG_MAPPING[peft_config.peft_type]
        if not isinstance(peft_config, expected):
            name = PeftType(peft_config.peft_type).value
            raise TypeError(f"{name} needs a {expected.__name__}, got {type(peft_config).__name__}")
        is_first = not self._prompt_configs
        given = {name for name, value in vars(peft_config).items() if value is not None}
        if is_first:
            acquire(base)
        self._prompt_configs[adapter_name] = peft_config
        try:
            _prepare_prompt_learning_config(config, getattr(base, "config", {}))
            self._make_encoder(adapter_name, peft_config, base, given)
            set_additional_trainable_modules(
                base, peft_config, getattr(base, "config", None), adapter_name, self._is_prompt_learning and is_first
            )
        except BaseException:
            self._forget_prompt(adapter_name)
            raise

    def _make_encoder(self, adapter_name: str, config: Any, base: nn.Module, given: Container[str]) -> None:
        if self._is_prompt_learning:  # a tuner has frozen its base itself
            for site in walk(base, "base"):
                for parameter in site.module._parameters.values():
                    if parameter is not None:
                        parameter.requires_grad_(False)
        if config.num_transformer_submodules is None:
            config.num_transformer_submodules = 2 if config.task_type == "SEQ_2_SEQ_LM" else 1
        make: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        if "prompt_encoder" not in self._modules:
            self.prompt_encoder = nn.ModuleDict()
            self.prompt_encoder.training = self.training
            self.prompt_tokens = {}
        if self._is_prompt_learning:
            self._find_embeddings(base)
        if config.peft_type == PeftType.PREFIX_TUNING:
            fit_sizes(base, config, given)
            check_positions(base, config.num_virtual_tokens, 1)
            self._fused = install(base)
            encoder = make(config)
        else:
            weight = getattr(self.word_embeddings, "weight", None)
            if weight is not None and config.token_dim != weight.shape[1]:  # where the embedding is factorized
                if "token_dim" in given:
                    raise DoesNotFit(
                        f"Learned tokens do not fit the embedding of {type(base).__name__}",
                        f"expected token_dim={weight.shape[1]}, got {config.token_dim}",
                    )
                config.token_dim = weight.shape[1]
            encoder = make(config) if config.peft_type == PeftType.P_TUNING else make(config, self.word_embeddings)
        device = next((parameter.device for parameter in base.parameters()), torch.device("cpu"))
        self.prompt_encoder[adapter_name] = encoder.to(device).train(self.prompt_encoder.training)
        if not self._is_prompt_learning:  # as adapters beside it: trainable while it is active
            encoder.requires_grad_(False)
        self.prompt_tokens[adapter_name] = torch.arange(config.num_virtual_tokens * config.num_transformer_submodules)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take PEFT's state dicts, which have the base's embedding a second time: files cannot hold that."""
        state_dict.pop(f"{prefix}word_embeddings.weight", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _find_embeddings(self, base: nn.Module) -> None:
        """Set `word_embeddings` and `transformer_backbone_name` as PEFT does: by name, or the vocabulary's size."""
        self.__dict__["word_embeddings"] = None
        from transformers import PreTrainedModel

        backbone = base
        for name, child in base.named_children():
            if isinstance(child, PreTrainedModel):
                backbone, self.transformer_backbone_name = child, name
                break
        try:
            self.__dict__["word_embeddings"] = base.get_submodule("embeddings.word_embeddings")
        except AttributeError:
            config: Any = getattr(base, "config", None)
            config = config.get_text_config() if hasattr(config, "get_text_config") else config
            size = getattr(config, "vocab_size", None)
            for name, parameter in backbone.named_parameters():
                shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 has the sizes of the whole there
                if size is not None and shape and shape[0] == size:
                    self.__dict__["word_embeddings"] = backbone.get_submodule(name.removesuffix(".weight"))
                    break

    def _forget_prompt(self, adapter_name: str) -> None:
        """Remove an adapter's encoder and copies; with the last one, what the base model was given."""
        base = self.get_base_model()
        del self._prompt_configs[adapter_name]
        if "prompt_encoder" in self._modules and adapter_name in self.prompt_encoder:
            del self.prompt_encoder[adapter_name], self.prompt_tokens[adapter_name]
        left: list[str] = list(self._prompt_configs if self._is_prompt_learning else self.active_adapters)  # type: ignore[arg-type]
        for module in adapter_modules(base):
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.delete_adapter(adapter_name, left[:1])
        if not self._prompt_configs:
            give_back(base)

    def _delete_prompt(self, adapter_name: str) -> None:
        was_active = self.active_adapter == adapter_name
        self._forget_prompt(adapter_name)
        if not was_active:
            return
        left = list(self.peft_config)
        if left:
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.",
                stacklevel=3,
            )
            self.set_adapter(left[0])  # type: ignore[operator]
        else:
            self.active_adapter = []

    def unload(self) -> nn.Module:
        """The base model as it was, without adapters; modules that adapters trained whole are the original ones."""
        base = self.get_base_model()
        if not self._is_prompt_learning:
            self.base_model.unload()
        else:
            for site in list(walk(base, "base")):
                if isinstance(site.module, AuxiliaryTrainingWrapper) and site.parent is not None:
                    setattr(site.parent, site.child_name, site.module.original_module)
            give_back(base)
        self._prompt_configs.clear()
        return base

    # ------------------------------------------------------------------------------------------------------ running
    def _prompts_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """What a call of a model without a tuner enters: its prompt, and its rows' heads.

        Raises: ValueError for unknown adapters, another number of them than of rows, or a method that has no mixed
            batches.
        """
        if threading.get_ident() in self._disabled_by:
            return use_prompt(None)
        names = kwargs.get("adapter_names")
        if kwargs.get("adapter_ids") is not None:
            raise ValueError("adapter_ids are for LoRA; name the prefix of each row with adapter_names")
        if names is None:
            return _entered(self._prompt_call(kwargs.get("task_ids")), None)
        if self.peft_type != PeftType.PREFIX_TUNING:
            raise ValueError(
                f"adapter_names: {self.peft_type.value} has no mixed batches; activate one adapter with set_adapter"
            )
        check_names(names)
        rows = number_of_rows(args, kwargs)
        if rows is not None and rows != len(names):
            raise wrong_length(len(names), rows)
        unknown = sorted({*names} - {BASE, *self._prompt_configs})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        return _entered(self._prefix_call(names), MixedBatch(names=names))

    def _prompt_call(self, task_ids: Tensor | None = None) -> PromptCall | None:
        """The prompt of the active adapter, None if that is none of prompt learning."""
        config = self._active_prompt_config
        if config is None:
            return None
        if config.peft_type == PeftType.PREFIX_TUNING:
            return self._prefix_call(None)
        if self.word_embeddings is None:
            raise ValueError(f"{type(self.get_base_model()).__name__} has no embeddings of words that could be found")
        is_multitask = config.peft_type == PeftType.MULTITASK_PROMPT_TUNING
        return SoftPromptCall(
            self.get_base_model(),
            self.word_embeddings,
            self._soft_prompts(config, task_ids),
            config.num_virtual_tokens,
            self._task or str(getattr(config.task_type, "value", config.task_type)),
            in_decoder=is_multitask and config.num_transformer_submodules == 2,
        )

    def _soft_prompts(self, config: Any, task_ids: Tensor | None) -> Tensor:
        """(1, P, D), or (rows, P, D) with tasks. Raises: ValueError if tasks are missing."""
        encoder: Any = self.prompt_encoder[self.active_adapter]
        weight = encoder.embedding.weight
        tokens = self.prompt_tokens[self.active_adapter].to(weight.device)[None]
        if config.peft_type == PeftType.MULTITASK_PROMPT_TUNING:
            if task_ids is None:
                raise ValueError(
                    f"task_ids cannot be None: adapter {self.active_adapter!r} needs task_ids=(rows,) int64, each in "
                    f"[0, {config.num_tasks})"
                )
            task_ids = task_ids.to(weight.device)
            prompts: Tensor = encoder(tokens.expand(task_ids.shape[0], -1), task_ids)
            return prompts
        prompts = encoder(tokens) if encoder.is_reparameterized else weight[None]
        return prompts

    def _prefix_call(self, names: Sequence[str] | None) -> PrefixCall | None:
        """The prefixes of a call: the active one, or one for each row; None if no row has one."""
        used = [
            n for n in dict.fromkeys([self.active_adapter] if names is None else names) if n in self._prompt_configs
        ]
        if not used:
            return None
        base, configs = self.get_base_model(), [self._prompt_configs[name] for name in used]
        return PrefixCall(
            base,
            prefix_layers([self.prompt_encoder[name] for name in used], configs, base),
            configs[0].num_layers,
            [config.num_virtual_tokens for config in configs],
            None if names is None else [used.index(name) if name in used else -1 for name in names],
            self._fused,
        )

    def _prompts_beside(self, kwargs: Mapping[str, Any]) -> tuple[PromptCall | None, frozenset[str]]:
        """(prompt, names of the adapters that are no tuner's) of a call of a model with a tuner.

        Raises: ValueError for ids where prefixes are meant.
        """
        if not self._prompt_configs or threading.get_ident() in self._disabled_by:
            return None, frozenset()
        names = kwargs.get("adapter_names")
        if names is None:
            return (self._prompt_call() if kwargs.get("adapter_ids") is None else None), frozenset()
        return self._prefix_call(names), frozenset(self._prompt_configs)

    def _train_prompt(self, adapter_name: str | None) -> None:
        """Beside a tuner: make one adapter's encoder trainable, and freeze the others."""
        if self._prompt_configs:
            for name, encoder in self.prompt_encoder.items():
                encoder.requires_grad_(name == adapter_name)

    @contextmanager
    def _without_prompts(self) -> Iterator[None]:
        """The base model alone, its original heads included, for this thread."""
        with SWITCHING:
            self._disabled_by.append(threading.get_ident())
            self._adapters_disabled = True
        try:
            with use_prompt(None), use(MixedBatch(names=[BASE])):
                yield
        finally:
            with SWITCHING:
                self._disabled_by.remove(threading.get_ident())
                self._adapters_disabled = bool(self._disabled_by)

    def _without_ignored(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments without those that PEFT's prompt learning ignores, with its warnings."""
        kwargs = dict(kwargs)
        config = self._active_prompt_config
        if config is None or threading.get_ident() in self._disabled_by:
            return kwargs
        if config.peft_type != PeftType.PREFIX_TUNING and kwargs.get("position_ids") is not None:
            warnings.warn(
                "Position ids are not supported for parameter efficient tuning. Ignoring position ids.", stacklevel=4
            )
            del kwargs["position_ids"]
        if self._task in _WITHOUT_TOKEN_TYPES and kwargs.get("token_type_ids") is not None:
            warnings.warn(
                "Token type ids are not supported for parameter efficient tuning. Ignoring token type ids", stacklevel=4
            )
            del kwargs["token_type_ids"]
        return kwargs

    def _with_room(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A generate's arguments with a cache that grows, where the prompt goes into the cache."""
        call = current_prompt()
        in_cache = isinstance(call, SoftPromptCall) and self._task != "SEQ_2_SEQ_LM"
        if isinstance(call, PrefixCall):
            in_cache = call.in_cache(kwargs)
        config = kwargs.get("generation_config") or getattr(self.get_base_model(), "generation_config", None)
        kind = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
        if not in_cache or "static" not in (kind or ""):
            return kwargs
        warnings.warn(
            f"cache_implementation={kind!r} has no room for a prompt that goes into the cache: learned tokens, or a "
            "prefix where peft_fast does not know the architecture, with output_attentions or under FlexAttention. "
            "Using a dynamic cache.",
            stacklevel=3,
        )
        return {**kwargs, "cache_implementation": "dynamic"}

    def _before_the_encoder(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A sequence-to-sequence generate's arguments with learned tokens; others are returned as they are.

        Raises: ValueError without input_ids.
        """
        call = current_prompt()
        if self._task != "SEQ_2_SEQ_LM" or not self._is_prompt_learning:
            return kwargs
        if kwargs.get("input_ids") is None:
            raise ValueError("input_ids must be provided for Peft model generation")
        if not isinstance(call, SoftPromptCall):
            return kwargs
        if kwargs.pop("encoder_outputs", None) is not None:
            warnings.warn(
                "`encoder_outputs` should not be passed to `generate` when using prompt tuning. Ignoring it.",
                stacklevel=3,
            )
        return before_the_encoder(call, kwargs)

    # ------------------------------------------------------------------------------------------------------ looking
    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """What the active adapter has learned, for `batch_size` rows, in PEFT's form.

        Args:
            task_ids: (batch_size,) int64, for multitask prompt tuning. max_cache_len: not used; PEFT has it.
        Returns: a cache with the prefix, expanded (calls of this model need none: their attention reads the prefix
            itself); otherwise (batch_size, tokens, width).
        Raises: AttributeError, unless the adapter is one of prompt learning; ValueError if tasks are missing.
        """
        config = self._active_prompt_config
        if config is None:
            raise self._only_for_prompt_learning("get_prompt")
        if config.peft_type == PeftType.PREFIX_TUNING:
            call: Any = self._prefix_call(None)
            return filled_cache(call, batch_size)
        prompts = self._soft_prompts(config, task_ids)
        return prompts if prompts.shape[0] == batch_size else prompts.repeat(batch_size, 1, 1)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """What an adapter has learned as its file has it: (tokens, width), on the CPU, any network evaluated.

        Raises: AttributeError, unless the adapter is one of prompt learning.
        """
        if adapter_name not in self._prompt_configs:
            raise self._only_for_prompt_learning("get_prompt_embedding_to_save")
        encoder: Any = self.prompt_encoder[adapter_name]
        embeddings: Tensor = encoder.prompt_embeddings().cpu()
        return embeddings

    def _only_for_prompt_learning(self, name: str) -> AttributeError:
        return AttributeError(
            f"{type(self).__name__} has no {name!r}: it belongs to prompt learning, and the adapters of this model are "
            f"{self.peft_type.value}"
        )


@contextmanager
def _entered(call: PromptCall | None, batch: MixedBatch | None) -> Iterator[None]:
    with use_prompt(call), use(batch):
        yield
