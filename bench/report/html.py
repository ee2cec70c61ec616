"""Result files as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from . import compare as report_compare, predict as report_predict, scaling as report_scaling
from .css import CSS
from .plots import figures
from .rows import Files, all_rows, groups_of, rows_of, words_of
from .svg import inline
from .tables import cell, ratios, side_by_side, summary, table

HOW = (
    "Right before fast: every result is compared with fp64 first. More than twice the error of plain torch in the same "
    "dtype, plus one rounding, is wrong: told with its error, and never timed.",
    "All providers of a case get the same numbers and are timed in rounds, one sample of each per round, in rotating "
    "order: a slow moment of the machine hits all alike.",
    "Ratios are taken within a round; what stands here is their median and quartiles over the rounds. Small numbers "
    "beside a value are quartiles.",
    "base is the frozen model or layer without an adapter; strongest is the fastest of all others by median, peft "
    "among them.",
    "▲ and ▼: peft_fast is more than 2 % faster or slower, and 1 is outside the quartiles. Everything else is the same "
    "within the noise. Losses are shown like wins.",
    "On a CPU a sample is the process's CPU time; on a GPU it is the time between two events. graph: per call in a "
    "replayed CUDA graph, in which launching takes no time.",
    "roofline: the least time that the case's flops and bytes need at this machine's ceilings, which each run measures "
    "first (a large copy; square products), over the median time.",
    "Weights that a model would not find in the cache are not in the cache: small cases rotate through copies. Memory "
    "is the most that tensors held at one moment of a step, above its start.",
)  # fmt: skip


def write(files: Files, path: Path, compared: Files | None = None) -> None:
    """Write the page. compared: the files of an earlier run, to tell what moved since."""
    sections: list[tuple[str, Callable[[], str]]] = [("Summary", lambda: _summary(files))]
    if compared is not None:
        sections.append(("Comparison", lambda: _comparison(compared, files)))
    sections += [(f"Cases: {stem}", lambda result=result: _cases(result)) for stem, result in files.items()]  # type: ignore[misc]
    for number, (kind, drawn) in enumerate(figures(files).items()):
        sections.append((kind, lambda number=number, drawn=drawn: _figures(number, drawn)))  # type: ignore[misc]
    sections.append(("Scaling", lambda: _scaling(files)))
    sections.append(("Predictions", lambda: _predictions(files)))
    sections.append(("How it was measured", lambda: f"<ol>{''.join(f'<li>{escape(line)}</li>' for line in HOW)}</ol>"))
    links = "".join(f'<a href="#s{i}">{escape(title)}</a>' for i, (title, _) in enumerate(sections))
    body = "\n".join(
        f'<section id="s{i}"><h2>{escape(t)}</h2>\n{make()}</section>' for i, (t, make) in enumerate(sections)
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_title(files))}</title><style>{CSS}</style></head>\n<body>\n"
        f"{_header(files)}\n<nav>{links}</nav>\n<main>\n{body}\n</main>\n</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _title(files: Files) -> str:
    return f"peft_fast benchmarks: {_values(files, 'device')}"


def _values(files: Files, name: str) -> str:
    """What the files say under a name; if they disagree, all that they say and which says what."""
    return _agreed({stem: result["peft_fast"].get(name, "") for stem, result in files.items()})


def _agreed(values: dict[str, Any]) -> str:
    said: dict[str, list[str]] = {}
    for stem, value in values.items():
        if value not in (None, ""):
            said.setdefault(str(value), []).append(stem)
    return next(iter(said), "") if len(said) < 2 else ", ".join(f"{v} ({', '.join(who)})" for v, who in said.items())


def _versions(files: Files) -> str:
    versions = {stem: result["peft_fast"].get("versions", {}) for stem, result in files.items()}
    packages = dict.fromkeys(package for known in versions.values() for package in known)
    return ", ".join(f"{p} {_agreed({stem: known.get(p) for stem, known in versions.items()})}" for p in packages)


def _header(files: Files) -> str:
    told = {name: _values(files, name) for name in ("device", "driver", "threads", "commit", "date")}
    told["versions"] = _versions(files)
    about = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in told.items() if value)
    lead = f"<h1>peft_fast benchmarks</h1>\n<p class=lead>{_lead(files)}</p>"
    return f"<header>{lead}\n<dl>{about}</dl>\n{_notes(files)}{_wrong(files)}</header>"


def _lead(files: Files) -> str:
    found = [ratio.verdict for result in files.values() for ratio, _ in ratios(result, "ratio_to_peft")]
    if not found:
        return "No case has a time of peft beside peft_fast's."
    wins, losses = found.count("win"), found.count("loss")
    return (
        f"Of {len(found)} cases with peft beside it, peft_fast is faster in {wins}, slower in {losses}, "
        f"and the same within the noise in {len(found) - wins - losses}."
    )


def _notes(files: Files) -> str:
    notes = []
    for kind, means in (("quick", "few cases and rounds"), ("dry", "tiny sizes, to try the scripts: no measurement")):
        stems = [stem for stem, result in files.items() if result["peft_fast"].get(kind)]
        if stems:
            notes.append(f"<li>--{kind}, {means}: {escape(', '.join(stems))}</li>")
    return f'<div class="box note"><b>Not a whole run</b><ul>{"".join(notes)}</ul></div>\n' if notes else ""


def _wrong(files: Files) -> str:
    rows = [(stem, info) for stem, result in files.items() for info in result["wrong"]]
    if not rows:
        return ""
    items = "".join(
        f"<li>{escape(stem)}, {escape(words_of(info))}: <b>{escape(str(info['provider']))}</b>{_error(info)}</li>"
        for stem, info in rows
    )
    return f'<div class="box bad"><b>{len(rows)} wrong, not timed</b><ul>{items}</ul></div>\n'


def _error(info: dict[str, Any]) -> str:
    if "error" not in info or "error_over_budget" not in info:
        return ""
    return f", error {info['error']:.1e} is {info['error_over_budget']:.1f} times its budget"


def _summary(files: Files) -> str:
    head = ("file", "date", "commit", "copy", "bf16", "fp32", "timed", "load before", "took, s")
    rows = []
    for stem, result in files.items():
        about = result["peft_fast"]
        most = about.get("ceilings", {})
        units = {"bytes": "B/s", "bf16": "FLOP/s", "fp32": "FLOP/s"}
        ceilings = [cell(_rate(most[name], unit) if name in most else "–") for name, unit in units.items()]
        timed = sum(info["group"] != "ceilings" for info in all_rows(result)) - len(result["wrong"])
        more = [cell(str(about.get(name, "–"))) for name in ("load_at_start", "seconds")]
        words = [cell(text, "w") for text in (stem, str(about.get("date", "–")), str(about.get("commit", "–")))]
        rows.append([*words, *ceilings, cell(str(timed)), *more])
    told = "<p class=soft>Times as fast as peft, and as the strongest of all others: above 1, peft_fast is faster.</p>"
    return f"{told}{summary(files)}\n<h3>Runs and the machine's ceilings</h3>\n{table(head, rows, words=range(3))}"


def _rate(per_second: float, unit: str) -> str:
    return f"{per_second / 1e12:.3g} T{unit}" if per_second >= 1e12 else f"{per_second / 1e9:.3g} G{unit}"


def _cases(result: dict[str, Any]) -> str:
    parts = [f"<h3>{escape(group)}</h3>\n{side_by_side(rows_of(result, group))}" for group in groups_of(result)]
    return "\n".join(parts) or "<p class=soft>No cases in this file.</p>"


def _scaling(files: Files) -> str:
    found = report_scaling.fits(files)
    if not found:
        return "<p class=soft>No sweep with three points in this run.</p>"
    told = (
        "<p class=soft>Exponent of the power law that fits a curve best, ± its standard error, and between the last "
        "two points alone. bends: no power law (R2 below 0.9). flat: all times within 10 %.</p>"
    )
    parts = []
    for axis in dict.fromkeys(fit.curve.axis for fit in found):
        rows, before = [], ""
        for fit in (fit for fit in found if fit.curve.axis == axis):
            provider, *numbers, remark = report_scaling.cells(fit)
            sweep = f"{fit.curve.suite}: {fit.curve.title}"
            words = [cell(sweep if sweep != before else "", "w long"), cell(provider, "w")]
            rows.append([*words, *map(cell, numbers), cell(remark, "w")])
            before = sweep
        head = ("sweep", *report_scaling.HEAD)
        parts.append(f"<h3>time over {escape(axis)}</h3>\n{table(head, rows, words=(0, 1, len(head) - 1))}")
    return told + "\n".join(parts)


def _predictions(files: Files) -> str:
    rows = report_predict.summary(report_predict.predictions(files))
    if not rows:
        return "<p class=soft>No case in this run whose work is counted.</p>"
    lead = (
        "What peft_fast.planning predicts at the machine's ceilings, beside what was measured: below 0 it was too "
        "fast. The printed report has every row."
    )
    head = ("cases", "provider", "rows", "median error", "quartiles")
    return f"<p class=soft>{lead}</p>" + table(head, [[cell(text) for text in row] for row in rows], words=(0, 1))


def _figures(number: int, drawn: list[Any]) -> str:
    captions = list(dict.fromkeys(caption for _, caption, _ in drawn))
    once = f"<p class=soft>{escape(captions[0])}</p>\n" if len(captions) == 1 else ""
    parts = [
        f'<figure><h4>{escape(title)}</h4><div class="scroll">{inline(figure, f"f{number}-{i}", title)}</div>'
        f"{'' if once else f'<figcaption>{escape(caption)}</figcaption>'}</figure>"
        for i, (title, caption, figure) in enumerate(drawn)
    ]
    return once + "\n".join(parts) or "<p class=soft>No case of this kind in this run.</p>"


def _comparison(old: Files, new: Files) -> str:
    moved = report_compare.compare(old, new)
    notes = "".join(f"<li>{escape(line)}</li>" for line in report_compare.differences(old, new))
    told = f'<div class="box note"><b>The runs differ</b><ul>{notes}</ul></div>' if notes else ""
    told += f"<p>{escape(report_compare.counts(moved))}.</p>"
    kinds = {"faster": "win", "slower": "loss", "became wrong": "wrong", "still wrong": "wrong"}
    rows = []
    for m in report_compare.moved_first(moved):
        mark = cell(m.mark, f"w {kinds.get(m.mark, '')}".strip())
        case = cell(f"{m.suite}: {m.words}", "w long")
        rows.append([mark, case, cell(m.provider, "w"), *map(cell, report_compare.cells(m))])
    head = ("", "case", "provider", "time before", "now", "/ base before", "now", "change")
    return told + (table(head, rows, words=range(3)) if rows else "")
