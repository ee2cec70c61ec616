"""Learned tokens before the embeddings of the text: prompt tuning, P-tuning, multitask prompt tuning.

Outputs have the positions of the text: what the base model returns for virtual tokens is left out. PEFT leaves it in,
so that its logits are longer than the labels, and answers of extractive question answering are off by that many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.other import shift_tokens_right

__all__ = ["SoftPromptCall", "before_the_encoder"]

_BY_POSITION = (
    "logits", "start_logits", "end_logits", "last_hidden_state", "hidden_states", "encoder_last_hidden_state",
    "encoder_hidden_states", "decoder_hidden_states",
)  # fmt: skip
_ANSWER = ("start_positions", "end_positions")
_ONE_PER_ROW = ("SEQ_CLS",)  # logits (rows, classes)
IGNORED = -100  # label of a token that has no loss


class SoftPromptCall:
    """The learned tokens of one call.

    Args:
        base: the base model. embed: its embedding of words.
        prompts: (1, P, D), or (units, P, D) where every row of the call has its own.
        virtual: number of virtual tokens; P is twice that for an encoder with a decoder.
        task: such as "CAUSAL_LM". in_decoder: the decoder of a sequence-to-sequence model has learned tokens too.
    """

    def __init__(
        self, base: nn.Module, embed: nn.Module, prompts: Tensor, virtual: int, task: str, in_decoder: bool = False
    ) -> None:
        self.base, self.embed, self.prompts, self.virtual = base, embed, prompts, virtual
        self.task, self.in_decoder = task, in_decoder
        self.running: nn.Module | None = None
        # lengths, virtual tokens included, in the forward that runs: of what the output is about, of the encoder
        self.length: int | None = None
        self.encoder_length: int | None = None
        self.answer: list[Any] = []  # where it starts and ends, for the loss, which is about the text alone

    def apply(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The forward's arguments with the learned tokens. Raises: ValueError for arguments that cannot make room."""
        self.length = self.encoder_length = None
        self.answer = []
        if self.task == "SEQ_2_SEQ_LM":
            return self._seq2seq(kwargs)
        cache = kwargs.get("past_key_values")
        if getattr(cache, "is_compileable", False) and type(cache).__name__ != "DynamicCache":
            raise ValueError(
                "Learned tokens need room that a static cache does not have: generate with a dynamic cache, the default"
            )
        kwargs["position_ids"] = None  # PEFT's rule: the base counts them, virtual tokens included
        if kwargs.get("token_type_ids") is not None:
            if self.task in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
                kwargs["token_type_ids"] = None
            else:
                kwargs["token_type_ids"] = self._pad(kwargs["token_type_ids"], 0)
        _pad_mask(self, kwargs, "attention_mask")
        if cache is None or not cache.get_seq_length():
            kwargs["inputs_embeds"] = self.before(kwargs.get("inputs_embeds"), kwargs.get("input_ids"))
            kwargs["input_ids"] = None
            self.length = kwargs["inputs_embeds"].shape[1]
        if kwargs.get("labels") is not None and self.task in ("CAUSAL_LM", "TOKEN_CLS"):
            kwargs["labels"] = self._pad(kwargs["labels"], IGNORED)
        answer = [kwargs.get(name) for name in _ANSWER]
        if all(isinstance(positions, Tensor) for positions in answer):
            self.answer = answer
            kwargs.update(dict.fromkeys(_ANSWER))
        return kwargs

    def own_positions(self, output: Any) -> Any:
        """Logits and hidden states of the text alone; attention keeps the virtual tokens, which it is about."""
        if self.task in _ONE_PER_ROW or not isinstance(output, tuple | Mapping):
            return output
        if isinstance(output, tuple):  # without names: (rows, width) may be as wide as the sequence is long
            by_row = self.task != "QUESTION_ANS"
            values = tuple(
                value if by_row and isinstance(value, Tensor) and value.ndim == 2 else self._own(value, self.length)
                for value in output
            )
            return (_answer_loss(values[0], values[1], *self.answer), *values) if self.answer else values
        named: Any = output
        for name in _BY_POSITION:
            if named.get(name) is not None:
                named[name] = self._own(named[name], self.encoder_length if "encoder_" in name[:8] else self.length)
        if self.answer:
            named = type(named)(**{**named, "loss": _answer_loss(named.start_logits, named.end_logits, *self.answer)})
        return named

    def _own(self, value: Any, length: int | None) -> Any:
        """value (rows, length, ...) without the virtual tokens; hidden states are a tuple by layer."""
        if isinstance(value, tuple) and all(isinstance(entry, Tensor) and entry.ndim == 3 for entry in value):
            return tuple(self._own(entry, length) for entry in value)
        if isinstance(value, Tensor) and value.ndim in (2, 3) and value.shape[1] == length:
            return value[:, self.virtual :]
        return value

    def before(self, embeds: Tensor | None, ids: Tensor | None, first: int = 0) -> Tensor:
        """(rows, virtual + T, D): the learned tokens from `first` on, then the text.

        Raises: ValueError if there is no text.
        """
        if embeds is None:
            if ids is None:
                raise ValueError("You have to provide either input_ids or inputs_embeds")
            embeds = self.embed(ids)
        prompts = self.prompts[:, first : first + self.virtual].to(embeds.device, embeds.dtype)
        rows = embeds.shape[0]
        if prompts.shape[0] == 1:
            prompts = prompts.expand(rows, -1, -1)
        elif rows != prompts.shape[0]:
            if rows % prompts.shape[0]:
                raise ValueError(f"task_ids: expected one for each of {rows} rows, got {prompts.shape[0]}")
            prompts = prompts.repeat_interleave(rows // prompts.shape[0], 0)
        return torch.cat([prompts, embeds], dim=1)

    def _pad(self, tensor: Tensor, value: int) -> Tensor:
        """(rows, T) -> (rows, virtual + T)."""
        return torch.cat([tensor.new_full((tensor.shape[0], self.virtual), value), tensor], dim=1)

    def _seq2seq(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        _pad_mask(self, kwargs, "attention_mask")
        kwargs["inputs_embeds"] = self.before(kwargs.get("inputs_embeds"), kwargs.get("input_ids"))
        kwargs["input_ids"] = None
        self.encoder_length = kwargs["inputs_embeds"].shape[1]
        if not self.in_decoder:
            return kwargs
        ids, embeds, labels = (kwargs.get(key) for key in ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
        if ids is None and embeds is None and labels is not None:
            config: Any = self.base.config
            ids = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
        kwargs["decoder_inputs_embeds"] = self.before(embeds, ids, first=self.virtual)
        kwargs["decoder_input_ids"] = None
        self.length = kwargs["decoder_inputs_embeds"].shape[1]
        _pad_mask(self, kwargs, "decoder_attention_mask")
        if labels is not None:
            kwargs["labels"] = self._pad(labels, IGNORED)
        return kwargs


def _answer_loss(start_logits: Tensor, end_logits: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The mean of both cross entropies; positions beyond the text are ignored. Source: transformers' models."""
    length = start_logits.shape[1]
    losses = [
        F.cross_entropy(logits, positions.reshape(-1).to(logits.device).clamp(0, length), ignore_index=length)
        for logits, positions in ((start_logits, start), (end_logits, end))
    ]
    return (losses[0] + losses[1]) / 2


def before_the_encoder(call: SoftPromptCall, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a sequence-to-sequence model's generate with the learned tokens before the encoder's input."""
    kwargs = dict(kwargs)
    kwargs["inputs_embeds"] = call.before(None, kwargs.pop("input_ids"))
    _pad_mask(call, kwargs, "attention_mask")
    return kwargs


def _pad_mask(call: SoftPromptCall, kwargs: dict[str, Any], name: str) -> None:
    mask = kwargs.get(name)
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name} must be (rows, tokens) where learned tokens are put before the text, got {found}")
    kwargs[name] = call._pad(mask, 1)
