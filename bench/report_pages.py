"""What README.md and docs/benchmarks.md show of the committed results: headlines there, everything here."""

from pathlib import Path
from typing import Any

from . import report_lora, report_mixed, report_prefix, report_quant
from .report_rows import machine, table
from .run import HERE

README = HERE.parent / "README.md"
BENCHMARKS = HERE.parent / "docs" / "benchmarks.md"
SUITES: dict[str, tuple[str, Any]] = {  # suite -> its block in docs/benchmarks.md, its part of the report
    "lora": ("cpu", report_lora),
    "mixed": ("mixed", report_mixed),
    "prefix": ("prefix", report_prefix),
    "quant": ("quant", report_quant),
}
HEADLINES = {  # suite -> (title, lines that README.md shows, the one with the worst ratio among them)
    "lora": (
        "LoRA",
        (
            *("forward-bf16", "one-token-bf16", "train-bf16-dropout", "train-bf16-adapters"),
            "memory train-bf16-dropout",
        ),
    ),
    "mixed": (
        "mixed batch",
        (
            *("mixed-32x1-32of32-bf16-adapters", "mixed-8x1-1of100-fp32", "mixed-32x64-8of32-bf16-adapters"),
            *("load_adapter-as-number-100", "set_adapter-as-number-100"),
        ),
    ),
    "prefix": (
        "prefix",
        (
            *("train-16x64-P128-fp32", "train-16x64-P128-bf16", "memory train-16x64-P128-fp32"),
            *("generate-16x32-P128-fp32", "generate-16x32-P128-fp32-4prefixes"),
            *("fwd-8x128-P1024-fp32", "decode-8x256-P128-fp32-4prefixes"),
        ),
    ),
    "quant": (
        "quantized base",
        (
            *("train-8x128-nf4-bf16-autocast-p0.05", "train-8x128-nf4-fp32", "train-8x128-int8-bf16-autocast-p0.05"),
            *("memory train-8x128-nf4-bf16-autocast-p0.05", "fwd-1x1-nf4-bf16", report_quant.WORST),
        ),
    ),
}
ON_GPU = {
    "LoRA": ("one layer of Llama-3-8B's sizes, forward, decode step and backward",),
    "mixed batch": ("one layer, and decode steps of Llama-3-8B's sizes",),
    "prefix": (
        "attention forward",
        "attention forward and backward",
        "attention of a decode step, FlexAttention among the others",
        "training step and decode step of Llama-3-8B's sizes",
    ),
    "quantized base": (
        "dequantizing NF4 at Llama-3-8B's sizes",
        "one layer, 1 to 64 tokens and 2048 to 16384",
        "QLoRA step of four layers of Llama-3-8B's sizes",
    ),
}
NOT_YET = "not measured yet"
Results = dict[str, dict[str, Any] | None]  # suite -> its committed file, None if it was not measured


def pages(results: Results) -> dict[Path, str]:
    """The texts that the two pages must have. Raises: ValueError for results of a --quick or --dry run."""
    for result in results.values():
        if result is not None and (result["peft_fast"]["quick"] or result["peft_fast"]["dry"]):
            raise ValueError("the pages show whole runs of `python -m bench run`, and this one was --quick or --dry")
    text = BENCHMARKS.read_text()
    for suite, (block, part) in SUITES.items():
        result = results[suite]
        text = with_block(text, block, f"{NOT_YET.capitalize()}." if result is None else "\n".join(part.lines(result)))
    gpu = [(f"{title}: {what}", NOT_YET) for title, rows in ON_GPU.items() for what in rows]
    text = with_block(text, "gpu", "\n".join(table(" | ", gpu)))
    return {README: with_block(README.read_text(), "headlines", "\n".join(headlines(results))), BENCHMARKS: text}


def headlines(results: Results) -> list[str]:
    """README's table."""
    rows: list[tuple[str, ...]] = []
    for suite, (title, cases) in HEADLINES.items():
        result = results[suite]
        found = {} if result is None else SUITES[suite][1].entries(result)
        of_suite = dict.fromkeys(found[case] for case in cases if found)  # the worst may be one that is shown anyway
        rows += [(f"{title}: {label}", *cells) for label, *cells in of_suite]
        if not found:
            rows.append((title, NOT_YET, *"---"))
    rows += [(f"GPU: {title}", NOT_YET, *"---") for title in ON_GPU]
    machines = dict.fromkeys(machine(result) for result in results.values() if result is not None)
    # one that says the same and more, as of bitsandbytes, says it for both
    measured = "; ".join(m for m in machines if not any(o != m and o.startswith(m) for o in machines))
    return [*table(" | base | peft | peft_fast | ratio ", rows), "", f"CPU: {measured or NOT_YET}."]


def with_block(text: str, name: str, content: str) -> str:
    """A page with the content between two marks replaced. Raises: ValueError if they are not there once each."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must contain {begin} and {end} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
