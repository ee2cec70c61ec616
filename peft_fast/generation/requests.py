"""Requests of `peft-fast generate`: one JSON object per line, checked so that nothing wrong reaches the model."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, NoReturn, Protocol

from . import settings as generate_settings
from .settings import Settings, short

BASE_NAMES = (None, "__base__")  # what a request says for no adapter; the second is PEFT's name of it
_OWN_KEYS = ("prompt", "input_ids", "adapter", "id", "seed")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LineError(ValueError):
    """A line that is no request; `labels` are those of the line, as far as it could be read."""

    def __init__(self, message: str, labels: dict[str, Any]) -> None:
        super().__init__(message)
        self.labels = labels


class Codec(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, with those that the model expects around it."""

    def decode(self, tokens: list[int]) -> str:
        """The text of generated tokens, without special ones."""


class Request(NamedTuple):
    """One line that can be run."""

    line: int  # its number, from 0: the result's "index"
    tokens: list[int]
    adapter: str | None
    settings: Settings
    seed: int | None
    as_text: bool  # asked with a prompt, so answered with text
    labels: dict[str, Any]  # copied to the result


class Reader(NamedTuple):
    """Makes requests of lines, for one model."""

    adapters: Collection[str]
    virtual_tokens: Mapping[str, int]  # of the adapters that are prefixes: they take positions before the text
    codec: Codec | None
    vocab_size: int
    positions: int | None  # tokens that the model can hold; None: no limit that is known
    encoder_decoder: bool
    defaults: Settings

    def read(self, index: int, line: bytes) -> Request:
        """The request of a line. Raises: LineError that says what is wrong with it."""
        labels: dict[str, Any] = {}
        try:
            fields = _parse(line.removeprefix(_BYTE_ORDER_MARK) if index == 0 else line)
            labels.update({"id": fields["id"]} if "id" in fields else {})
            return self._request(index, fields, labels)
        except ValueError as error:
            raise LineError(str(error), labels) from None

    def _request(self, index: int, fields: dict[str, Any], labels: dict[str, Any]) -> Request:
        names = [key for key in fields if key not in _OWN_KEYS]
        if unknown := [key for key in names if key not in Settings._fields]:
            known = ", ".join((*_OWN_KEYS, *Settings._fields))
            raise ValueError(f"unknown key {short(unknown[0])}; the keys of a request are {known}")
        settings = generate_settings.apply({key: fields[key] for key in names}, self.defaults, self.vocab_size)
        seed = fields.get("seed")
        if "seed" in fields and not generate_settings.is_seed(seed):
            raise ValueError(f'"seed" must be a whole number from 0 to 2**63 - 1, got {short(seed)}')
        if settings.stop and self.codec is None:
            raise ValueError('"stop" is text, and this model has no tokenizer: use "eos_token_id"')
        adapter, tokens = self._adapter(fields), self._tokens(fields)
        self._check_length(adapter, len(tokens), settings.max_new_tokens)
        return Request(index, tokens, adapter, settings, seed, "prompt" in fields, labels)

    def _adapter(self, fields: dict[str, Any]) -> str | None:
        name = fields.get("adapter")
        if name in BASE_NAMES:
            return None
        if not isinstance(name, str) or name not in self.adapters:
            known = f"the adapters are {', '.join(self.adapters)}" if self.adapters else "no adapter was loaded"
            raise ValueError(f"unknown adapter {short(name)}: {known}; null means the base model")
        return name

    def _tokens(self, fields: dict[str, Any]) -> list[int]:
        given = [key for key in ("prompt", "input_ids") if key in fields]
        if len(given) != 1:
            found = "both" if given else "neither"
            raise ValueError(f'expected either "prompt" or "input_ids", got {found}')
        value = fields[given[0]]
        tokens = self._encode(value) if given == ["prompt"] else value
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ValueError(f'"input_ids" must be a list of whole numbers, got {short(tokens)}')
        if not tokens:
            raise ValueError(f'"{given[0]}" is empty: there is nothing to go on from')
        if outside := [token for token in tokens if not 0 <= token < self.vocab_size]:
            raise ValueError(
                f"token {short(outside[0])} is outside of the model's vocabulary, 0 to {self.vocab_size - 1}"
            )
        return tokens

    def _encode(self, prompt: Any) -> list[int]:
        if not isinstance(prompt, str):
            raise ValueError(f'"prompt" must be a text, got {short(prompt)}')
        if self.codec is None:
            raise ValueError('"prompt" needs a tokenizer, and this model has none: give "input_ids"')
        if not prompt:
            return []
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f'"prompt" is not valid Unicode: {error.reason} at character {error.start}') from None
        return self.codec.encode(prompt)

    def _check_length(self, adapter: str | None, prompt: int, new: int) -> None:
        if self.positions is None:
            return
        virtual = self.virtual_tokens.get(adapter, 0) if adapter is not None else 0
        prefix = f" after the {virtual} of the prefix {adapter}" if virtual else ""
        if self.encoder_decoder:
            longest = max(prompt, virtual + new + 1)
            what = f"a prompt of {prompt} tokens or {new} new ones{prefix}"
        else:
            longest, what = virtual + prompt + new, f"a prompt of {prompt} tokens and {new} new ones{prefix}"
        if longest > self.positions:
            raise ValueError(
                f"{what} are too long for the model's {self.positions} positions: shorten the prompt, or lower "
                '"max_new_tokens"'
            )


def parse_settings(text: str, defaults: Settings, vocab_size: int) -> Settings:
    """Settings for every request from a JSON object. Raises: ValueError that says what is wrong with it."""
    fields = _parse(text.encode(errors="replace"))
    if unknown := [key for key in fields if key not in Settings._fields]:
        raise ValueError(f"unknown setting {short(unknown[0])}; there are {', '.join(Settings._fields)}")
    return generate_settings.apply(fields, defaults, vocab_size)


def _parse(line: bytes) -> dict[str, Any]:
    """A JSON object with each key once. Raises: ValueError."""
    if not line.strip():
        raise ValueError("the line is empty: expected a JSON object")
    try:
        fields = json.loads(
            line.decode("utf-8"),
            parse_constant=_no_constant,
            parse_float=_finite,
            object_pairs_hook=_no_repeated_key,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("not a request: JSON nested too deep") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {short(fields)}")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name} is no JSON number")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"not JSON: {short(text)} is too large for a number")
    return value


def _no_repeated_key(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {short(next(key for key in keys if keys.count(key) > 1))} is there more than once")
    return fields
