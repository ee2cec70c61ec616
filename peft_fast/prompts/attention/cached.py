"""A prefix through the cache: for architectures that compute attention by themselves, for attention weights, and under
FlexAttention.

As PEFT does it: the prefix is expanded over the rows and stands in the cache before the text, whose mask and positions
make room for it. Rows with a shorter prefix, or none, have masked slots before it.
"""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...ops.operators import PREFIX_VARIABLE
from .families import FAMILIES, model_type
from .table import checkpoints

if TYPE_CHECKING:
    from .prefix import PrefixCall, Rows


def cached_tokens(cache: Any) -> Any:
    """Number of tokens in a cache, an int or (static caches) a tensor; 0 without one."""
    return 0 if cache is None else cache.get_seq_length()


def under_flex(base: nn.Module) -> bool:
    """Whether the base runs FlexAttention, whose mask only its own function can read."""
    return getattr(getattr(base, "config", None), "_attn_implementation", None) == "flex_attention"


def cache_target(base: nn.Module) -> nn.Module:
    """The module whose forward takes the cache: the base model, else what its head stands on, as in PEFT.

    Raises: ValueError if neither does.
    """
    from transformers import PreTrainedModel

    backbones: list[nn.Module] = [child for child in base.children() if isinstance(child, PreTrainedModel)]
    for module in [base, *backbones]:
        if "past_key_values" in inspect.signature(module.forward).parameters:
            return module
    raise ValueError(
        f"{type(base).__name__}: Model does not support past key values which are required for prefix tuning, and "
        "peft_fast does not know where its attention is. Use another method, such as LoRA or prompt tuning"
    )


def through_cache(call: PrefixCall, kwargs: dict[str, Any], inputs: Tensor, rows: Rows, past: Any) -> dict[str, Any]:
    """The forward's arguments with the prefix in the cache; a cache that has tokens has the prefix already.

    Raises: ValueError for masks and caches that cannot make room, and where the kernel is forced that would need none.
    """
    name = type(call.base).__name__
    if not call.fused and os.environ.get(PREFIX_VARIABLE) == "kernel":
        raise ValueError(
            f"{PREFIX_VARIABLE}=kernel: peft_fast does not know where {name} computes attention, so its prefix goes "
            f"through the cache. Unset {PREFIX_VARIABLE}"
        )
    if kwargs.get("use_cache") is False:  # whatever a forward before this one left there
        kwargs["past_key_values"], past = None, 0
    if call.base.training and checkpoints(call.base):
        raise ValueError(
            f"{name} drops its cache under gradient checkpointing, and its prefix goes through the cache: attention "
            "weights or FlexAttention are asked for, or peft_fast does not know the architecture. Train without "
            "gradient checkpointing"
        )
    cache = kwargs.get("past_key_values")
    if getattr(cache, "is_compileable", False) and not _grows(cache):
        raise ValueError(
            f"{name} cannot have its prefix in a static cache, through which it goes where attention weights or "
            "FlexAttention are asked for, and where peft_fast does not know the architecture. Use a dynamic cache"
        )
    if not past:
        kwargs["past_key_values"] = _filled(call, rows, inputs.shape[0], cache)
    slots = None  # (rows, longest) bool: which slots a row uses, where they differ
    if rows.lengths is not None:
        slots = torch.arange(call.longest, device=inputs.device) >= call.longest - rows.lengths[:, None]
    text = (past - call.longest if past else 0) + inputs.shape[1]
    key = "decoder_attention_mask" if call.is_encoder_decoder else "attention_mask"
    mask = kwargs.get(key)
    if mask is None and (slots is not None or under_flex(call.base)):  # FlexAttention's mask is made for so many keys
        mask = torch.ones(inputs.shape[0], text, dtype=torch.long, device=inputs.device)
    if slots is not None and call.fused:
        FAMILIES[model_type(call.base)].positions(call.base, kwargs, rows.shift, text - inputs.shape[1], inputs)
    if mask is not None:
        if mask.ndim != 2:
            raise ValueError(
                f"{name}: {key} must be (rows, tokens) where a prefix goes through the cache, got {tuple(mask.shape)}"
            )
        ones = mask.new_ones(mask.shape[0], call.longest) if slots is None else slots.to(mask.dtype)
        kwargs[key] = torch.cat([ones, mask], dim=1)
    if slots is not None and call.fused:
        return kwargs
    given = kwargs.get("position_ids")
    if given is None and slots is not None and "position_ids" in inspect.signature(call.base.forward).parameters:
        given = torch.arange(text - inputs.shape[1], text, device=inputs.device)[None]
    if given is not None:
        kwargs["position_ids"] = given + rows.shift
    return kwargs


def _grows(cache: Any) -> bool:
    from transformers import DynamicCache, EncoderDecoderCache

    return isinstance(cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache, DynamicCache)


def filled_cache(call: PrefixCall, count: int) -> Any:
    """A new cache with the prefix of a call for `count` rows."""
    return _filled(call, call.rows(count, call.layer(0)[0].device), count, None)


def _filled(call: PrefixCall, rows: Rows, count: int, cache: Any) -> Any:
    """A cache with the prefix in it: the given one, which is empty, or a new one."""
    from transformers import DynamicCache, EncoderDecoderCache

    if cache is None:
        cache = DynamicCache()
        if call.is_encoder_decoder:
            cache = EncoderDecoderCache(cache, DynamicCache())
    target = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for index in range(call.num_layers):
        keys, values = (_expanded(slots, call.longest, rows, count) for slots in call.layer(index))
        target.update(keys, values, index)
    return cache


def _expanded(slots: Tensor, longest: int, rows: Rows, count: int) -> Tensor:
    """(count, heads, longest, head size): every row's prefix, at the end of its slots."""
    if rows.starts is None or rows.lengths is None:
        return slots.transpose(0, 1)[None].expand(count, -1, -1, -1)
    index = torch.arange(longest, device=slots.device) + (rows.starts + rows.lengths - longest)[:, None]
    return slots[index.clamp(min=0).long()].transpose(1, 2)
