"""The report's part on quantized bases: lines of the tables, and targets."""

from typing import Any

from .cases import QuantModelCase, QuantSiteCase, QuantWeightCase, cpu_quant
from .report_rows import Entry, memory_entry, rows_of, table, time_in_words, where

CASES = {str(case): case for case in cpu_quant(quick=False)}
WORST = "worst"  # among `entries`: the line with the largest ratio once more
_KINDS = {"nf4": "NF4", "int8": "int8"}


def label(name: str) -> str:
    """A case in words."""
    case = CASES.get(name)
    if isinstance(case, QuantWeightCase):
        return f"dequantizing NF4, {case.N} x {case.K}, to {case.dtype}"
    if isinstance(case, QuantSiteCase):
        mode = "forward and backward" if case.mode == "train" else "forward"
        sizes = f"one layer {case.N} x {case.K}, {_KINDS[case.kind]}, {mode}, {_tokens(case.M)}, {case.dtype}"
        return sizes + (f", dropout {case.dropout}" if case.dropout else "")
    if isinstance(case, QuantModelCase):
        kind, dtype = _KINDS[case.kind], case.dtype + " autocast" * case.autocast
        dropout = f", dropout {case.dropout}" if case.dropout else ""
        if case.mode == "train":
            what = "QLoRA step" if case.kind == "nf4" else "training step"
            return f"{what}, {kind}, {case.rows} x {case.tokens} tokens, {dtype}{dropout}"
        if case.rows * case.tokens == 1:
            return f"one token, {kind}, {dtype}"
        return f"forward, {kind}, {case.rows} x {case.tokens} tokens, {dtype}"
    return name


def _tokens(M: int) -> str:
    return "one token" if M == 1 else f"{M} tokens"


def entries(result: dict[str, Any]) -> dict[str, Entry]:
    """Lines by case; those of memory by "memory CASE"; the one with the largest ratio again as ``WORST``."""
    weights, sites, models = (rows_of(result, f"quant {what}") for what in ("weight", "site", "model"))
    found = {}
    for name, by_provider in (models | sites).items():
        multiples = [f"{by_provider[who]['ratio_to_base']['median']:.2f}x" for who in ("peft", "peft_fast")]
        ratio = by_provider["peft_fast"]["ratio_to_peft"]["median"]
        found[name] = Entry(label(name), time_in_words(by_provider["base"]["median"]), *multiples, f"{ratio:.2f}")
    for name, by_provider in weights.items():  # peft leaves that to bitsandbytes
        times = [time_in_words(by_provider[who]["median"]) for who in ("bitsandbytes", "peft_fast")]
        ratio = by_provider["peft_fast"]["ratio_to_strongest"]["median"]
        found[name] = Entry(label(name), "-", *times, f"{ratio:.2f}")
    for name, by_provider in models.items():
        if "peak_bytes" in by_provider["base"]:
            found[f"memory {name}"] = memory_entry(label(name), by_provider)
    return found | ({WORST: max(found.values(), key=lambda entry: float(entry.ratio))} if found else {})


def lines(result: dict[str, Any]) -> list[str]:
    """The whole table and what it is of, with the pictures."""
    weights, rows = rows_of(result, "quant weight"), []
    for name, entry in entries(result).items():
        if name != WORST:
            plain = weights.get(name, {}).get("plain torch")
            rows.append((*entry[:3], time_in_words(plain["median"]) if plain else "-", *entry[3:]))
    return [
        *table(" | base | peft | plain torch | peft_fast | peft_fast / best other ", rows),
        "",
        "NF4 with double quantization, int8 as LLM.int8(), both of bitsandbytes. Llama with hidden size 512 and 4 "
        "layers, loaded quantized, LoRA of rank 16 on all linear layers; for training and under autocast prepared by "
        "`prepare_model_for_kbit_training`, else as loaded. Base: the same without an adapter; in training it brings "
        "the gradient back to its input. Medians of interleaved rounds, as multiples of the base. Dequantizing: peft "
        "takes bitsandbytes' function, and all bits are compared. Memory: the most that tensors hold during a step, "
        "above what they held before. "
        f"`python -m bench run --suite quant` on {where(result)}.",
        "",
        "![A model on a quantized base](../bench/results/cpu-quant-model.png)",
        "",
        "![Single quantized layers](../bench/results/cpu-quant-site.png)",
    ]
