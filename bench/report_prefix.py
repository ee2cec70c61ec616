"""The report's part on prefixes: README's table and targets."""

from typing import Any

from .cases import PrefixModelCase, PrefixPromptCase, PrefixSiteCase, cpu_prefix

Rows = dict[str, dict[str, dict[str, Any]]]
CASES = {str(case): case for case in cpu_prefix(quick=False)}
COLUMNS = ("peft", "two calls", "peft_fast")
INSTEAD = {"peft": "concatenated"}  # with several prefixes
ON_GPU = (
    "attention forward",
    "attention forward and backward",
    "attention of a decode step, FlexAttention among the others",
    "training step and decode step of Llama-3-8B's sizes",
)
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


def targets(attention: Rows, models: Rows) -> list[str]:
    """What must be at least as fast as peft, met or missed; and how peft_fast's attention stands to the strongest."""
    lines = []
    for name, by_provider in models.items():
        case, ours = CASES.get(name), by_provider.get("peft_fast", {})
        if isinstance(case, PrefixModelCase) and case.must is not None and "ratio_to_peft" in ours:
            faster = 1 / ours["ratio_to_peft"]["median"]
            verdict = "met    " if faster >= case.must else "MISSED "
            lines.append(f"{verdict} {name}: {faster:.2f} times as fast as peft, must {case.must}")
    for name, by_provider in attention.items():
        ours = by_provider.get("peft_fast", {})
        if "ratio_to_strongest" in ours:
            ratio = ours["ratio_to_strongest"]
            spread = f"{ratio['low']:.2f}..{ratio['high']:.2f}"
            lines.append(f"        {name}: {ratio['median']:.2f} ({spread}) of the time of {ours['strongest']}")
    return lines


def readme_lines(attention: Rows, prompts: Rows, models: Rows, time: Any) -> list[str]:
    """The table for README.md. time: seconds in words."""
    lines = ["| | no prefix | peft | two calls | peft_fast | peft_fast / best other |", "|---" * 6 + "|"]
    for name, by_provider in (attention | models).items():
        cells = [time(by_provider["base"]["median"])]
        for who in COLUMNS:
            info = by_provider.get(who) or by_provider.get(INSTEAD.get(who, ""))
            cells.append(f"{info['ratio_to_base']['median']:.2f}x" if info else "-")
        ours = by_provider["peft_fast"]
        ratio = ours.get("ratio_to_strongest") or ours["ratio_to_peft"]
        cells.append(f"{ratio['median']:.2f}")
        lines.append(_row(label(name), cells))
    for name, by_provider in prompts.items():
        cells = [time(by_provider[who]["median"]) for who in ("peft", "peft_fast")]
        ratio = f"{by_provider['peft_fast']['ratio_to_peft']['median']:.2f}"
        lines.append(_row(label(name), ["-", cells[0], "-", cells[1], ratio]))
    for name, by_provider in models.items():
        if "peak_bytes" not in by_provider["base"]:
            continue
        base, peft, ours = (by_provider[who]["peak_bytes"] for who in ("base", "peft", "peft_fast"))
        cells = [f"{base / 1e6:.0f} MB", f"{peft / base:.2f}x", "-", f"{ours / base:.2f}x", f"{ours / peft:.2f}"]
        lines.append(_row(f"growth of memory in the {label(name)}", cells))
    return lines + [_row(f"GPU: {what}", ["not measured yet", *"----"]) for what in ON_GPU]


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"
