"""The generation settings that a request may give: transformers' names, their values checked before anything runs.

One table, `_VALUES`, says what each setting may be. `seed` is no field of `Settings`: equal settings make a batch, and
each row of it has its own random numbers.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # mean nothing without do_sample
BEAMS = ("length_penalty", "early_stopping")  # mean nothing without num_beams


class Settings(NamedTuple):
    """What decides how a batch is generated; the values here hold where neither model nor user says anything."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50  # as in transformers; 0 switches it off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    eos_token_id: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the model's batch that one request takes."""
        return max(self.num_beams, self.num_return_sequences)


def from_model(generation_config: Any) -> Settings:
    """The settings that a model brings along; what its file does not say is as in `Settings`."""
    said = {name: getattr(generation_config, name, None) for name in Settings._fields if name not in _NOT_FROM_MODEL}
    return Settings(**{name: _plain(name, value) for name, value in said.items() if value is not None})


def apply(given: Mapping[str, Any], defaults: Settings, vocab_size: int) -> Settings:
    """`defaults` with what is given, which must be names of `Settings`.

    Raises: ValueError, naming the setting, for a value that it cannot have, for a setting that would have no effect,
        and for settings that contradict each other.
    """
    for name, value in given.items():
        good, expected = _VALUES[name]
        if not good(value):
            raise ValueError(f'"{name}" must be {expected}, got {short(value)}')
    settings = defaults._replace(**{name: _plain(name, value) for name, value in given.items()})
    for names, switch, is_on in (
        (SAMPLING, '"do_sample": true', settings.do_sample),
        (BEAMS, '"num_beams" above 1', settings.num_beams > 1),
    ):
        useless = [name for name in names if name in given]
        if useless and not is_on:
            raise ValueError(f'"{useless[0]}" has no effect without {switch}; add that, or leave it out')
    outside = [token for token in settings.eos_token_id if token >= vocab_size]
    if outside and "eos_token_id" in given:
        raise ValueError(f'"eos_token_id": {outside[0]} is not a token of the model, which has {vocab_size}')
    if settings.min_new_tokens > settings.max_new_tokens:
        raise ValueError(
            f'"min_new_tokens" {settings.min_new_tokens} is more than "max_new_tokens" {settings.max_new_tokens}'
        )
    _check_beams(settings)
    return settings


def is_seed(value: Any) -> bool:
    """Whether a request can have this as its "seed"."""
    return _whole(0)(value) and value < 2**63


def short(value: Any, limit: int = 60) -> str:
    """A value as it is shown in an error: not longer than one can read."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _check_beams(settings: Settings) -> None:
    beams, sequences = settings.num_beams, settings.num_return_sequences
    if beams > 1 and settings.do_sample:
        raise ValueError('"num_beams" above 1 and "do_sample" together are not supported: choose one of them')
    if beams > 1 and settings.stop:
        raise ValueError('"num_beams" above 1 and "stop" together are not supported; "eos_token_id" works with beams')
    if beams == 1 and sequences > 1 and not settings.do_sample:
        raise ValueError(
            f'"num_return_sequences": {sequences} would all be the same: it needs "do_sample": true, or "num_beams"'
        )
    if 1 < beams < sequences:
        raise ValueError(f'"num_return_sequences": {sequences} is more than "num_beams": {beams}')


def _whole(low: int) -> Callable[[Any], bool]:
    def good(value: Any) -> bool:
        return type(value) is int and value >= low

    return good


def _number(low: float, high: float = math.inf, *, low_excluded: bool = True) -> Callable[[Any], bool]:
    def good(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return bool((low < value if low_excluded else low <= value) and value <= high)

    return good


def _one_or_list(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def all_good(value: Any) -> bool:
        values = value if isinstance(value, list) else [value]
        return bool(values) and all(map(good, values))

    return all_good


def _bool(value: Any) -> bool:
    return type(value) is bool


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _plain(name: str, value: Any) -> Any:
    """Hashable, and equal for what means the same: a list of one token and the token."""
    if name in ("eos_token_id", "stop"):
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    return value


_NOT_FROM_MODEL = ("max_new_tokens", "min_new_tokens", "num_return_sequences", "stop")
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_whole(1), "a whole number, 1 or more"),
    "min_new_tokens": (_whole(0), "a whole number, 0 or more"),
    "do_sample": (_bool, "true or false"),
    "temperature": (_number(0), "a number above 0"),
    "top_k": (_whole(0), "a whole number, 0 (off) or more"),
    "top_p": (_number(0, 1), "a number above 0, up to 1"),
    "min_p": (_number(0, 1, low_excluded=False), "a number from 0 to 1"),
    "repetition_penalty": (_number(0), "a number above 0"),
    "no_repeat_ngram_size": (_whole(0), "a whole number, 0 (off) or more"),
    "num_beams": (_whole(1), "a whole number, 1 or more"),
    "num_return_sequences": (_whole(1), "a whole number, 1 or more"),
    "length_penalty": (_number(-math.inf), "a number"),
    "early_stopping": (_bool, "true or false"),
    "eos_token_id": (_one_or_list(_whole(0)), "a token id or a list of them"),
    "stop": (_one_or_list(_text), "a text or a list of texts, none empty"),
}
