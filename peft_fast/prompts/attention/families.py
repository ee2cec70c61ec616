"""What a prefix needs to know of each architecture: where its self-attention is, and how it counts positions.

The prefix takes positions 0 .. P-1, as in PEFT, and the text's positions start at P. Architectures that are not in the
table, or that compute attention by themselves, get the prefix through their cache instead (`cached`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Positions = Callable[[nn.Module, dict[str, Any], Any, Any, Tensor], None]


@dataclass(frozen=True)
class Family:
    """One architecture.

    attention: pattern of the qualified names of its decoder's (or only) self-attention modules; its group is the layer.
    positions: changes the arguments of the base's forward so that the text starts after the prefix.
    learned: positions are rows of a table that has an end.
    embedding: pattern of the embeddings of positions, where no argument reaches them.
    shared: pattern of the modules around attention that runs as several layers.
    distances: pattern of the module that knows the bias by distance.
    """

    attention: str
    positions: Positions
    learned: bool = False
    embedding: str | None = None
    shared: str | None = None
    distances: str | None = None


def by_position_ids(base: nn.Module, kwargs: dict[str, Any], shift: Any, past: Any, inputs: Tensor) -> None:
    """Positions are an argument, counted from the number of cached tokens where it is missing.

    Args:
        shift: length of the prefix, an int, or (rows, 1) where it differs from row to row.
        past: number of cached tokens, an int or a tensor. inputs: (rows, tokens, ...).
    """
    given = kwargs.get("position_ids")
    if given is None:
        given = (torch.arange(inputs.shape[1], device=inputs.device) + past)[None]
    kwargs["position_ids"] = given + shift


def by_mask(base: nn.Module, kwargs: dict[str, Any], shift: Any, past: Any, inputs: Tensor) -> None:
    """OPT: the n-th token that is no padding has position n - 1, and padding has -1."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is None and mask is not None and mask.ndim == 2:
        mask = mask.long()
        kwargs["position_ids"] = ((mask.cumsum(1) + shift) * mask - 1)[:, past:]
    else:
        by_position_ids(base, kwargs, shift, past, inputs)


def by_input_ids(base: nn.Module, kwargs: dict[str, Any], shift: Any, past: Any, inputs: Tensor) -> None:
    """RoBERTa: counted from the padding token's id on; padding has that itself. From embeddings it counts without
    the prefix, and PEFT leaves it so."""
    ids = kwargs.get("input_ids")
    if kwargs.get("position_ids") is None and ids is not None:
        pad = base.config.pad_token_id  # type: ignore[union-attr]
        text = ids.ne(pad).long()
        kwargs["position_ids"] = (text.cumsum(1) + past + shift) * text + pad
    elif kwargs.get("position_ids") is not None:
        by_position_ids(base, kwargs, shift, past, inputs)


def inside(base: nn.Module, kwargs: dict[str, Any], shift: Any, past: Any, inputs: Tensor) -> None:
    """No argument says them: BART's embedding has a hook of its own, T5 knows distances only."""


_DECODER = Family(r"(?:^|\.)layers\.(\d+)\.self_attn$", by_position_ids)
_BERT = Family(r"(?:^|\.)layer\.(\d+)\.attention\.self$", by_position_ids, learned=True)
_ROBERTA = Family(_BERT.attention, by_input_ids, learned=True)
_T5 = Family(
    r"(?:^|\.)decoder\.block\.(\d+)\.layer\.0\.SelfAttention$",
    inside,
    distances=r"(?:^|\.)decoder\.block\.0\.layer\.0\.SelfAttention$",
)
_BART = Family(
    r"(?:^|\.)decoder\.layers\.(\d+)\.self_attn$", inside, learned=True, embedding=r"(?:^|\.)decoder\.embed_positions$"
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
            *("olmo2", "cohere", "granite", "smollm3", "starcoder2", "gpt_oss"),
        ),
        _DECODER,
    ),
    "gpt2": Family(r"(?:^|\.)h\.(\d+)\.attn$", by_position_ids, learned=True),
    "gpt_bigcode": Family(r"(?:^|\.)h\.(\d+)\.attn$", by_position_ids, learned=True),
    "gpt_neox": Family(r"(?:^|\.)layers\.(\d+)\.attention$", by_position_ids),
    "opt": Family(_BART.attention, by_mask, learned=True),
    **dict.fromkeys(("bert", "electra"), _BERT),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), _ROBERTA),
    "distilbert": Family(r"(?:^|\.)layer\.(\d+)\.attention$", by_position_ids, learned=True),
    "albert": Family(
        r"(?:^|\.)albert_layers\.(\d+)\.attention$",
        by_position_ids,
        learned=True,
        shared=r"(?:^|\.)albert_layer_groups\.\d+$",
    ),
    "modernbert": Family(r"(?:^|\.)layers\.(\d+)\.attn$", by_position_ids),
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("bart", "mbart"), _BART),
}


def model_type(base: nn.Module) -> str:
    """transformers' name of the architecture; "" for a model without a configuration."""
    return getattr(getattr(base, "config", None), "model_type", "")


def modules_matching(base: nn.Module, pattern: str | None) -> list[tuple[re.Match[str], nn.Module]]:
    """(match, module) for each module whose qualified name has the pattern; none for None."""
    if pattern is None:
        return []
    return [(match, module) for name, module in base.named_modules() if (match := re.search(pattern, name))]


def position_limit(base: nn.Module) -> int | None:
    """How many positions the architecture has a learned row for; None where they do not end."""
    family, config = FAMILIES.get(model_type(base)), getattr(base, "config", None)
    if family is None or not family.learned:
        return None
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return limit if limit is None else limit - first_position(base)


def first_position(base: nn.Module) -> int:
    """The position of the first token: RoBERTa counts from the padding token's id on."""
    family = FAMILIES.get(model_type(base))
    config: Any = getattr(base, "config", None)
    return int(config.pad_token_id) + 1 if family is not None and family.positions is by_input_ids else 0
