"""`peft-fast demo`: adapters on a small byte-level Llama, each best on its own text.

One LoRA adapter per Python package, for its docstrings, and one prefix, for code.

Every stage leaves its result in the output directory, written atomically, and a later run goes on from there:
    base/             a copy of the base model that comes with the package (examples/train_base.py made it)
    adapters/NAME/    the adapters, in PEFT's format; adapters/done.json says with which settings
    results.json      settings, adapters, held-out losses, times        results.png   the losses as a picture
    requests.jsonl    a prompt for each adapter: what `peft-fast generate` can be tried on
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..jobs.device import pick_device
from ..jobs.errors import JobError, UsageError
from . import batch as demo_batch, data as demo_data, report as demo_report

if TYPE_CHECKING:
    from peft_fast import PeftConfig, PeftModel

BASE = Path(__file__).parent / "assets" / "base"
LENGTH = 256
BATCH = 8
LORA_LEARNING_RATE = 8e-3
PREFIX_LEARNING_RATE = 0.2  # a prefix begins far from the base, with keys and values of random numbers
BASE_ROW = "base"


class Settings(NamedTuple):
    """What decides the result of a run."""

    out: Path
    steps: int
    seed: int
    device: str
    quick: bool

    @property
    def length(self) -> int:
        """Bytes in a training window."""
        return 128 if self.quick else LENGTH


def run(settings: Settings, fresh: bool = False, say: Callable[[str], None] = lambda text: None) -> None:
    """Train, save, load back, compare, run all in one batch; every adapter wins on its own text.

    Raises: UsageError for a device or directory that cannot be used; JobError where the base model is missing, an
        adapter does not win, or a mixed batch gives other tokens than one adapter after the other;
        FileNotFoundError for missing sources of Python; the library's errors for an adapter directory that is broken.
    """
    start = time.perf_counter()
    device = pick_device(settings.device)
    out = prepare_directory(settings.out, fresh)
    splits = {name: demo_data.split(demo_data.texts_of(name)) for name in demo_data.NAMES}
    base = copy_base(out)
    say(f"base model, adapters and results: {out}")

    with tqdm(total=len(splits) * settings.steps, unit="step", dynamic_ncols=True, mininterval=0.5) as bar:
        train_adapters(settings, base, device, {name: texts for name, (texts, _) in splits.items()}, bar)
    model = load_adapters(base, out / "adapters", list(splits), device)
    held_out = {name: texts for name, (_, texts) in splits.items()}
    losses = compare(model, held_out, settings)
    rows = demo_batch.rows_for(held_out)
    mixed = demo_batch.run(model, rows, length=24 if settings.quick else 48, rounds=3 if settings.quick else 5)
    demo_batch.write_requests(rows, out / "requests.jsonl")
    seconds = time.perf_counter() - start

    kinds = demo_report.kinds(model)
    settings_as_text = {"steps": settings.steps, "seed": settings.seed, "device": str(device), "quick": settings.quick}
    demo_report.write_json(
        out / "results.json",
        {
            "settings": settings_as_text,
            "adapters": kinds,
            "losses": losses,
            "mixed_batch": mixed,
            "seconds": round(seconds, 1),
        },
    )
    say("\n" + demo_report.table(losses, BASE_ROW))
    say("\n" + demo_report.said_of(kinds))
    say("\n" + demo_report.draw(losses, BASE_ROW, out / "results.png"))
    say("\n" + demo_report.samples(model, list(splits), settings.seed))
    say("\n" + demo_batch.report(mixed))
    lost = demo_report.losers(losses, BASE_ROW)
    if lost:
        raise JobError("; ".join(lost) + ". More --steps may help; --fresh trains the adapters again")
    say("\n" + demo_report.next_steps(settings.out, list(splits)))
    say(f"\nEvery adapter wins on its own text. {seconds:.0f} s in all.")


def prepare_directory(out: Path, fresh: bool) -> Path:
    """The output directory, made if need be; with `fresh` without an earlier run's adapters."""
    out = out.expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: expected a directory, this is a file")
    foreign = out.is_dir() and any(out.iterdir()) and not (out / "base").exists()
    if foreign:
        raise UsageError(
            f"--out {out}: this directory has other files in it; name a new one, or one that the demo made"
        )
    out.mkdir(parents=True, exist_ok=True)
    if fresh:
        shutil.rmtree(out / "adapters", ignore_errors=True)
    return out


def copy_base(out: Path) -> Path:
    """out/base, where the adapters' configurations find their base model; copied again if the package has another."""
    if not (BASE / "model.safetensors").is_file():
        raise JobError(
            f"the base model is missing from {BASE}: install the package again, or run examples/train_base.py"
        )
    target = out / "base"
    if target.is_dir() and _fingerprint(target) == _fingerprint(BASE):
        return target
    part = out / f".base-{os.getpid()}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(BASE, part)
    part.rename(target)
    return target


def train_adapters(
    settings: Settings, base: Path, device: torch.device, texts: dict[str, list[str]], bar: "tqdm[Any]"
) -> None:
    """Train and save one adapter per domain, those that an earlier run left with the same settings excepted."""
    from peft_fast import get_peft_model

    adapters = base.parent / "adapters"
    done_file = adapters / "done.json"
    wanted = [settings.steps, settings.seed, settings.length, _fingerprint(base)]
    done = json.loads(done_file.read_text(encoding="utf-8")) if done_file.is_file() else {}
    for name, domain in texts.items():
        if done.get(name) == wanted and (adapters / name).is_dir():
            bar.write(f"{name}: trained by an earlier run, kept")
            bar.update(settings.steps)
            continue
        torch.manual_seed(settings.seed)
        config, rate = recipe(name)
        model = get_peft_model(load_base(base, device), config, adapter_name=name)
        bar.set_description(f"training {name}")
        train(model, demo_data.to_ids(domain), settings, rate, bar)
        model.save_pretrained(adapters)
        done[name] = wanted
        demo_report.write_json(done_file, done)


def recipe(name: str) -> tuple["PeftConfig", float]:
    """(configuration, learning rate) of the adapter for a domain."""
    from peft_fast import LoraConfig, PrefixTuningConfig

    if name == demo_data.CODE:
        return PrefixTuningConfig(num_virtual_tokens=16, task_type="CAUSAL_LM"), PREFIX_LEARNING_RATE
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    return lora, LORA_LEARNING_RATE


def train(model: "PeftModel", ids: Tensor, settings: Settings, rate: float, bar: "tqdm[Any]") -> None:
    """AdamW on random windows of the text, the rate warmed up and brought down to zero."""
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    warmup = max(1, settings.steps // 10)
    rates = [min((i + 1) / warmup, 0.5 * (1 + math.cos(math.pi * i / settings.steps))) for i in range(settings.steps)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rates[min(i, settings.steps - 1)])
    starts = torch.Generator().manual_seed(settings.seed)
    model.train()
    for _ in range(settings.steps):
        first = torch.randint(len(ids) - settings.length, (BATCH, 1), generator=starts)
        rows = ids[first + torch.arange(settings.length)].to(device)
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        bar.update()


def load_base(path: Path, device: torch.device) -> torch.nn.Module:
    """The base model in fp32 (its file is bf16), without a word from transformers' own progress bars."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: torch.nn.Module = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model.to(device)


def load_adapters(base: Path, adapters: Path, names: list[str], device: torch.device) -> "PeftModel":
    """One model with all adapters, read back from their directories; the first is LoRA, and takes the prefix too."""
    from peft_fast import PeftModel

    first, *others = names
    model = PeftModel.from_pretrained(load_base(base, device), adapters / first, adapter_name=first)
    for name in others:
        model.load_adapter(adapters / name, adapter_name=name)
    model.eval()
    return model


@torch.no_grad()
def compare(model: "PeftModel", texts: dict[str, list[str]], settings: Settings) -> dict[str, dict[str, float]]:
    """Held-out loss in nats per byte: {adapter or "base": {domain: loss}}."""
    device = next(model.parameters()).device
    rows = {name: demo_data.windows(demo_data.to_ids(domain), LENGTH).to(device) for name, domain in texts.items()}
    rows = {name: windows[: 12 if settings.quick else 32] for name, windows in rows.items()}

    def held_out() -> dict[str, float]:
        found = {}
        for name, windows in rows.items():
            found[name] = mean_loss(model, windows)
            bar.update()
        return found

    with tqdm(
        total=len(rows) * (len(rows) + 1), desc="comparing", unit="loss", dynamic_ncols=True, mininterval=0.5
    ) as bar:
        with model.disable_adapter():
            losses = {BASE_ROW: held_out()}
        for name in texts:
            model.set_adapter(name, inference_mode=True)
            losses[name] = held_out()
    return losses


def mean_loss(model: "PeftModel", rows: Tensor) -> float:
    """Mean over all windows (W, LENGTH) of one text."""
    total = 0.0
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        total += float(model(input_ids=part, labels=part).loss) * len(part)
    return total / len(rows)


def _fingerprint(base: Path) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        file = base / name
        digest.update(file.read_bytes() if file.is_file() else b"missing")
    return digest.hexdigest()[:16]
