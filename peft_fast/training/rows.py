"""From a line of the data to a row of tokens and labels, and from rows to a batch, for `peft-fast train`."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..generation.model import ByteCodec
from ..jobs.errors import JobError, UsageError
from . import chat as train_chat
from .data import Json, Lines

IGNORED = -100  # the label of what no loss is on
Row = dict[str, Any]  # "input_ids": list, "labels": list, or a class


class Text(Protocol):
    """What a model's tokenizer, or bytes in its place, can do."""

    end: int | None  # the token that ends a text

    def whole(self, text: str, limit: int | None = None) -> list[int]:
        """As the model gets a text: with the tokens around it, in at most `limit` of them."""

    def plain(self, text: str) -> list[int]:
        """Without the tokens around it."""

    def target(self, text: str, limit: int | None = None) -> list[int]:
        """As an answer of a model with encoder and decoder."""

    def chat(self, messages: Sequence[Json], tools: Sequence[Any] | None) -> tuple[list[int], list[bool]]:
        """By the tokenizer's template, and which of the tokens are the answers'."""


class TokenizerText:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any, end: int | None) -> None:
        self.tokenizer, self.end = tokenizer, end

    def whole(self, text: str, limit: int | None = None) -> list[int]:
        """With the tokenizer's special tokens."""
        tokens: list[int] = self.tokenizer(text, truncation=limit is not None, max_length=limit).input_ids
        return tokens

    def plain(self, text: str) -> list[int]:
        """Without them."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return tokens

    def target(self, text: str, limit: int | None = None) -> list[int]:
        """As the tokenizer writes targets."""
        tokens: list[int] = self.tokenizer(text_target=text, truncation=limit is not None, max_length=limit).input_ids
        return tokens

    def chat(self, messages: Sequence[Json], tools: Sequence[Any] | None) -> tuple[list[int], list[bool]]:
        """By the tokenizer's template."""
        return train_chat.tokens_and_learned(self.tokenizer, messages, tools or None)


class ByteText:
    """Bytes are tokens."""

    def __init__(self, codec: ByteCodec, end: int | None) -> None:
        self.codec, self.end = codec, end

    def whole(self, text: str, limit: int | None = None) -> list[int]:
        """After the model's first token, if it has one."""
        return self.codec.encode(text)[:limit]

    def plain(self, text: str) -> list[int]:
        """The bytes."""
        return list(text.encode())

    def target(self, text: str, limit: int | None = None) -> list[int]:
        """The bytes and the end."""
        return _ended(self.plain(text), self.end)[:limit]

    def chat(self, messages: Sequence[Json], tools: Sequence[Any] | None) -> tuple[list[int], list[bool]]:
        """There is no template."""
        raise ValueError("bytes have none")


class Rows(Dataset[Row]):
    """The rows of some of the lines, made when they are asked for."""

    def __init__(
        self,
        lines: Lines,
        chosen: Sequence[int],
        task: str,
        text: Text,
        max_length: int,
        classes: Sequence[str | int],
        *,
        ends: bool = False,
    ) -> None:
        """ends: a text to classify has the end token once, at its end, as classifiers with a decoder ask for."""
        self.ends = ends
        self.lines, self.chosen, self.task, self.text, self.max_length = lines, chosen, task, text, max_length
        self.class_of = {label: index for index, label in enumerate(classes)}
        self.asked = self.cut = 0  # rows so far, and those of them that were longer than max_length

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Row:
        line = self.lines.read(self.chosen[index])
        self.asked += 1
        if self.task == "seq-cls":
            return {"input_ids": self._whole(line["text"]), "labels": self.class_of[line["label"]]}
        if self.task == "seq2seq":
            labels = self.text.target(line["completion"])
            if len(labels) > self.max_length:
                labels = self.text.target(line["completion"], self.max_length)
                self.cut += 1
            return {"input_ids": self._whole(line["prompt"]), "labels": labels}
        if "messages" in line:
            return self._chat(index, line)
        return self._text(line["text"]) if "text" in line else self._pair(line["prompt"], line["completion"])

    def check_each_has_something_to_learn(self) -> None:
        """For chats, and for a model without end token, where a text can be a single token, and nothing before it.

        Raises: UsageError for a chat and JobError for a text, naming the line.
        """
        for index, line in enumerate(tqdm(self.chosen, desc="checking rows", unit="row", delay=2, leave=False)):
            labels = self[index]["labels"]
            if isinstance(labels, list) and all(label == IGNORED for label in labels):
                if "messages" in self.lines.keys:
                    raise UsageError(
                        f"{self.lines.path}, line {self.lines.numbers[line]}: the tokenizer's chat template marks no "
                        f"answer in its last {self.max_length} tokens (--max-length)"
                    )
                raise JobError(
                    f"{self.lines.path}, line {self.lines.numbers[line]}: a single token, which nothing predicts (the "
                    "model has no end token); leave the line out"
                )
        self.asked = self.cut = 0

    def _whole(self, text: str) -> list[int]:
        tokens = self.text.whole(text)
        if self.ends and self.text.end is not None:
            tokens = [token for token in tokens if token != self.text.end]
            self.cut += len(tokens) >= self.max_length
            return [*tokens[: self.max_length - 1], self.text.end]
        if len(tokens) <= self.max_length:
            return tokens
        self.cut += 1
        return self.text.whole(text, self.max_length)

    def _text(self, text: str) -> Row:
        tokens = _ended(self.text.whole(text), self.text.end)
        self.cut += len(tokens) > self.max_length
        tokens = tokens[: self.max_length]
        return {"input_ids": tokens, "labels": [IGNORED, *tokens[1:]]}  # nothing predicts the first token

    def _chat(self, index: int, line: Json) -> Row:
        """What is too long loses its begin, but for the first token: the last answer stays."""
        where = f"{self.lines.path}, line {self.lines.numbers[self.chosen[index]]}"
        try:
            tokens, learned = self.text.chat(line["messages"], line.get("tools"))
        except Exception as error:  # templates are programs, and raise what they want
            said = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise UsageError(f"{where}: the tokenizer's chat template cannot be used: {said[:300]}") from None
        if len(tokens) > self.max_length:
            self.cut += 1
            rest = self.max_length - 1
            tokens, learned = [*tokens[:1], *tokens[-rest:]], [*learned[:1], *learned[-rest:]]
        labels = [token if is_learned else IGNORED for token, is_learned in zip(tokens, learned, strict=True)]
        return {"input_ids": tokens, "labels": [IGNORED, *labels[1:]]}

    def _pair(self, prompt: str, completion: str) -> Row:
        """What is too long loses the middle: of the prompt, its first token and its end stay."""
        before, after = self.text.whole(prompt), _ended(self.text.plain(completion), self.text.end)
        self.cut += len(before) + len(after) > self.max_length
        after = after[: self.max_length - 1]
        room = self.max_length - len(after)
        if len(before) > room:
            before = [*before[:1], *before[len(before) - room + 1 :]]
        labels = [IGNORED] * len(before) + after
        return {"input_ids": before + after, "labels": [IGNORED, *labels[1:]]}


class Collator:
    """Rows of all lengths to tensors of a batch, filled up on the right."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": self._padded(ids, self.pad),
            "attention_mask": self._padded([[1] * len(row) for row in ids], 0),
        }
        labels = [row["labels"] for row in rows]
        batch["labels"] = self._padded(labels, IGNORED) if isinstance(labels[0], list) else torch.tensor(labels)
        return batch

    def _padded(self, rows: Sequence[list[int]], value: int) -> Tensor:
        length = max(map(len, rows))
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def split(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """(lines to train on, lines held out), each in the file's order; one is held out at least, one is left at least."""
    held = min(max(1, round(count * fraction)), count - 1) if fraction else 0
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held:]), sorted(order[:held])


def _ended(tokens: list[int], end: int | None) -> list[int]:
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]
