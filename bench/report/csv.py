"""All numbers of result files as one table, a row per case and provider: for spreadsheets and other programs."""

import csv
import json
from pathlib import Path
from typing import Any

from .rows import Files, all_rows

# Always there, in this order; columns for whatever else the rows have come after these.
_FIRST = (
    *("suite", "step", "group", "case", "words", "provider", "wrong"),
    *("median_seconds", "q1_seconds", "q3_seconds", "rounds"),
    *(f"{ratio}_{part}" for ratio in ("ratio_to_base", "ratio_to_peft") for part in ("median", "low", "high")),
    *("strongest", "ratio_to_strongest_median", "ratio_to_strongest_low", "ratio_to_strongest_high"),
    *("share_of_roofline", "roofline_seconds", "bytes", "flops", "dtype", "error", "error_over_budget"),
    *("peak_bytes", "saved_bytes", "peak_bytes_to_base", "tokens_per_second"),
    *("graph_median_seconds", "graph_low_seconds", "graph_high_seconds", "sweeps"),
)
_LAST = (
    *("device", "driver", "threads", "torch", "triton", "transformers", "peft", "bitsandbytes"),
    *("commit", "date", "quick", "dry", "file"),
)
_SECONDS = ("median", "q1", "q3", "graph_median", "graph_low", "graph_high")  # get their unit in the column's name


def write(files: Files, path: Path) -> None:
    """Write the table. A number that a row does not have is an empty cell, as are the times of wrong rows."""
    rows = [_row(stem, result, info) for stem, result in files.items() for info in all_rows(result)]
    more = dict.fromkeys(name for row in rows for name in row if name not in _FIRST and name not in _LAST)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*_FIRST, *more, *_LAST], restval="")
        writer.writeheader()
        writer.writerows(rows)


def _row(stem: str, result: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    about = result["peft_fast"]
    row = _flat({"wrong": False, **info})
    row |= {name: about.get(name, "") for name in ("step", "device", "driver", "threads", "commit", "date")}
    row |= {name: about.get("versions", {}).get(name, "") for name in _LAST[3:8]}
    return row | {"suite": about.get("suite", ""), "quick": about.get("quick"), "dry": about.get("dry"), "file": stem}


def _flat(info: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"graph": {"median": 1}} as {"graph_median_seconds": 1}; sweeps, whose titles are no column names, as JSON."""
    flat: dict[str, Any] = {}
    for key, value in info.items():
        name = prefix + key
        if isinstance(value, dict) and name != "sweeps":
            flat |= _flat(value, f"{name}_")
        elif isinstance(value, dict | list):
            flat[name] = json.dumps(value)
        else:
            flat[f"{name}_seconds" if name in _SECONDS else name] = value
    return flat
