"""Sizes of the base model that a prompt learning configuration needs, read from the model's configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import PromptLearningConfig
from .peft_types import PeftType

# What architectures call the same thing. "dim", "n_heads" and "n_layers" are DistilBERT's, which PEFT does not know.
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "n_heads")


def _prepare_prompt_learning_config(peft_config: PromptLearningConfig, model_config: Any) -> PromptLearningConfig:
    """Fill in what the configuration leaves open: layers, width, heads, hidden size of the encoder.

    For prefix tuning of a model whose query heads share key heads, width and heads become those of keys and values.

    Args:
        peft_config: changed in place. Calling this again changes nothing.
        model_config: of the base model: a transformers configuration or a dictionary. Of a model of several
            modalities, the text part counts.
    Returns: peft_config.
    Raises: ValueError if num_virtual_tokens is not given, the model's configuration does not tell a size, or (prefix
        tuning) the width is no multiple of the heads.
    """
    who = type(peft_config).__name__
    if peft_config.num_virtual_tokens is None:
        raise ValueError(f"{who}: num_virtual_tokens must be given")
    values = _values(model_config)
    if peft_config.num_layers is None:
        peft_config.num_layers = number_of_layers(model_config)
    if peft_config.token_dim is None:
        peft_config.token_dim = _first(values, _WIDTH, "token_dim")
    if peft_config.num_attention_heads is None:
        peft_config.num_attention_heads = _first(values, _HEADS, "num_attention_heads")
    if peft_config.peft_type == PeftType.PREFIX_TUNING:
        width, heads = peft_config.token_dim, peft_config.num_attention_heads
        if values.get("num_key_value_heads") is not None:
            head_dim, heads = _keys_and_values(values, width // heads)
            width = head_dim * heads
        if width % heads:
            raise ValueError(
                f"{who}: token_dim={width} is no multiple of num_attention_heads={heads}: keys and values cannot be "
                "divided among the heads"
            )
        peft_config.token_dim, peft_config.num_attention_heads = width, heads
    if hasattr(peft_config, "encoder_hidden_size") and peft_config.encoder_hidden_size is None:
        peft_config.encoder_hidden_size = peft_config.token_dim
    return peft_config


def number_of_layers(model_config: Any) -> int:
    """What PEFT fills in: of an encoder with a decoder, the encoder's. Raises: ValueError if none is told."""
    # an attribute that stands for another, which to_dict leaves out
    layers: int | None = getattr(model_config, "num_hidden_layers", None)
    return _first(_values(model_config), _LAYERS, "num_layers") if layers is None else layers


def _values(model_config: Any) -> Mapping[str, Any]:
    values: Mapping[str, Any] = model_config.to_dict() if hasattr(model_config, "to_dict") else model_config
    return values.get("text_config") or values


def _first(values: Mapping[str, Any], names: Sequence[str], field: str) -> int:
    for name in names:
        if values.get(name) is not None:
            return int(values[name])
    raise ValueError(f"Please specify `{field}` in `peft_config`: the base model's configuration does not tell it")


def _keys_and_values(values: Mapping[str, Any], default: int) -> tuple[int, int]:
    """(width of a head, heads) of keys and values; where layers differ, those of the layers with the widest heads."""
    heads = values["num_key_value_heads"]
    if values.get("global_head_dim") is not None:
        return values["global_head_dim"], values.get("num_global_key_value_heads") or heads
    head_dim = default if values.get("head_dim") is None else values["head_dim"]
    widest = head_dim, heads
    for layer in (values.get("per_layer_config") or {}).values():
        layer_dim = layer.get("head_dim", head_dim)
        if layer_dim > widest[0]:
            widest = layer_dim, layer.get("num_key_value_heads", heads)
    return widest
