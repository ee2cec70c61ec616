"""LoraConfig: PEFT 0.21.2's fields and defaults."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ...checkpoint import check_config
from ...config import PeftConfig
from ...utils.peft_types import PeftType

__all__ = ["LoraConfig", "LoraRuntimeConfig"]

# Fields of PEFT whose feature is not here yet: accepted at their default, refused otherwise, never ignored.
NOT_SUPPORTED_YET = (
    "megatron_config",
    "trainable_token_indices",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "use_dora",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "ensure_weight_tying",
)
_INITS = re.compile(r"gaussian|olora|pissa|pissa_niter_\d{1,4}", re.IGNORECASE)
_INITS_OF_PEFT = ("eva", "corda", "loftq", "orthogonal", "mica", "lora_ga")


@dataclass
class LoraRuntimeConfig:
    """Settings that hold for a process and are never saved.

    Args:
        ephemeral_gpu_offload: not supported by peft_fast yet.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(PeftConfig):
    """Configuration of LoRA: y = base(x) + scaling * dropout(x) @ A.T @ B.T, scaling = lora_alpha / r.

    Args:
        r: rank, a positive integer.
        target_modules: names of the modules to adapt (whole, or after a dot), a regular expression that matches the
            whole name, "all-linear", or None: by the model's type.
        exclude_modules: as target_modules, to leave out.
        lora_alpha: see scaling.
        lora_dropout: probability that an element of x is dropped on the low-rank path.
        fan_in_fan_out: the target stores its weight (in, out), as transformers' Conv1D.
        bias: "none", "all" or "lora_only": which biases of the base model are trained and saved.
        use_rslora: scaling = lora_alpha / sqrt(r).
        modules_to_save: further modules to train and save whole, such as a new head.
        init_lora_weights: True (A as in PEFT, B zero), False (both random), "gaussian", "olora", "pissa" or
            "pissa_niter_<n>"; olora and pissa change the base weights.
        layers_to_transform, layers_pattern: adapt only these layers of the list of that name.
        rank_pattern, alpha_pattern: r and lora_alpha for modules whose name matches a pattern.
        lora_bias: lora_B has a bias.
        Others: features of PEFT that peft_fast does not have yet; they must stay at their default.
    Raises: ValueError for a value out of range, for options that exclude each other and for a feature that is not
        supported yet, naming the field; NotImplementedError (as PEFT) for an unknown bias; TypeError for names that
        are no strings.
    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    r: int = 8
    target_modules: Any = None  # list[str] | str | None; a list becomes a set
    exclude_modules: Any = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        self.target_modules = _names("target_modules", self.target_modules)
        self.exclude_modules = _names("exclude_modules", self.exclude_modules)
        self._refuse_what_is_missing()
        check_config(self, "LoraConfig")
        if self.bias not in ("none", "all", "lora_only"):
            raise NotImplementedError(f"LoraConfig(bias={self.bias!r}): expected 'none', 'all' or 'lora_only'")
        self._check_layers()
        self._check_init()

    def to_dict(self) -> dict[str, Any]:
        """The fields that belong into a file: all but `runtime_config`."""
        values = super().to_dict()
        del values["runtime_config"]
        return values

    def _refuse_what_is_missing(self) -> None:
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        for spec in fields(self):
            if spec.name not in NOT_SUPPORTED_YET:
                continue
            value = getattr(self, spec.name)
            default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
            if value != default and (value or default):  # PEFT takes any empty value for the default
                raise ValueError(f"LoraConfig({spec.name}={value!r}) is not supported by peft_fast yet")
        if self.runtime_config.ephemeral_gpu_offload:
            raise ValueError("ephemeral_gpu_offload=True is not supported by peft_fast yet")

    def _check_layers(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def _check_init(self) -> None:
        init = self.init_lora_weights
        known = isinstance(init, bool) or (isinstance(init, str) and _INITS.fullmatch(init) is not None)
        if not known and isinstance(init, str) and init.lower().startswith(_INITS_OF_PEFT):
            raise ValueError(f"LoraConfig(init_lora_weights={init!r}) is not supported by peft_fast yet")
        if not known:
            raise ValueError(
                f"Unknown initialization init_lora_weights={init!r}: expected True, False, 'gaussian', 'olora', "
                "'pissa' or 'pissa_niter_<number of iterations>'"
            )
        if self.lora_bias and not isinstance(init, bool):
            raise ValueError(
                "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                f"init_lora_weights={init} instead."
            )
        changes_base = isinstance(init, str) and init.lower() != "gaussian"
        if changes_base and self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            warnings.warn(
                f"With use_rslora and a rank_pattern or alpha_pattern, an adapter initialised with {init!r} cannot be "
                "converted to plain LoRA by save_pretrained(path_initial_model_for_weight_conversion=...).",
                stacklevel=4,
            )


def _names(name: str, value: Any) -> Any:
    """A list of names as a set, the way PEFT keeps it; a string or None unchanged."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Collection) or isinstance(value, dict) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"LoraConfig({name}=...) must be a list of strings, a string or None, got {value!r}")
    return set(value) if isinstance(value, list) else value
