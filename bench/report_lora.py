"""The report's part on single LoRA adapters: lines of the tables."""

from typing import Any

from .report_rows import Entry, memory_entry, rows_of, table, time_in_words, where

LABELS = {
    "forward-bf16": "forward, 8 x 128 tokens, bf16",
    "one-token-bf16": "one token, bf16",
    "train-bf16-dropout": "training step, bf16, dropout 0.05",
    "train-bf16-adapters": "training step, bf16, bf16 adapters",
    "forward-fp32": "forward, 8 x 128 tokens, fp32",
    "one-token-fp32": "one token, fp32",
    "train-fp32-dropout": "training step, fp32, dropout 0.05",
}
MEMORY = "train-bf16-dropout"  # the case whose memory is shown


def entries(result: dict[str, Any]) -> dict[str, Entry]:
    """Lines by case; those of memory by "memory CASE"."""
    rows = rows_of(result, "model")
    found = {}
    for case, by_provider in rows.items():
        multiples = [f"{by_provider[name]['ratio_to_base']['median']:.2f}x" for name in ("peft", "peft_fast")]
        ratio = f"{by_provider['peft_fast']['ratio_to_peft']['median']:.2f}"
        found[case] = Entry(LABELS[case], time_in_words(by_provider["base"]["median"]), *multiples, ratio)
    if "peak_bytes" in rows.get(MEMORY, {}).get("base", {}):
        found[f"memory {MEMORY}"] = memory_entry(LABELS[MEMORY], rows[MEMORY])
    return found


def lines(result: dict[str, Any]) -> list[str]:
    """The whole table and what it is of."""
    return [
        *table(" | base | peft | peft_fast | peft_fast / peft ", list(entries(result).values())),
        "",
        "Llama with hidden size 512 and 8 layers, LoRA of rank 16 on all linear layers, as `get_peft_model` makes it. "
        "Medians of interleaved rounds, as multiples of the base model without an adapter. "
        f"`python -m bench run` on {where(result)}.",
    ]
