"""The report's part on prefixes: lines of the tables, and targets."""

from typing import Any

from .cases import PrefixModelCase, PrefixPromptCase, PrefixSiteCase, cpu_prefix
from .report_rows import Entry, memory_entry, rows_of, table, time_in_words, where

CASES = {str(case): case for case in cpu_prefix(quick=False)}
_MODES = {"fwd": "forward", "train": "forward and backward", "decode": "of a decode step"}


def label(name: str) -> str:
    """A case in words."""
    case = CASES.get(name)
    if isinstance(case, PrefixPromptCase):
        return f"from a projection to keys and values, {_MODES[case.mode]}, {case.rows} rows, P = {case.prefix}"
    if isinstance(case, PrefixSiteCase):
        many = f", {case.prefixes} prefixes" if case.prefixes > 1 else ""
        return (
            f"attention {_MODES[case.mode]}, {case.rows} x {case.tokens} tokens, P = {case.prefix}{many}, {case.dtype}"
        )
    if isinstance(case, PrefixModelCase):
        many = f", {case.prefixes} prefixes" if case.prefixes > 1 else ""
        what = "training step" if case.mode == "train" else f"generating {case.new} tokens"
        prompt = "" if case.mode == "train" else " of prompt, padded" if case.padded else " of prompt"
        return f"{what}, {case.rows} x {case.tokens} tokens{prompt}, P = {case.prefix}{many}, {case.dtype}"
    return name


def entries(result: dict[str, Any]) -> dict[str, Entry]:
    """Lines by case; those of memory by "memory CASE"."""
    attention, prompts, models = (rows_of(result, f"prefix {what}") for what in ("attention", "prompt", "model"))
    found = {}
    for name, by_provider in (attention | models).items():
        ours = by_provider["peft_fast"]
        peft = by_provider.get("peft") or by_provider["concatenated"]  # with several prefixes
        multiples = [f"{info['ratio_to_base']['median']:.2f}x" for info in (peft, ours)]
        ratio = ours.get("ratio_to_strongest") or ours["ratio_to_peft"]
        base = time_in_words(by_provider["base"]["median"])
        found[name] = Entry(label(name), base, *multiples, f"{ratio['median']:.2f}")
    for name, by_provider in prompts.items():
        times = [time_in_words(by_provider[who]["median"]) for who in ("peft", "peft_fast")]
        ratio = by_provider["peft_fast"]["ratio_to_peft"]
        found[name] = Entry(label(name), "-", *times, f"{ratio['median']:.2f}")
    for name, by_provider in models.items():
        if "peak_bytes" in by_provider["base"]:
            found[f"memory {name}"] = memory_entry(label(name), by_provider)
    return found


def lines(result: dict[str, Any]) -> list[str]:
    """The whole table and what it is of."""
    attention, rows = rows_of(result, "prefix attention"), []
    for name, entry in entries(result).items():
        two_calls = attention.get(name, {}).get("two calls")
        cell = f"{two_calls['ratio_to_base']['median']:.2f}x" if two_calls else "-"
        rows.append((*entry[:3], cell, *entry[3:]))
    return [
        *table(" | no prefix | peft | two calls | peft_fast | peft_fast / best other ", rows),
        "",
        "P: learned tokens. Attention: 8 query heads, 2 of keys, size 64. Models: a Llama with hidden size 512 and 4 "
        "layers of such heads. Medians of interleaved rounds, as multiples of the same without a prefix. `two calls`: "
        "torch's flash attention of the text and of the prefix, merged by their logs of sums. With several prefixes, "
        "rows take them in turn: peft generates for one after another, and its attention is shown as if it could mix "
        "them. Memory: the most that tensors hold during a step, above what they held before. "
        f"`python -m bench run --suite prefix` on {where(result)}.",
    ]
