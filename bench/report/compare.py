"""Two result folders side by side: what became faster or slower beyond the noise, what is new, what is gone.

Times of a shared machine drift from run to run; ratios to the base, which both runs took within their rounds, do not.
So a row is judged by its ratio to the base where it has one, and by its time only where it has none.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from .rows import Files, Spread, all_rows, spread_of, time_in_words, words_of

SMALLEST = 0.03  # of medians: less is called nothing, however quiet the machine
MARKS = ("became wrong", "still wrong", "slower", "faster", "became right", "new", "gone")  # the order they are told in
_MACHINE = ("device", "driver", "threads")
Row = dict[str, Any]


class Moved(NamedTuple):
    """A case of one provider in two runs.

    times: medians with quartiles in seconds, None where wrong or not there.    ratios: to the base in the same run.
    change: new over old of the ratio, or of the time where there is no ratio; None where neither is comparable.
    mark: one of ``MARKS``, "" for what stayed within the noise.
    """

    suite: str
    words: str
    provider: str
    old_time: Spread | None
    new_time: Spread | None
    old_ratio: Spread | None
    new_ratio: Spread | None
    change: float | None
    mark: str


def compare(old_files: Files, new_files: Files) -> list[Moved]:
    """Every case and provider of the suites that both have, in the order of the new files; what is gone comes last."""
    old, new = _keyed(old_files), _keyed(new_files)
    both = _suites(old_files) & _suites(new_files)
    return [_moved(old.get(key), new.get(key)) for key in dict.fromkeys([*new, *old]) if key[:2] in both]


def _suite(result: dict[str, Any]) -> tuple[str, str]:
    """(suite, step of the GPU campaign): what a file is of, whatever its name."""
    about = result["peft_fast"]
    return str(about.get("suite", "")), str(about.get("step", ""))


def _suites(files: Files) -> set[tuple[str, str]]:
    return {_suite(result) for result in files.values()}


def _keyed(files: Files) -> dict[tuple[str, ...], tuple[dict[str, Any], Row]]:
    """(file's peft_fast, row) by suite, step, case and provider."""
    found: dict[tuple[str, ...], tuple[dict[str, Any], Row]] = {}
    for result in files.values():
        about = result["peft_fast"]
        for info in all_rows(result):
            if info["group"] != "ceilings":
                found[*_suite(result), info["case"], info["provider"]] = (about, info)
    return found


def _moved(old: tuple[dict[str, Any], Row] | None, new: tuple[dict[str, Any], Row] | None) -> Moved:
    about, info = new or old or ({}, {})
    before, after = old[1] if old else {}, new[1] if new else {}
    times = _time(before), _time(after)
    to = "ratio_to_base" if "ratio_to_base" in after else "ratio_to_peft"  # of what has no base, as management
    ratios = spread_of(before, to), spread_of(after, to)
    comparable = old is not None and new is not None and all(old[0].get(k) == new[0].get(k) for k in _MACHINE)
    before_judged, now_judged = ratios if all(ratios) else times if comparable else (None, None)
    mark = "gone" if new is None else "new" if old is None else _wrongness(before, after)
    change = None
    if before_judged and now_judged and not mark:
        change = now_judged.median / before_judged.median
        mark = _beyond_noise(before_judged, now_judged)
    suite = str(about.get("step") or about.get("suite", ""))
    return Moved(suite, words_of(info), str(info["provider"]), *times, *ratios, change, mark)


def _time(info: Row) -> Spread | None:
    if info.get("wrong") or "median" not in info:
        return None
    seconds: float = info["median"]
    return Spread(seconds, info.get("q1", seconds), info.get("q3", seconds))


def _wrongness(before: Row, after: Row) -> str:
    states = {(True, True): "still wrong", (False, True): "became wrong", (True, False): "became right"}
    return states.get((bool(before.get("wrong")), bool(after.get("wrong"))), "")


def _beyond_noise(old: Spread, new: Spread) -> str:
    apart = old.high < new.low or new.high < old.low
    if not apart or abs(new.median / old.median - 1) <= SMALLEST:
        return ""
    return "slower" if new.median > old.median else "faster"


def differences(old_files: Files, new_files: Files) -> list[str]:
    """Lines on what else than the code differs between the runs: machines, versions, quick and dry runs."""
    told = []
    packages = dict.fromkeys(
        p for files in (new_files, old_files) for about in _abouts(files) for p in _versions(about)
    )
    for name in (*_MACHINE, *packages):
        old, new = (_all_of(files, name) for files in (old_files, new_files))
        if set(old) != set(new):
            told.append(f"other {name}: {' / '.join(old) or 'none'} before, {' / '.join(new) or 'none'} now")
    if any(line.startswith(tuple(f"other {name}:" for name in _MACHINE)) for line in told):
        told.append("times of different machines are not comparable: only rows with a ratio to the base are judged")
    both = _suites(old_files) & _suites(new_files)
    for when, files in (("before", old_files), ("now", new_files)):
        only = [stem for stem, result in files.items() if _suite(result) not in both]
        if only:
            told.append(f"not compared, only measured {when}: {', '.join(only)}")
        for kind in ("quick", "dry"):
            names = [stem for stem, result in files.items() if result["peft_fast"].get(kind)]
            if names:
                told.append(f"a --{kind} run {when}: {', '.join(names)}")
    return told


def _abouts(files: Files) -> list[dict[str, Any]]:
    return [result["peft_fast"] for result in files.values()]


def _versions(about: dict[str, Any]) -> dict[str, str]:
    return about.get("versions") or {}


def _all_of(files: Files, name: str) -> list[str]:
    """All that the files say under a name, which may be a package's; each once."""
    values = [about.get(name, _versions(about).get(name, "")) for about in _abouts(files)]
    return list(dict.fromkeys(str(value) for value in values if value != ""))


def counts(moved: list[Moved]) -> str:
    """How many rows moved how, in a line."""
    found = {mark: sum(m.mark == mark for m in moved) for mark in MARKS}
    told = [f"{count} {mark}" for mark, count in found.items() if count]
    return ", ".join([*told, f"{sum(not m.mark for m in moved)} unchanged within the noise"])


def moved_first(moved: list[Moved]) -> list[Moved]:
    """Without what stayed: the worst marks first, and among them the largest changes."""
    told = [m for m in moved if m.mark]
    return sorted(told, key=lambda m: (MARKS.index(m.mark), -max(m.change or 1, 1 / (m.change or 1))))


def cells(m: Moved) -> tuple[str, str, str, str, str]:
    """Old and new time, old and new multiple of the base, change; "-" for what there is not."""
    times = [time_in_words(t.median) if t else "-" for t in (m.old_time, m.new_time)]
    ratios = [f"{r.median:.2f}x" if r else "-" for r in (m.old_ratio, m.new_ratio)]
    return times[0], times[1], ratios[0], ratios[1], f"{100 * (m.change - 1):+.0f} %" if m.change else "-"


def lines(old_files: Files, new_files: Files) -> list[str]:
    """What differs about the runs, how many rows moved, and a text table of each kind that did."""
    moved = compare(old_files, new_files)
    return [*differences(old_files, new_files), counts(moved), *_tables(moved_first(moved))]


def _tables(moved: list[Moved]) -> Iterator[str]:
    for mark, group in groupby(moved, key=lambda m: m.mark):
        rows = [(f"{m.suite}: {m.words}", m.provider, *cells(m)) for m in group]
        head = (mark, "provider", "time", "now", "/base", "now", "change")
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        yield ""
        for row in [head, *rows]:
            texts = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            yield "  ".join(texts).rstrip()
