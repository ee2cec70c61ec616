"""``python -m bench tables FILE``: what follows from first contact's JSON: README.md, docs/benchmarks.md, the tables.

measured_rows   every implementation with its gain over the safe path, at the sizes measured
shipped_rows    of these the winners, where they won by ``LEAST_GAIN``
table_rows      the rows of csrc_triton/tables/choice.json that say so
overview        for people, at the end of a run
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_fast.tuning.table import write_whole

LEAST_GAIN = 1.10
ROOT = Path(__file__).resolve().parents[2]
MARKS = "<!-- gpu -->", "<!-- /gpu -->"
_KEY = ("op", "mode", "dtype", "adapters", "M", "N", "K", "R", "dropout")
# What runs where nothing was measured; the first that was timed counts. Of lora_linear with dropout: "addmm".
SAFE = {
    "lora_linear": ("torch", "plain torch"),
    "lora_mixed": ("grouped",),
    "prefix_attention": ("flash", "two calls"),
    "dequantize_4bit": ("bitsandbytes", "plain torch"),
    "lora_linear_4bit": ("bitsandbytes + lora", "dequantize + addmm"),
    "lora_linear_int8": ("bitsandbytes + lora",),
}
# What has a table of choices, and first contact's names of what the library calls otherwise.
_CHOSEN: dict[str, dict[str, str]] = {
    "lora_linear": {}, "lora_mixed": {}, "dequantize_4bit": {}, "lora_linear_4bit": {}, "lora_linear_int8": {},
}  # fmt: skip
_SAFE_NAME = dict.fromkeys(_CHOSEN, "torch") | {"lora_mixed": "grouped"}
# Whose configuration a row's "config" is.
KERNELS = {
    ("lora_linear", "one_launch"): "lora_one_launch",
    ("lora_mixed", "one_launch"): "mixed_one_launch",
    ("lora_linear_4bit", "kernel"): "fourbit_linear",
    ("prefix_attention", "kernel"): "prefix_dkv",
}
Row = dict[str, Any]
Times = dict[str, Row]


def read(path: Path) -> dict[str, Any]:
    """The document of a run.    Raises: ValueError where the file is something else."""
    found: Any = json.loads(path.read_text())
    if not isinstance(found, dict) or not {"about", "phases", "rows"} <= found.keys():
        raise ValueError(f"{path}: expected the gpu.json that first-contact writes, with about, phases and rows")
    return found


def groups(document: dict[str, Any]) -> Iterator[tuple[Row, bool, Times]]:
    """(a row for its sizes, whether as replays of a graph, provider -> its row) of all that was timed at one place."""
    found: dict[tuple[Any, ...], Times] = {}
    for row in document["rows"]:
        if row["us_median"] is not None and row["ok"] and row["op"] in (*SAFE, "decode step", "training step"):
            name = row["impl"].removeprefix("peft_fast:") + (f"@{row['config']}" if row["config"] else "")
            found.setdefault((*(row[key] for key in _KEY), row["graph"]), {})[name] = row
    for key, times in found.items():
        yield next(iter(times.values())), key[-1], times


def safe_of(row: Row, times: Times) -> str | None:
    """The provider that is the safe path at this place, if it was timed."""
    names = ("addmm",) if row["op"] == "lora_linear" and row["dropout"] else SAFE.get(row["op"], ())
    return next((name for name in names if name in times), None)


def measured_rows(document: dict[str, Any]) -> list[Row]:
    """Each implementation of ours: {op, implementation, kernel, config, label of dtype, sizes, times, gain, gpu}.

    config: a candidate's label, "" the default; kernel: whose. gain: the safe path's time over its own, None where
    that has none. Times are those of graph replays where they were taken: few tokens run from graphs.
    """
    about, rows = document["about"], {}
    for row, graph, times in groups(document):
        safe = safe_of(row, times)
        for found in times.values():
            if not found["impl"].startswith("peft_fast:"):
                continue
            impl = found["impl"].removeprefix("peft_fast:")
            key = (*(found[name] for name in _KEY), impl, found["config"])
            if key in rows and not graph:
                continue
            rows[key] = {name: found[name] for name in (*_KEY, "config", "graph", "us_median")} | {
                "implementation": impl, "kernel": KERNELS.get((found["op"], impl), ""), "gpu": about["device"],
                "gain": None if safe is None else round(times[safe]["us_median"] / found["us_median"], 4),
                "safe": safe or "", "arch": about["arch"], "torch": about["versions"]["torch"],
                "triton": ".".join(about["versions"]["triton"].split(".")[:2]), "date": about["date"],
                "commit": about["commit"],
            }  # fmt: skip
    return list(rows.values())


def shipped_rows(document: dict[str, Any]) -> list[Row]:
    """The fastest of ``measured_rows`` at each place where it is not the safe path and gains ``LEAST_GAIN`` over it."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in measured_rows(document):
        key = tuple(row[name] for name in _KEY)
        if row["implementation"] == row["safe"] or row["gain"] is None or row["gain"] < LEAST_GAIN:
            continue
        if key not in best or row["us_median"] < best[key]["us_median"]:
            best[key] = row
    return list(best.values())


def table_rows(document: dict[str, Any]) -> list[Row]:
    """Rows of the table of choices. At each N, K and R they end at the largest M that something won at.

    A row speaks for all M from the next smaller one on, so an implementation has to win at both ends. Where it does not
    the row says the safe path, so that rows of larger M do not reach down there.
    """
    places: dict[tuple[Any, ...], dict[int, dict[str, Row]]] = {}
    for row in measured_rows(document):
        training = row["mode"] == "train"
        if row["op"] in _CHOSEN and row["gain"] is not None and not row["config"] and training == bool(row["dropout"]):
            place = tuple(row[name] for name in ("op", "dtype", "dropout", "N", "K", "R"))
            at = places.setdefault(place, {}).setdefault(row["M"], {})
            name = _CHOSEN[row["op"]].get(row["implementation"], row["implementation"])
            at[name] = min(at.get(name, row), row, key=lambda found: found["gain"])  # of several mixes the worst
    found = []
    for (op, dtype, dropout, N, K, R), by_m in places.items():
        rows, below = [], None
        for M in sorted(by_m):
            winners = {
                name: row
                for name, row in by_m[M].items()
                if row["gain"] >= LEAST_GAIN and (below is None or (name in below and below[name]["gain"] >= 1.0))
            }
            name = max(winners, key=lambda name: winners[name]["gain"], default="")
            row = winners.get(name) or next(iter(by_m[M].values()))
            safe = "addmm" if op == "lora_linear" and dropout else _SAFE_NAME[op]
            rows.append(
                dict(op=op, dtype=dtype, dropout=bool(dropout), M=M, N=N, K=K, R=R, implementation=name or safe)
                | dict(gain=row["gain"] if name else 1.0)
                | {key: row[key] for key in ("arch", "gpu", "torch", "triton", "date", "commit")}
            )
            below = by_m[M]
        while rows and rows[-1]["gain"] < LEAST_GAIN:
            rows.pop()
        found += rows
    return found


def ship(document: dict[str, Any], folder: Path) -> int:
    """Write ``table_rows`` into the table of choices there, in place of what this GPU said before; how many."""
    path, rows = folder / "choice.json", table_rows(document)
    known = json.loads(path.read_text()) if path.exists() else []
    kept = [row for row in known if row["gpu"] != document["about"]["device"]]
    write_whole(path, "[\n" + ",\n".join(json.dumps(row) for row in [*kept, *rows]) + "\n]\n")
    return len(rows)


# ---------------------------------------------------------------------------------------------------------- for people
def _words(row: Row, graph: bool) -> str:
    sizes = f"M {row['M']} N {row['N']} K {row['K']} R {row['R']}"
    more = [f"p {row['dropout']}" if row["dropout"] else "", row["adapters"], "graph" if graph else ""]
    return " ".join([row["op"], row["mode"], sizes, *filter(None, more)])


def _us(times: Times, *names: str) -> float | None:
    found: list[float] = [times[name]["us_median"] for name in names if name in times]
    return min(found, default=None)


def _ours(row: Row, times: Times) -> tuple[str, float] | None:
    """The fastest that is ours and not the safe path."""
    safe = safe_of(row, times)
    mine = [name for name, found in times.items() if found["impl"].startswith("peft_fast") and name != safe]
    return min(((name, times[name]["us_median"]) for name in mine), key=lambda pair: pair[1], default=None)


def overview(document: dict[str, Any]) -> str:
    """A table of us, what was wrong, and how far the phases came."""
    about = document["about"]
    lines = [f"{about.get('device')}, commit {about.get('commit')}", ""]
    head = f"{'us':<74}{'base':>9}{'peft':>9}{'safe':>9}{'ours':>9}  over safe, which"
    lines.append(head)
    for row, graph, times in groups(document):
        safe, ours = safe_of(row, times), _ours(row, times)
        cells = [_us(times, "base"), _us(times, "peft"), _us(times, safe or ""), ours and ours[1]]
        gain = f"{cells[2] / cells[3]:.2f}x" if cells[2] and cells[3] else "-"
        shown = "".join(f"{'-' if us is None else f'{us:.1f}':>9}" for us in cells)
        lines.append(f"{_words(row, graph):<74.74}{shown}  {gain} {ours[0] if ours else ''}")
    wrong = [row for row in document["rows"] if not row["ok"]]
    lines += ["", f"{len(wrong)} failed or wrong of {len(document['rows'])} rows"]
    lines += [f"  {row['phase']}: {row['case']} {row['impl']}: {row['note']}"[:160] for row in wrong[:25]]
    done = [f"{p['phase']} {p['done']}/{p['cases']} in {p['seconds']:.0f} s" for p in document["phases"]]
    return "\n".join([*lines, "phases: " + ", ".join(done)])


def sentence(document: dict[str, Any]) -> str:
    """For README.md: the times of whole models, as multiples of the base's or of peft's."""
    about, found = document["about"], []
    for row, graph, times in groups(document):
        ours, base, peft = _us(times, "peft_fast", "peft_fast ids"), _us(times, "base"), _us(times, "peft")
        if row["op"] not in ("decode step", "training step") or ours is None:
            continue
        what = f"{row['op']}, M = {row['M']}{', graph' if graph else ''}: {ours / 1e3:.1f} ms"
        of = [f"{ours / us:.2f}x of {name}" for name, us in (("the base", base), ("peft", peft)) if us is not None]
        found.append(f"{what} ({', '.join(of)})")
    return f"One {about['device']}, commit {about['commit']}, an 8B: {'; '.join(found)}."


def table(document: dict[str, Any]) -> str:
    """For docs/benchmarks.md: models, attention, quantized layers, and layers at one token and at 2048."""
    about = document["about"]
    lines = [
        f"Measured on one {about['device']} ({about['date']}, commit {about['commit']}, torch "
        f"{about['versions']['torch']}, triton {about['versions']['triton']}) by `python -m bench first-contact`.",
        "", "| | base | peft | peft_fast | its fastest kernel | peft over peft_fast |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row, graph, times in groups(document):
        base, peft, kernel = _us(times, "base"), _us(times, "peft"), _ours(row, times)
        ours = _us(times, "peft_fast", "peft_fast ids")
        if not _in_table(row) or (ours is None and kernel is None):
            continue
        gain = "-" if peft is None or ours is None else f"{peft / ours:.2f}x"
        shown = ["-" if us is None else f"{us:.1f} us" for us in (base, peft, ours)]
        best = f"{kernel[1]:.1f} us {kernel[0]}" if kernel and kernel[0] not in ("peft_fast", "peft_fast ids") else "-"
        lines.append(f"| {' | '.join([_words(row, graph), *shown, best, gain])} |")
    wrong = sum(not row["ok"] for row in document["rows"])
    return "\n".join([*lines, "", f"{wrong} of {len(document['rows'])} rows failed or were wrong, and are not shown."])


def _in_table(row: Row) -> bool:
    if row["op"] == "lora_linear":
        return row["M"] in (1, 2048) and row["R"] == 16
    return row["op"] != "lora_mixed" or row["adapters"].startswith("8 ")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("file", type=Path, metavar="FILE", help="the gpu.json of first-contact")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")


def run(args: argparse.Namespace) -> int:
    """Write what README and docs/benchmarks.md say of a GPU, and the tables; print the rows that won.

    Raises: SystemExit for a rehearsal's file, and without the marks.
    """
    document = read(args.file)
    if document["about"]["rehearsal"]:
        raise SystemExit(f"{args.file} is of a rehearsal: its times mean nothing")
    _put(args.root / "README.md", sentence(document))
    _put(args.root / "docs" / "benchmarks.md", f"\n{table(document)}\n")
    for row in shipped_rows(document):
        print(json.dumps(row))
    written = ship(document, args.root / "csrc_triton" / "tables")
    print(f"{written} rows of csrc_triton/tables/choice.json are of this GPU; peft-fast info --model DIR shows them")
    return 0


def _put(path: Path, text: str) -> None:
    pattern, old = "(.*?)".join(MARKS), path.read_text()
    new, count = re.subn(pattern, lambda _: text.join(MARKS), old, flags=re.S)
    if count != 1:
        raise SystemExit(f"{path}: expected one section between {MARKS[0]} and {MARKS[1]}, found {count}")
    path.write_text(new)
