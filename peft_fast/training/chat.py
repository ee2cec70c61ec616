"""Chats for `peft-fast train`: the tokens that a tokenizer's template makes of messages, and which are the answers'."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # by which a template says itself what answers are
Message = Mapping[str, Any]


def what_is_missing(tokenizer: Any) -> str | None:
    """Why chats cannot be made into tokens; None if they can."""
    if getattr(tokenizer, "chat_template", None) is None:
        return "the tokenizer has no chat template (chat_template.jinja); use that of the model's chat version"
    if not tokenizer.is_fast:
        return "the tokenizer does not say where its tokens begin in the text (it is no fast one)"
    return None


def tokens_and_learned(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None
) -> tuple[list[int], list[bool]]:
    """The tokens of a chat, and of each whether it is part of an answer, its end included.

    Raises: ValueError for a template in whose text the answers cannot be found, and what the template raises.
    """
    if isinstance(tokenizer.chat_template, str) and _MARKED.search(tokenizer.chat_template):
        found = tokenizer.apply_chat_template(
            list(messages), tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]
    whole = _render(tokenizer, messages, tools)
    spans = [
        _span(tokenizer, messages, tools, i, whole) for i, one in enumerate(messages) if one["role"] == "assistant"
    ]
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    learned = [any(first <= begin < last for first, last in spans) for begin, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), learned


def _span(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None, index: int, whole: str
) -> tuple[int, int]:
    """Where an answer is in the text of the whole chat, from behind what asks for it to the end of its turn."""
    before = _render(tokenizer, messages[:index], tools, asks=True) if index else ""
    if not whole.startswith(before):  # some ask with the begin of a thought, which the answer has not
        before = _render(tokenizer, messages[:index], tools)
    through = _render(tokenizer, messages[: index + 1], tools)
    if whole.startswith(before) and whole.startswith(through):
        return len(before), len(through)
    # some write an answer otherwise when it is not the last one: there, its words and how a turn ends
    words = str(messages[index].get("content") or "").strip()
    end = through[through.rfind(words) + len(words) :]
    at = whole.find(words, len(before))
    if not words or not whole.startswith(before) or at < 0 or not whole.startswith(end, at + len(words)):
        raise ValueError(
            f"message {index + 1} is not found in what the template makes of the whole chat; end the line's messages "
            "with this answer, or mark answers in the template ({% generation %})"
        )
    return len(before), at + len(words) + len(end)


def _render(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None, *, asks: bool = False) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=asks)
    return text
