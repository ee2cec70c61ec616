"""The attention function that reads a prefix beside the ordinary keys, and how modules come to call it.

Attention modules of transformers look their function up by name in their configuration. Those of a model with a prefix
get a `RoutedConfig`, which answers with our function's name and passes everything else on: the model's configuration,
its masks and its other modules stay as they are. Without a prefix in the call our function runs what the module would
have run by itself.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.functional import new_seed, prefix_attention
from ..call import add_hook, before_forward, release, remove_hook
from .cached import cache_target
from .families import FAMILIES, model_type, modules_matching
from .prefix import count_application, shift_positions

NAME = "peft_fast"


class RoutedConfig:
    """A module's configuration whose attention implementation is ours.

    Args:
        routed: the module's own configuration. eager: its own attention function, for the implementation "eager".
    """

    _attn_implementation = NAME

    def __init__(self, routed: Any, eager: Callable[..., Any] | None) -> None:
        self.__dict__.update(routed=routed, eager=eager)

    def __getattr__(self, name: str) -> Any:
        if name == "routed":  # not there yet: it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.routed, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.routed, name, value)

    def plain(self) -> Callable[..., Any]:
        """The function that the module would call by itself."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = self.routed._attn_implementation
        function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, self.eager)
        return function


def install(base: nn.Module) -> bool:
    """Let the base model's self-attention read prefixes; nothing changes in calls without one.

    Returns: False where its architecture is not known: prefixes go through the cache then.
    Raises: ValueError if that cannot be either.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    family = FAMILIES.get(model_type(base))
    if family is None or not modules_matching(base, family.attention):
        add_hook(cache_target(base), before_forward, before=True)
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for match, module in modules_matching(base, family.attention):
        if not isinstance(module.config, RoutedConfig):
            eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            module.config = RoutedConfig(module.config, eager)  # type: ignore[assignment]
            module._prefix_layer = int(match[1])  # type: ignore[assignment]
    for _, module in modules_matching(base, family.embedding):
        add_hook(module, shift_positions, before=False)
    for _, module in modules_matching(base, family.shared):
        add_hook(module, count_application, before=True)
    return True


def give_back(base: nn.Module) -> None:
    """Leave the base model as it was before `acquire` and `install`, unless another model has prompts on it."""
    if release(base):
        uninstall(base)


def uninstall(base: nn.Module) -> None:
    """Undo `install`."""
    for module in base.modules():
        if isinstance(module.__dict__.get("config"), RoutedConfig):
            module.config = module.config.routed  # type: ignore[union-attr]
            del module._prefix_layer
        for hook in (before_forward, shift_positions, count_application):
            remove_hook(module, hook)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    peft_prefix: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface, with the prefix that the call has for this layer.

    Args:
        query: (B, Hq, L, D). key, value: (B, Hkv, S, D), after rotary embedding and cache.
        attention_mask: as the model's own implementation gets it: None, bool or additive (B, 1, L, S); (B, S) for
            flash attention.
        kwargs: sliding_window, softcap, s_aux (sinks), position_bias (T5), is_causal.
    Returns: (B, L, Hq, D) contiguous, and None: weights are not computed here.
    Raises: ValueError for a mask of FlexAttention; as `prefix_attention`.
    """
    if peft_prefix is None:
        plain: tuple[Tensor, Tensor | None] = module.config.plain()(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    prefix_k, prefix_v = peft_prefix.layer(peft_prefix.first + module._prefix_layer)
    dtype, device = query.dtype, query.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    query, key, value, prefix_k, prefix_v = (
        tensor.to(device, dtype) for tensor in (query, key, value, prefix_k, prefix_v)
    )
    window = peft_prefix.window(kwargs.get("sliding_window"), query.shape[2])
    mask, causal_offset = _visible(module, query, key, attention_mask, kwargs)
    starts, lengths, order = (None if t is None else t.to(device) for t in peft_prefix.rows[:3])
    out, _ = prefix_attention(
        query,
        key,
        value,
        prefix_k,
        prefix_v,
        starts=starts,
        lengths=lengths,
        order=order,
        max_length=peft_prefix.longest,
        mask=mask,
        prefix_bias=peft_prefix.bias(query.shape[2], device),
        sinks=kwargs.get("s_aux"),
        past=None if window is None else peft_prefix.past_on(device),
        scale=scaling,
        causal_offset=causal_offset,
        window=window,
        softcap=kwargs.get("softcap") or 0.0,
        dropout_p=dropout,
        seed=new_seed(device) if dropout > 0 else None,
    )
    return out, None


def _visible(
    module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> tuple[Tensor | None, int | None]:
    """(mask, causal offset) of the ordinary keys, from what the model made for its own implementation."""
    implementation = module.config.routed._attn_implementation or "eager"
    tokens, seen = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = tokens > 1 and bool(getattr(module, "is_causal", True) if causal is None else causal)
    flash = "flash" in implementation  # aligns to the last key, sdpa to the first: an empty static cache is longer
    offset = seen - tokens if flash else 0
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"A prefix cannot be read under attn_implementation={implementation!r}, whose mask is a "
            f'{type(mask).__name__}. Call set_attn_implementation("sdpa") on the base model'
        )
    bias = kwargs.get("position_bias")
    if bias is not None:  # frozen: else the prefix goes through the cache. Checkpointing makes it require a gradient
        bias = bias.detach()
    if mask is None and bias is None:
        return None, offset if causal else None
    window = kwargs.get("sliding_window") if flash else None
    if mask is not None and mask.ndim != 2:  # it says all: which keys are late, too old or padding
        causal = False
    else:
        causal = causal or (window is not None and tokens == 1)  # its window ends with the last key
        if mask is not None:  # one row for all queries and heads: as bytes of padding it stays
            mask = mask[:, None, None, -seen:].bool()
        if window is not None and not causal:
            ages = torch.arange(tokens, device=query.device)[:, None] + offset - torch.arange(seen, device=query.device)
            mask = ages < window if mask is None else mask & (ages < window)
            mask = mask.view(-1, 1, tokens, seen)
    if bias is not None and mask is None:
        mask = bias
    elif bias is not None:
        mask = bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
    return mask, offset if causal else None
