"""What a model's own adapted layers need measured, and with what: its own weights."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..quantized import weights as quant
from ..tuners.lora.base import is_transformers_conv1d
from ..tuners.lora.layer import Linear
from ..utils import PeftType
from .shapes import Shapes, Site, power_of_2, rank_bucket

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class AdaptedSite:
    """Layers of a model that are alike: how many, the last part of their names, and their bases."""

    kind: str  # "plain", "4bit", "8bit"
    N: int
    K: int
    R: int
    dropout: bool
    names: list[str] = field(default_factory=list)
    bases: list[Any] = field(default_factory=list)


def sites_of(model: nn.Module) -> list[AdaptedSite]:
    """The linear layers with LoRA, those that are alike together; of ranks that kernels treat alike the largest."""
    found: dict[tuple[Any, ...], AdaptedSite] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear) or (kind := _kind(layer.get_base_layer())) is None:
            continue
        N, K = layer.out_features, layer.in_features
        for adapter, R in layer.r.items():
            dropout = bool(getattr(layer.lora_dropout[adapter], "p", 0.0))
            key = (kind, N, K, rank_bucket(R), dropout)
            site = found.setdefault(key, AdaptedSite(kind, N, K, R, dropout))
            site.R = max(site.R, R)
            if name not in site.names:
                site.names.append(name)
                site.bases.append(layer.get_base_layer())
    return list(found.values())


def shapes_of(model: nn.Module, tokens: Sequence[int]) -> Shapes:
    """What is worth a row for this model and these numbers of rows (tokens of a call)."""
    sites = sites_of(model)

    def of(kind: str) -> tuple[Site, ...]:
        return tuple(dict.fromkeys((site.N, site.K, site.R) for site in sites if site.kind == kind))

    heads = _heads(model)
    return Shapes(
        tokens=tuple(sorted({power_of_2(M) for M in tokens})),
        plain=of("plain"), four_bit=of("4bit"), int8=of("8bit"), dropout=any(site.dropout for site in sites),
        head_sizes=() if heads is None else (heads[2],),
        heads=(32, 8) if heads is None else heads[:2],
    )  # fmt: skip


def own_weights(model: nn.Module) -> dict[tuple[str, int, int], Iterator[Any]]:
    """For ``Setting.own``: no copy is made, and the layers of a model overflow the cache as they do when it runs."""
    bases: dict[tuple[str, int, int], list[Any]] = {}
    for site in sites_of(model):
        known = bases.setdefault((site.kind, site.N, site.K), [])
        known += [base for base in site.bases if all(base is not other for other in known)]
    return {
        key: itertools.cycle([_weight(base) if key[0] == "plain" else base for base in layers])
        for key, layers in bases.items()
    }


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the rows that the adapted layers see: that of most of their weights, and of a 4-bit base what it computes in.

    Of a model without them, and of int8 bases, that of most of its other weights.
    """
    counts: Counter[torch.dtype] = Counter()
    for site in sites_of(model):
        for base in site.bases:
            if site.kind == "plain":
                counts[base.weight.dtype] += 1
            elif site.kind == "4bit" and base.compute_dtype is not None:
                counts[base.compute_dtype] += 1
    if not counts:
        quantized = {id(base.weight) for site in sites_of(model) for base in site.bases}
        for name, parameter in model.named_parameters():
            if parameter.dtype in _KERNEL_DTYPES and "lora_" not in name and id(parameter) not in quantized:
                counts[parameter.dtype] += parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def device_of(model: nn.Module) -> torch.device:
    """The one device of all weights.    Raises: ValueError if there are several."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"tune: expected a model on one device, got one on {names}: tune it on one GPU of the same kind"
        )
    return devices.pop() if devices else torch.device("cpu")


def adapter_dtype_of(model: nn.Module) -> torch.dtype | None:
    """Of A and B; None where there is no LoRA."""
    return next((p.dtype for name, p in model.named_parameters() if "lora_A" in name), None)


def _kind(base: nn.Module) -> str | None:
    """None: a base that is called as a module, so that no table is asked."""
    quantized = quant.kind_of(base)
    if quantized is not None:
        return {"bnb 4bit": "4bit", "bnb 8bit": "8bit"}.get(quantized)
    weight = getattr(base, "weight", None)
    usable = isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.dtype in _KERNEL_DTYPES
    return "plain" if usable else None


def _weight(base: Any) -> torch.Tensor:
    """(N, K); transformers' Conv1D keeps (K, N)."""
    weight: torch.Tensor = base.weight.detach()
    return weight.T if is_transformers_conv1d(base) else weight


def _heads(model: Any) -> tuple[int, int, int] | None:
    """Heads of queries, of keys and values, and their size, of a model with a prefix; else None."""
    configs = getattr(model, "peft_config", {}).values()
    if not any(config.peft_type == PeftType.PREFIX_TUNING for config in configs):
        return None
    config = model.get_base_model().config.get_text_config(decoder=True)
    queries: int = config.num_attention_heads
    keys: int = getattr(config, "num_key_value_heads", None) or queries
    return queries, keys, getattr(config, "head_dim", None) or config.hidden_size // queries
