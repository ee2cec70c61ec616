"""What all parts of the report read from a result file, and how they write numbers."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..cases.suites import SUITES

Rows = dict[str, dict[str, dict[str, Any]]]  # case -> provider -> extra_info with median
Files = dict[str, dict[str, Any]]  # stem of a result file -> what is in it


class Spread(NamedTuple):
    """Median over rounds, with the quartiles; all three the same where only one number is known."""

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Of a ratio of times: "win" below 0.98 or "loss" above 1.02, if 1 is outside the quartiles too; else ""."""
        if self.median > 1.02 and self.low > 1:
            return "loss"
        return "win" if self.median < 0.98 and self.high < 1 else ""

    @property
    def inverse(self) -> "Spread":
        """Of a ratio of times: how many times as fast."""
        return Spread(1 / self.median, 1 / self.high, 1 / self.low)


def load(folder: Path) -> Files:
    """The result files in a folder, suites first.

    Raises: FileNotFoundError if there is no such folder, or no JSON in it; ValueError naming a file that is broken or
    no result of the benchmarks.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    paths = sorted(folder.glob("*.json"), key=lambda p: (SUITES.index(p.stem) if p.stem in SUITES else len(SUITES), p))
    if not paths:
        raise FileNotFoundError(f"no result files (*.json) in {folder}")
    return {path.stem: _load(path) for path in paths}


def _load(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict) or not {"peft_fast", "wrong", "benchmarks"} <= set(result):
        raise ValueError(f"{path} is no result of the benchmarks: peft_fast, wrong and benchmarks belong into it")
    return result


def all_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """extra_info of every row, with median, q1, q3 and rounds; then of the wrong ones, with "wrong" and no times."""
    rows = []
    for benchmark in result["benchmarks"]:
        stats = benchmark["stats"]
        times = {name: stats[name] for name in ("median", "q1", "q3", "rounds") if name in stats}
        rows.append({**benchmark["extra_info"], **times})
    return rows + [{**info, "wrong": True} for info in result["wrong"]]


def rows_of(result: dict[str, Any], group: str) -> Rows:
    """Cases of a group in the order they were measured; wrong ones carry "wrong" and no time."""
    rows: Rows = {}
    for info in all_rows(result):
        if info["group"] == group:
            rows.setdefault(info["case"], {})[info["provider"]] = info
    return rows


def groups_of(result: dict[str, Any]) -> list[str]:
    """The groups with cases, in the order they were measured; "ceilings" are none."""
    return [group for group in dict.fromkeys(info["group"] for info in all_rows(result)) if group != "ceilings"]


def words_of(info: dict[str, Any]) -> str:
    """A row's case in words, in one line of printable text; its id where there are no words."""
    words = str(info.get("words") or info["case"])
    return " ".join("".join(c if c.isprintable() else " " for c in words).split())


def spread_of(info: dict[str, Any], name: str) -> Spread | None:
    """What a row has under a name, {median, low, high} or one number; None if it has not, or no positive number."""
    value = info.get(name)
    if value is None:
        return None
    values = Spread(value["median"], value["low"], value["high"]) if isinstance(value, dict) else Spread(*[value] * 3)
    return values if all(0 < v < float("inf") for v in values) else None


def machine(result: dict[str, Any]) -> str:
    """On what, with what."""
    about = result["peft_fast"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    device = about["device"] + (f" ({about['instructions']})" if about.get("instructions") else "")
    return f"{device}, {about['threads']} thread{'s' * (about['threads'] > 1)}, {versions}"


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


def table(head: str, rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table. head: the columns' names, divided by bars."""
    return [f"|{head}|", "|---" * (head.count("|") + 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
