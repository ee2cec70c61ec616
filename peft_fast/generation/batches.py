"""Batches of `peft-fast generate`: which requests go together, how they run, and what is read off the result.

Requests with equal settings share a batch whatever their adapters. Sampling is done here, not by transformers: each
row draws with random numbers of its own, so that what a request gets does not depend on the rows beside it (up to the
rounding of the logits).
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .model import Generator
from .requests import Codec, Request
from .settings import Settings

Record = dict[str, Any]


def plan(requests: Sequence[Request], batch_size: int) -> list[list[Request]]:
    """Batches of at most `batch_size` rows with equal settings and similar lengths, the earliest request's first."""
    groups: dict[Settings, list[Request]] = defaultdict(list)
    for request in requests:
        groups[request.settings].append(request)
    batches: list[list[Request]] = []
    for settings, group in groups.items():
        group.sort(key=lambda request: len(request.tokens))  # stable: the same plan in every run
        size = max(1, batch_size // settings.rows)
        batches.extend(group[start : start + size] for start in range(0, len(group), size))
    return sorted(batches, key=lambda batch: min(request.line for request in batch))


def run(generator: Generator, batch: Sequence[Request], seed: int) -> dict[int, Record]:
    """The result of each request, by its index. A batch that fails is run again one by one.

    Raises: torch.AcceleratorError: after it the device answers nothing any more, so no request is to blame.
    """
    try:
        return _run(generator, batch, seed)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        failure = " ".join(f"{type(error).__name__}: {error}".split())
    if generator.device.type == "cuda":
        torch.cuda.empty_cache()
    if len(batch) == 1:
        return {batch[0].line: error_record(batch[0].line, failure, batch[0].labels)}
    return {index: record for request in batch for index, record in run(generator, [request], seed).items()}


def error_record(index: int, message: str, labels: Record | None = None) -> Record:
    """The result of a line that has none."""
    return {"index": index, **(labels or {}), "error": message}


@torch.inference_mode()
def _run(generator: Generator, batch: Sequence[Request], seed: int) -> dict[int, Record]:
    settings, copies = batch[0].settings, 1
    if settings.do_sample:
        copies = settings.num_return_sequences
    rows = [request for request in batch for _ in range(copies)]
    ids, mask = _padded(rows, generator)
    names = {"adapter_names": [row.adapter or "__base__" for row in rows]} if generator.adapters else {}
    start = 1 if generator.encoder_decoder else ids.shape[1]
    output = generator.model.generate(
        input_ids=ids,
        attention_mask=mask,
        **names,
        **_arguments(generator, settings),
        **_hooks(generator, batch, settings, start, seed),
    )
    new = output[:, start:].tolist()
    each = len(new) // len(batch)
    return {
        request.line: _record(generator, request, new[i * each : (i + 1) * each]) for i, request in enumerate(batch)
    }


def _padded(rows: Sequence[Request], generator: Generator) -> tuple[Tensor, Tensor]:
    """ids and mask, (rows, longest): padded where generation does not begin."""
    longest = max(len(row.tokens) for row in rows)
    ids = torch.full((len(rows), longest), generator.pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(len(row.tokens)) if generator.encoder_decoder else slice(longest - len(row.tokens), None)
        ids[i, place] = torch.tensor(row.tokens)
        mask[i, place] = 1
    return ids.to(generator.device), mask.to(generator.device)


def _arguments(generator: Generator, settings: Settings) -> dict[str, Any]:
    """For transformers' generate, which never samples here."""
    given = settings._asdict()
    for name in ("temperature", "top_k", "top_p", "min_p", "stop"):
        del given[name]
    given.update(do_sample=False, pad_token_id=generator.pad, eos_token_id=list(settings.eos_token_id) or None)
    if settings.do_sample:
        given["num_return_sequences"] = 1
    return given


def _hooks(
    generator: Generator, batch: Sequence[Request], settings: Settings, start: int, seed: int
) -> dict[str, list[Any]]:
    hooks: dict[str, list[Any]] = {}
    if settings.do_sample:
        uniforms = [numbers for request in batch for numbers in _uniforms(request, settings, seed)]
        hooks["logits_processor"] = [*_warpers(settings), _Sampler(torch.stack(uniforms).to(generator.device), start)]
    if settings.stop and generator.codec is not None:
        hooks["stopping_criteria"] = [_StopTexts(generator.codec, settings.stop, start)]
    return hooks


# ------------------------------------------------------------------------------------------------ sampling
def _uniforms(request: Request, settings: Settings, seed: int) -> list[Tensor]:
    """(max_new_tokens,) in [0, 1) for each sequence: of its own seed, or of the run's and the line."""
    key = f"run {seed} line {request.line}" if request.seed is None else f"request {request.seed}"
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    return list(torch.rand(settings.num_return_sequences, settings.max_new_tokens, generator=generator))


def _warpers(settings: Settings) -> list[Callable[..., Tensor]]:
    """Those of transformers that `do_sample` would add, in its order."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = []
    if settings.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        warpers.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        warpers.append(MinPLogitsWarper(settings.min_p))
    return warpers


class _Sampler:
    """A logits processor that leaves one token possible in each row: the one at this step's random number."""

    def __init__(self, uniforms: Tensor, start: int) -> None:
        self.uniforms, self.start = uniforms, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, vocabulary) -> the same, -inf but for one token. Raises: ValueError if the model's logits are NaN."""
        cumulative = scores.double().softmax(-1).cumsum(-1)
        if cumulative[:, -1].isnan().any():
            raise ValueError("the model's logits are NaN: nothing can be drawn from them")
        drawn = self.uniforms[:, input_ids.shape[1] - self.start, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, drawn, right=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


# ------------------------------------------------------------------------------------------------ the end of a row
class _StopTexts:
    """A stopping criterion: a row is done when its new text ends in a stop text, within the last token."""

    def __init__(self, codec: Codec, stop: tuple[str, ...], start: int) -> None:
        self.codec, self.stop, self.start = codec, stop, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(rows, so far) -> (rows,) bool."""
        rows = input_ids[:, self.start :].tolist()
        done = [_stopped(self.codec, row, self.stop) for row in rows]
        return torch.tensor(done, device=input_ids.device)


def _stopped(codec: Codec, tokens: list[int], stop: tuple[str, ...]) -> bool:
    """Whether a stop text is in what the last tokens say: a token has at least one byte, special ones aside."""
    tail = codec.decode(tokens[-max(len(text.encode()) for text in stop) - 8 :])
    return any(text in tail for text in stop)


def _cut(codec: Codec | None, tokens: list[int], settings: Settings) -> tuple[list[int], str]:
    """The tokens that count, and why they end: "stop" or "length". An ending token counts, what follows does not."""
    ends = [i + 1 for i, token in enumerate(tokens) if token in settings.eos_token_id]
    whole = tokens[: ends[0]] if ends else tokens
    if codec is not None and settings.stop:
        for length in range(1, len(whole) + 1):
            if _stopped(codec, whole[:length], settings.stop):
                return whole[:length], "stop"
    return whole, "stop" if ends else "length"


def _record(generator: Generator, request: Request, rows: list[list[int]]) -> Record:
    cut = [_cut(generator.codec, row, request.settings) for row in rows]
    record: Record = {"index": request.line, **request.labels, "adapter": request.adapter}
    if request.as_text and generator.codec is not None:
        record["text"] = [_text(generator.codec, tokens, request.settings.stop) for tokens, _ in cut]
    else:
        record["output_ids"] = [tokens for tokens, _ in cut]
    record["prompt_tokens"] = len(request.tokens)
    record["new_tokens"] = [len(tokens) for tokens, _ in cut]
    record["finish_reason"] = [reason for _, reason in cut]
    if len(cut) > 1:
        return record
    return {key: value[0] if key in _PER_SEQUENCE else value for key, value in record.items()}


def _text(codec: Codec, tokens: list[int], stop: tuple[str, ...]) -> str:
    """The text before the first stop text."""
    text = codec.decode(tokens)
    places = [place for place in (text.find(end) for end in stop) if place >= 0]
    return text[: min(places)] if places else text


_PER_SEQUENCE = ("text", "output_ids", "new_tokens", "finish_reason")
