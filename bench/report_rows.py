"""What all parts of the report read from a result file, and how they write numbers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Rows = dict[str, dict[str, dict[str, Any]]]  # case -> provider -> extra_info with median


class Entry(NamedTuple):
    """A line of the tables in README.md and docs/benchmarks.md, in words.

    peft, peft_fast: multiples of the base where there is one. ratio: peft_fast over peft, or over the strongest other.
    """

    label: str
    base: str
    peft: str
    peft_fast: str
    ratio: str


def suite_of(result: dict[str, Any]) -> str:
    """The suite that a file is of; files from before there were several are "lora"."""
    return str(result["peft_fast"].get("suite", "lora"))


def rows_of(result: dict[str, Any], group: str) -> Rows:
    """Cases of a group in the order they were measured; wrong ones carry "wrong" and no time."""
    rows: Rows = {}
    for benchmark in result["benchmarks"]:
        info = benchmark["extra_info"]
        if info["group"] == group:
            rows.setdefault(info["case"], {})[info["provider"]] = {**info, "median": benchmark["stats"]["median"]}
    for info in result["wrong"]:
        if info["group"] == group:
            rows.setdefault(info["case"], {})[info["provider"]] = {**info, "wrong": True}
    return rows


def machine(result: dict[str, Any]) -> str:
    """On what, with what."""
    about = result["peft_fast"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['device']}, {about['threads']} thread{'s' * (about['threads'] > 1)}, {versions}"


def where(result: dict[str, Any]) -> str:
    """One line: on what, with what, when."""
    about = result["peft_fast"]
    return f"{machine(result)}, commit {about['commit']}, {about['date']}"


def time_in_words(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def targets(cases: Mapping[str, Any], models: Rows, parts: Rows) -> list[str]:
    """Models that must be at least as fast as peft, met or missed; how peft_fast's parts stand to the strongest."""
    lines = []
    for name, by_provider in models.items():
        must, ours = getattr(cases.get(name), "must", None), by_provider.get("peft_fast", {})
        if must is not None and "ratio_to_peft" in ours:
            faster = 1 / ours["ratio_to_peft"]["median"]
            verdict = "met    " if faster >= must else "MISSED "
            lines.append(f"{verdict} {name}: {faster:.2f} times as fast as peft, must {must}")
    for name, by_provider in parts.items():
        ours = by_provider.get("peft_fast", {})
        if "ratio_to_strongest" in ours:
            ratio = ours["ratio_to_strongest"]
            spread = f"{ratio['low']:.2f}..{ratio['high']:.2f}"
            lines.append(f"        {name}: {ratio['median']:.2f} ({spread}) of the time of {ours['strongest']}")
    return lines


def memory_entry(label: str, row: dict[str, dict[str, Any]]) -> Entry:
    """How much a step's memory grows."""
    base, peft, ours = (row[who]["peak_bytes"] for who in ("base", "peft", "peft_fast"))
    cells = (f"{base / 1e6:.0f} MB", f"{peft / base:.2f}x", f"{ours / base:.2f}x", f"{ours / peft:.2f}")
    return Entry(f"growth of memory in the {label}", *cells)


def table(head: str, rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table. head: the columns' names, divided by bars."""
    return [f"|{head}|", "|---" * (head.count("|") + 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
