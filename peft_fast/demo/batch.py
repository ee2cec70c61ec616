"""The demo's last act: one batch in which every row has another adapter, checked and timed beside one row at a time."""

import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..jobs.errors import JobError
from .data import END

if TYPE_CHECKING:
    from peft_fast import PeftModel

TIE = 1e-2  # two tokens whose logits are this close may change places by rounding; they are usually units apart
ENOUGH_S = 20.0  # of rounds, where other programs keep the machine busy


class Row(NamedTuple):
    """A prompt and the adapter that goes on with it; None is the base model."""

    adapter: str | None
    prompt: str

    @property
    def ids(self) -> list[int]:
        """The prompt as tokens, after the end of the docstring before it."""
        return [END, *self.prompt.encode()]


def rows_for(texts: dict[str, list[str]]) -> list[Row]:
    """For each domain, its adapter and the first words of its first held-out text; one of them for the base."""
    prompts = {name: " ".join(held_out[0].split()[:4]) + " " for name, held_out in texts.items()}
    return [*(Row(name, prompt) for name, prompt in prompts.items()), Row(None, next(iter(prompts.values())))]


def run(model: "PeftModel", rows: list[Row], length: int, rounds: int) -> dict[str, float]:
    """Generate `length` tokens for each row, all in one batch and one row after the other, in turn.

    Returns: number of rows, tokens, seconds of both (medians over the rounds), and how many times faster the batch is.
    Raises: JobError if a token of the batch is not what the row's adapter chooses alone.
    """
    together(model, rows, 2), one_by_one(model, rows[:1], 2)  # what only the first call does
    seconds: dict[str, list[float]] = {"batch": [], "one by one": []}
    begin = time.perf_counter()
    for _ in range(rounds):
        start = time.perf_counter()
        chosen = together(model, rows, length)
        middle = time.perf_counter()
        one_by_one(model, rows, length)
        seconds["batch"].append(middle - start)
        seconds["one by one"].append(time.perf_counter() - middle)
        if time.perf_counter() - begin > ENOUGH_S:
            break
    for row, tokens in zip(rows, chosen, strict=True):
        check(model, row, tokens)
    batch, alone = (statistics.median(found) for found in seconds.values())
    return {
        "rows": len(rows),
        "tokens": len(rows) * length,
        "seconds": round(batch, 4),
        "seconds_one_by_one": round(alone, 4),
        "times_faster": round(alone / batch, 2),
    }


def together(model: "PeftModel", rows: list[Row], length: int) -> Tensor:
    """(rows, length): the new tokens of one mixed batch."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([[END] * (longest - len(row.ids)) + row.ids for row in rows])
    mask = torch.tensor([[0] * (longest - len(row.ids)) + [1] * len(row.ids) for row in rows])
    return _generate(model, ids, mask, length, adapter_names=[row.adapter or "__base__" for row in rows])


def one_by_one(model: "PeftModel", rows: list[Row], length: int) -> list[Tensor]:
    """(1, length) for each row, its adapter switched on before."""
    found = []
    for row in rows:
        ids = torch.tensor([row.ids])
        if row.adapter is None:
            with model.disable_adapter():
                found.append(_generate(model, ids, torch.ones_like(ids), length))
        else:
            model.set_adapter(row.adapter, inference_mode=True)
            found.append(_generate(model, ids, torch.ones_like(ids), length))
    return found


@torch.no_grad()
def check(model: "PeftModel", row: Row, tokens: Tensor) -> None:
    """Raises: JobError unless each token has the largest logit, up to rounding, where the adapter runs alone."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*row.ids, *tokens.tolist()]], device=device)
    if row.adapter is None:
        with model.disable_adapter():
            logits = model(input_ids=ids).logits
    else:
        model.set_adapter(row.adapter, inference_mode=True)
        logits = model(input_ids=ids).logits
    logits = logits[0, len(row.ids) - 1 : -1].float()
    logits[:, END] = -torch.inf  # not allowed here: every row has the same number of tokens
    short = logits.amax(-1) - logits.gather(-1, ids[0, len(row.ids) :, None])[:, 0]
    if not bool((short <= TIE).all()):
        at = int((~(short <= TIE)).nonzero()[0])
        raise JobError(
            f"mixed batch, {row.adapter or 'no adapter'}: token {at} is not the one that it chooses alone "
            f"(its logit is {short[at]:.3f} below the largest)"
        )


def report(found: dict[str, float]) -> str:
    """Two lines."""
    return (
        f"One batch, {found['rows'] - 1:.0f} adapters and the base in it, the prefix beside LoRA: "
        f"{found['tokens']:.0f} tokens in {found['seconds']:.2f} s,\n{found['times_faster']:.1f} times faster than "
        f"one after the other ({found['seconds_one_by_one']:.2f} s), and each token is the one that its adapter "
        "chooses alone."
    )


def write_requests(rows: list[Row], file: Path) -> None:
    """The rows as requests of `peft-fast generate`."""
    requests = [{"prompt": row.prompt, "adapter": row.adapter, "max_new_tokens": 60} for row in rows]
    file.write_text("".join(json.dumps(request) + "\n" for request in requests), encoding="utf-8")


def _generate(model: "PeftModel", ids: Tensor, mask: Tensor, length: int, **names: list[str]) -> Tensor:
    """(rows, length): greedy."""
    device = next(model.parameters()).device
    output: Tensor = model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=length, min_new_tokens=length,
        do_sample=False, pad_token_id=END, eos_token_id=END, **names,
    )  # fmt: skip
    return output[:, ids.shape[1] :]
