"""What `peft-fast train` leaves besides the adapter: numbers, the loss curve as a picture, and how to load it."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from .options import Options

AUTO = {
    "causal-lm": "AutoPeftModelForCausalLM",
    "seq2seq": "AutoPeftModelForSeq2SeqLM",
}
BASE_CONFIG = "base_config.json"  # of a classifier: labels, and the token that fills rows up
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")
Log = Sequence[Mapping[str, float]]


def results(log: Log, options: Options, classes: Sequence[str | int], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The content of results.json: settings, numbers of the run, losses by step."""
    losses = [[entry["step"], entry["loss"]] for entry in log if "loss" in entry]
    evaluations = [
        {key: entry[key] for key in ("step", "eval_loss", "eval_perplexity", "eval_accuracy") if key in entry}
        for entry in log
        if "eval_loss" in entry
    ]
    found: dict[str, Any] = {"settings": options.of_the_result(), **numbers}
    if classes:
        found["labels"] = list(classes)
    return {**found, "losses": losses, "evaluations": evaluations}


def summary(found: Mapping[str, Any]) -> str:
    """A few lines of it, for people."""
    losses, evaluations = found["losses"], found["evaluations"]
    earlier = f" ({found['steps_before']} of them by earlier runs)" if found["steps_before"] else ""
    lines = [
        f"trainable parameters: {found['trainable_parameters']:,} of {found['parameters']:,}",
        f"steps: {found['steps']}{earlier}, {found['seconds']:.1f} s with loading",
    ]
    if losses:
        lines.append(f"loss: {losses[0][1]:.4f} (step {losses[0][0]}) -> {losses[-1][1]:.4f} (step {losses[-1][0]})")
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        rows = found["rows_held_out"]
        for key in ("eval_loss", "eval_perplexity", "eval_accuracy"):
            if key in last:
                name = key.removeprefix("eval_")
                lines.append(f"held out, {rows} rows: {name} {first[key]:.4f} -> {last[key]:.4f}")
    if "best_step" in found:
        lines.append(f"kept: the adapter of step {found['best_step']}, with the least loss held out")
    if found["rows_cut"]:
        lines.append(
            f"{found['rows_cut']} of {found['rows_read']} rows that were read were cut to {found['max_length']} tokens "
            "(--max-length)"
        )
    return "\n".join(lines)


def how_to_use(options: Options, found: Mapping[str, Any], keys: Sequence[str]) -> str:
    """A line for Python, and before it one for the shell where `peft-fast generate` takes what was trained."""
    load = _how_to_load(options, found)
    if options.task == "seq-cls" or options.method in ("prompt", "p-tuning") or "messages" in keys:
        return load
    name = NOT_IN_NAMES.sub("_", options.out.resolve().name).strip("_.") or "adapter"
    return (
        f"use it: peft-fast generate --model {quote(str(options.model))} --adapters {quote(f'{name}={options.out}')} "
        f'--in requests.jsonl --out results.jsonl, a request being {{"prompt": ..., "adapter": "{name}"}}\n{load}'
    )


def _how_to_load(options: Options, found: Mapping[str, Any]) -> str:
    """One line of Python."""
    if "labels" not in found:
        name = AUTO[options.task]
        return f'load it: from peft_fast import {name}; model = {name}.from_pretrained("{options.out}")'
    config = f'config=AutoConfig.from_pretrained("{options.out / BASE_CONFIG}")'
    config += ", ignore_mismatched_sizes=True" if found["head_replaced"] else ""
    return (
        "load it: from transformers import AutoConfig, AutoModelForSequenceClassification; from peft_fast import "
        f'PeftModel; base = AutoModelForSequenceClassification.from_pretrained("{options.model}", {config}); '
        f'model = PeftModel.from_pretrained(base, "{options.out}")'
    )


def draw(found: Mapping[str, Any], file: Path) -> str:
    """Write the losses as a picture and return the sentence that says so, or why not."""
    try:
        import matplotlib
    except ImportError:
        return 'no picture: matplotlib is not installed (pip install "peft_fast[plots]")'
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    steps, losses = [step for step, _ in found["losses"]], [loss for _, loss in found["losses"]]
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    many = len(losses) > 30
    axes.plot(steps, losses, color="C0", alpha=0.35 if many else 1.0, linewidth=1.0, label="training, a step")
    if many:
        axes.plot(steps, smoothed(losses), color="C0", linewidth=1.8, label="training, smoothed")
    if evaluations := found["evaluations"]:
        at = [entry["step"] for entry in evaluations]
        axes.plot(at, [entry["eval_loss"] for entry in evaluations], color="C1", marker="o", label="held out")
    if all("eval_accuracy" in entry for entry in evaluations) and evaluations:
        right = axes.twinx()
        right.plot(at, [entry["eval_accuracy"] for entry in evaluations], color="C2", marker="s", linestyle=":")
        right.set_ylabel("accuracy, held out (dotted)", color="C2")
        right.set_ylim(0, 1.02)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.set_ylabel("loss, nats per label" if "labels" in found else "loss, nats per token")
    axes.set_title(f"{found['settings']['--method']} on {found['base']}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    part = file.with_name(f".{file.name}.{os.getpid()}")
    figure.savefig(part, dpi=130, format="png")
    pyplot.close(figure)
    part.replace(file)
    return f"picture of the losses: {file}"


def smoothed(values: Sequence[float]) -> list[float]:
    """Running means over up to 1/15 of the values on each side, fewer at the ends."""
    reach = max(1, len(values) // 15)
    found = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        part = values[i - near : i + near + 1]
        found.append(sum(part) / len(part))
    return found
