"""The HTML tables of the page: a row per case with all providers side by side, and what comes out per suite."""

from collections.abc import Callable, Collection, Iterable
from html import escape
from statistics import median
from typing import Any

from .rows import Files, Rows, Spread, all_rows, groups_of, rows_of, spread_of, time_in_words, words_of

By = dict[str, dict[str, Any]]  # the rows of a case by provider
Column = tuple[str, Callable[[By], str]]  # its name, and its cell of a case
_MARKS = {"win": "▲ ", "loss": "▼ ", "": ""}


def cell(text: str, kind: str = "", small: str = "") -> str:
    """A <td>, escaped. kind: its classes.    small: what follows in small letters."""
    classes = f' class="{kind}"' if kind else ""
    return f"<td{classes}>{escape(text)}{f' <small>{escape(small)}</small>' if small else ''}</td>"


_EMPTY = cell("–", "none")


def table(head: Iterable[str], rows: Iterable[Iterable[str]], words: Collection[int] = (0,)) -> str:
    """A table of cells, in a container of its own that scrolls. words: the columns that hold words, not numbers."""
    cells = "".join(
        f'<th{" class=w" if i in words else ""} scope="col">{escape(name)}</th>' for i, name in enumerate(head)
    )
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def side_by_side(rows: Rows) -> str:
    """The cases of a group. Columns that no case has a number for are left out."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row if name != "base"))
    first: list[str] = [name for name in ("peft", "peft_fast") if name in names]
    based = any("base" in row for row in rows.values())
    columns: list[Column] = [
        ("case", _words),
        ("base", lambda row: _time(row.get("base", {}))),
        *_provider_columns(first, based),
        ("× as fast as peft", lambda row: _faster(row.get("peft_fast", {}), "ratio_to_peft")),
        ("× as fast as the strongest", lambda row: _strongest(row.get("peft_fast", {}))),
        ("roofline", lambda row: _percent(row.get("peft_fast", {}).get("share_of_roofline"))),
        ("peak memory / base", _memory),
        ("tokens/s", lambda row: _number(row.get("peft_fast", {}).get("tokens_per_second"), "{:,.0f}")),
        ("error", lambda row: _number(row.get("peft_fast", {}).get("error"), "{:.0e}")),
        *_provider_columns([name for name in names if name not in first], based),
        *_graph_columns(names),
    ]
    made = [(name, [make(row) for row in rows.values()]) for name, make in columns]
    kept = [(name, cells) for name, cells in made if any(c != _EMPTY for c in cells)]
    return table([name for name, _ in kept], zip(*(cells for _, cells in kept), strict=True))


def _provider_columns(names: list[str], based: bool) -> list[Column]:
    """Times over the base's, or times where there is no base."""
    show, title = (_multiple, "{} / base") if based else (_time, "{}")
    return [(title.format(name), lambda row, name=name: show(row.get(name, {}))) for name in names]  # type: ignore[misc]


def _graph_columns(names: list[str]) -> list[Column]:
    """What a replay of a CUDA graph takes, in which no time is spent on launching."""

    def graph(row: By, name: str) -> dict[str, Any]:
        return row.get(name, {}).get("graph") or {}

    columns: list[Column] = [("graph: base", lambda row: _time(graph(row, "base")))]
    for name in names:
        columns.append((f"graph: {name} / base", lambda row, name=name: _multiple(graph(row, name))))  # type: ignore[misc]
    columns.append(("graph: × as fast as peft", lambda row: _faster(graph(row, "peft_fast"), "ratio_to_peft")))
    return columns


def _words(row: By) -> str:
    info = next(iter(row.values()))
    case = str(info["case"])
    return f'<th scope="row" class="w" title="{escape(case)}">{escape(words_of(info))}</th>'


def _time(info: dict[str, Any]) -> str:
    if info.get("wrong"):
        return _wrong(info)
    return cell(three_digits(info["median"])) if "median" in info else _EMPTY


def three_digits(seconds: float) -> str:
    """As ``time_in_words``, but 17.0 where that says 17: numbers of a column are read by their length."""
    number, unit = time_in_words(seconds).split()
    return f"{float(number):#.3g}".rstrip(".") + f" {unit}"


def factor(value: float) -> str:
    """Two digits after the point of small numbers, none of large ones."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _wrong(info: dict[str, Any]) -> str:
    return cell("wrong", "wrong", f"error {info['error']:.0e}" if "error" in info else "")


def _multiple(info: dict[str, Any]) -> str:
    """Time over the base's with quartiles; the time itself where there is no base."""
    ratio = spread_of(info, "ratio_to_base")
    if info.get("wrong") or not ratio:
        return _time(info)
    return cell(factor(ratio.median), "", _quartiles(ratio))


def _quartiles(value: Spread) -> str:
    return f"{factor(value.low)}–{factor(value.high)}" if value.low < value.high else ""


def _faster(info: dict[str, Any], name: str) -> str:
    """How many times as fast, from a ratio of times; beyond the noise wins and losses are marked alike."""
    ratio = spread_of(info, name)
    if info.get("wrong") or not ratio:
        return _EMPTY
    return cell(f"{_MARKS[ratio.verdict]}{factor(ratio.inverse.median)}", ratio.verdict, _quartiles(ratio.inverse))


def _strongest(info: dict[str, Any]) -> str:
    ratio = spread_of(info, "ratio_to_strongest")
    if info.get("wrong") or not ratio:
        return _EMPTY
    text = f"{_MARKS[ratio.verdict]}{factor(ratio.inverse.median)}"
    return cell(text, ratio.verdict, str(info.get("strongest", "")))


def _memory(row: By) -> str:
    found = {name: spread_of(row.get(name, {}), "peak_bytes_to_base") for name in ("peft", "peft_fast")}
    ours, peft = found["peft_fast"], found["peft"]
    return cell(f"{ours.median:.2f}", "", f"peft {peft.median:.2f}" if peft else "") if ours else _EMPTY


def _percent(share: float | None) -> str:
    return _EMPTY if share is None else cell(f"{100 * share:.0f} %")


def _number(value: float | None, form: str) -> str:
    return _EMPTY if value is None else cell(form.format(value))


def summary(files: Files) -> str:
    """A row per suite: how often peft_fast is faster, the same or slower, and the worst, median and best case."""
    head = ("suite", "cases", "wrong", "against", "faster", "same", "slower", "worst", "median", "best")
    rows = []
    for stem, result in files.items():
        cases = {(info["group"], info["case"]) for info in all_rows(result) if info["group"] != "ceilings"}
        wrong = len(result["wrong"])
        for i, rival in enumerate(("peft", "strongest")):
            found = ratios(result, f"ratio_to_{rival}")
            first = [cell(stem, "w"), cell(str(len(cases))), cell(str(wrong), "wrong" * bool(wrong))]
            against = cell("peft" if rival == "peft" else "the strongest", "w")
            if found or not i:
                rows.append([*(first if not i else [cell("", "w"), cell(""), cell("")]), against, *_outcome(found)])
    return table(head, rows, words=(0, 3))


def ratios(result: dict[str, Any], name: str) -> list[tuple[Spread, str]]:
    """(peft_fast's ratio under this name, the case in words) of all that have one, the worst first."""
    found = []
    for group in groups_of(result):
        for row in rows_of(result, group).values():
            info = row.get("peft_fast", {})
            ratio = spread_of(info, name)
            if ratio and not info.get("wrong"):
                found.append((ratio, words_of(info)))
    return sorted(found, key=lambda pair: -pair[0].median)


def _outcome(found: list[tuple[Spread, str]]) -> list[str]:
    if not found:
        return [_EMPTY] * 6
    verdicts = [ratio.verdict for ratio, _ in found]
    wins, losses = verdicts.count("win"), verdicts.count("loss")
    counted = [cell(str(n)) for n in (wins, len(found) - wins - losses, losses)]
    (worst, worst_case), (best, best_case) = found[0], found[-1]
    middle = median(ratio.inverse.median for ratio, _ in found)
    return [
        *counted,
        cell(f"{_MARKS[worst.verdict]}{factor(worst.inverse.median)}", f"case {worst.verdict}".strip(), worst_case),
        cell(factor(middle)),
        cell(f"{_MARKS[best.verdict]}{factor(best.inverse.median)}", f"case {best.verdict}".strip(), best_case),
    ]
