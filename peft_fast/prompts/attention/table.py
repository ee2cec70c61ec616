"""From the encoders of prefixes to what attention reads: keys and values by layer."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...utils._prompt_config import number_of_layers

Layer = Callable[[int], tuple[Tensor, Tensor]]


def prefix_layers(encoders: Sequence[Any], configs: Sequence[Any], base: nn.Module) -> Layer:
    """layer -> keys and values (slots, heads, head size) of all these prefixes, one behind another, in the base's
    dtype.

    An encoder's projection runs once, on its own virtual tokens, not on those of each row. Nothing is copied of a
    single prefix without one: keys and values are views of its parameter, and its gradient is one stack.
    """
    dtype = getattr(base, "dtype", None)
    if torch.is_grad_enabled() and any(e.is_reparameterized for e in encoders) and checkpoints(base):
        return lambda layer: _one_layer(encoders, configs, dtype, _slot(layer, configs[0]))
    tables = []
    for encoder, config in zip(encoders, configs, strict=True):
        weight = encoder.embedding.weight
        table = (encoder.transform(weight) if encoder.is_reparameterized else weight).to(dtype)
        tables.append(table.view(table.shape[0], 2 * config.num_layers, config.num_attention_heads, -1))
    table = tables[0] if len(tables) == 1 else torch.cat(tables)
    slots = table.transpose(0, 1).unbind(0)
    return lambda layer: (slots[2 * _slot(layer, configs[0])], slots[2 * _slot(layer, configs[0]) + 1])


def _slot(layer: int, config: Any) -> int:
    """The layer of the file that a layer of the model reads: PEFT doubles the prefix for an encoder with a decoder and
    gives every other layer of it to the decoder."""
    layers: int = config.num_layers
    return 2 * layer % layers if config.num_transformer_submodules == 2 else layer


def _one_layer(
    encoders: Sequence[Any], configs: Sequence[Any], dtype: torch.dtype | None, slot: int
) -> tuple[Tensor, Tensor]:
    """One layer's part of the projections, for reentrant checkpointing: each layer's backward runs by itself, and a
    graph that they share would be gone after the first."""
    tables = []
    for encoder, config in zip(encoders, configs, strict=True):
        weight = encoder.embedding.weight
        rows = slice(2 * slot * config.token_dim, 2 * (slot + 1) * config.token_dim)
        if encoder.is_reparameterized:
            last = encoder.transform[-1]
            table = F.linear(encoder.transform[:-1](weight), last.weight[rows], last.bias[rows])
        else:
            table = weight[:, rows]
        tables.append(table.to(dtype).view(weight.shape[0], 2, config.num_attention_heads, -1))
    return torch.cat(tables).unbind(1)  # type: ignore[return-value]


def checkpoints(base: nn.Module) -> bool:
    """Whether a part of the model recomputes its activations in the backward."""
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


class DoesNotFit(ValueError):
    """A prompt learning configuration with sizes that the base model does not have.

    Attributes: sizes: both, in words.
    """

    def __init__(self, what: str, sizes: str) -> None:
        super().__init__(f"{what}: {sizes}. Leave what does not fit out of the configuration, and it is filled in")
        self.sizes = sizes


def fit_sizes(base: nn.Module, config: Any, given: Container[str]) -> None:
    """Make the sizes of a prefix those of the base's attention, where PEFT's rules fill in others (heads of T5 that are
    not d_model / num_heads wide, decoders deeper than their encoder, Falcon's single key head).

    Args:
        given: names of the fields that the user set, which are not changed.
    Raises: DoesNotFit where they do not fit, ValueError if no prefix does.
    """
    layers, heads, size = _sizes(base)
    if getattr(getattr(base, "config", None), "kv_lora_rank", None):
        raise ValueError(
            f"{type(base).__name__} has keys and values of different sizes (multi-head latent attention): no prefix of "
            "PEFT's format fits it. Use another method, such as LoRA or prompt tuning"
        )
    width = heads * size if heads and size else None
    if width and (config.token_dim, config.num_attention_heads) != (width, heads):
        if "token_dim" in given or "num_attention_heads" in given:
            raise DoesNotFit(
                f"The prefix does not fit the attention of {type(base).__name__}",
                f"expected num_attention_heads={heads} and token_dim={width} of its keys and values, got "
                f"num_attention_heads={config.num_attention_heads} and token_dim={config.token_dim}",
            )
        config.token_dim, config.num_attention_heads = width, heads
        if "encoder_hidden_size" not in given:
            config.encoder_hidden_size = width
    if layers is None or config.num_layers == layers:
        return
    if config.num_layers > layers and config.num_layers == number_of_layers(base.config):
        return  # PEFT counts those of an encoder, and leaves the rest unused
    if "num_layers" in given:
        raise DoesNotFit(
            f"The prefix does not fit {type(base).__name__}",
            f"expected num_layers={layers}, got {config.num_layers}",
        )
    config.num_layers = layers


def differing_layers(config: Any) -> bool:
    """Whether a configuration has layers with other key heads or head sizes than the rest (Gemma 4)."""
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return bool(values.get("per_layer_config")) or values.get("global_head_dim") is not None


def _sizes(base: nn.Module) -> tuple[int | None, int | None, int | None]:
    """(layers, key heads, head size) of the (decoder's) self-attention; None where the base's config does not tell."""
    config: Any = getattr(base, "config", None)
    config = getattr(config, "text_config", None) or config
    if differing_layers(config):
        return None, None, None
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if getattr(config, "is_encoder_decoder", False):
        layers = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None) or layers
        heads = getattr(config, "decoder_attention_heads", None) or heads
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    width = getattr(config, "hidden_size", None)
    if size is None and heads and width:
        size = width // heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return layers, 1, size
    return layers, getattr(config, "num_key_value_heads", None) or heads, size
