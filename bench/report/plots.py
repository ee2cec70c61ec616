"""Pictures of result files, as matplotlib figures: for the HTML page, or to be saved as files.

Every figure is made without pyplot, so nothing global changes.
"""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from .panels import panel_figures
from .rows import Files, Spread, groups_of, rows_of, spread_of, words_of
from .scaling import curves
from .styles import BLUE, GREY, GRID, INK, LOOK, VERMILION, WIDTH, Drawn, Style, legend, log_ticks, styles, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


By = dict[str, dict[str, Any]]  # the rows of a case by provider


class Chart(NamedTuple):
    """What a kind of bars shows.

    values: from the rows of a case, what to draw, by name of the bar.    paint: the style of a bar.
    log: bars start at 1 on a logarithmic axis, else at 0.    legend: where it is not a style for each name.
    """

    values: Callable[[By], dict[str, Spread]]
    paint: Callable[[str, Spread], Style]
    xlabel: str
    caption: str
    log: bool = True
    legend: dict[str, Style] | None = None


class Bar(NamedTuple):
    """A case's bars: by name of the bar, the value with its quartiles."""

    label: str
    values: dict[str, Spread]


def figures(files: Files) -> dict[str, list[Drawn]]:
    """Figures by kind, in the order of a page; an empty list for a kind that this run has no case of."""
    import matplotlib

    with matplotlib.rc_context(LOOK):
        found = curves(files)
        return {
            "Speed over peft": _speed(files),
            "Overhead over the base": _overhead(files),
            "Share of what the machine allows": _share(files),
            "Memory": _memory(files),
            "Time over tokens": panel_figures(files, [c for c in found if c.axis == "tokens"], 2),
            "Time over adapters, prefix length, rank and batch": panel_figures(
                files, [c for c in found if c.axis != "tokens"], 3
            ),
        }


# Bars: a row per case. Each kind says what it takes from the rows; _bars draws.


def _speed(files: Files) -> list[Drawn]:
    def values(row: By) -> dict[str, Spread]:
        ratio = spread_of(row.get("peft_fast", {}), "ratio_to_peft")
        return {"peft_fast": ratio.inverse} if ratio else {}

    def paint(name: str, value: Spread) -> Style:
        return {"win": Style(BLUE), "loss": Style(VERMILION)}.get(value.inverse.verdict, Style(GREY))

    colors = {"peft_fast is faster": Style(BLUE), "peft is faster": Style(VERMILION), "within the noise": Style(GREY)}
    caption = "peft's time over peft_fast's: right of 1, peft_fast is faster. Thin lines: quartiles over the rounds."
    return _bars(files, Chart(values, paint, "times as fast as peft", caption, legend=colors))


def _overhead(files: Files) -> list[Drawn]:
    def values(row: By) -> dict[str, Spread]:
        ours = row.get("peft_fast", {})
        wanted = {"peft": "peft", "strongest": ours.get("strongest"), "peft_fast": "peft_fast"}
        if wanted["strongest"] == "peft":
            del wanted["strongest"]
        found = {name: spread_of(row.get(str(who), {}), "ratio_to_base") for name, who in wanted.items()}
        return {name: value for name, value in found.items() if value} if found["peft_fast"] else {}

    caption = (
        "Time over that of the frozen base in the same round; the base is 1. strongest: the fastest of the others, "
        "where that is not peft."
    )
    return _bars(files, Chart(values, _painter(files), "times the base's time", caption))


def _share(files: Files) -> list[Drawn]:
    def values(row: By) -> dict[str, Spread]:
        found = {name: spread_of(row.get(name, {}), "share_of_roofline") for name in ("base", "peft", "peft_fast")}
        return {name: Spread(*(100 * v for v in value)) for name, value in found.items() if value}

    caption = (
        "Least time that the case's flops and bytes need at the machine's measured ceilings, over the median time. "
        "Above 100 %: the ceilings are those of large copies and products, a cache is faster."
    )
    return _bars(files, Chart(values, _painter(files), "% of what the ceilings allow", caption, log=False))


def _memory(files: Files) -> list[Drawn]:
    def values(row: By) -> dict[str, Spread]:
        base, found = row.get("base", {}).get("peak_bytes"), {}
        for name in ("peft", "peft_fast"):
            known = row.get(name, {}).get("peak_bytes")
            times = known / base if known and base else row.get(name, {}).get("peak_bytes_to_base")
            if times:
                found[name] = Spread(times, times, times)
        return found

    caption = "The most that tensors held at one moment, above the start, over the same of the frozen base."
    return _bars(files, Chart(values, _painter(files), "times the base's peak memory", caption))


def _painter(files: Files) -> Callable[[str, Spread], Style]:
    of = styles(files)
    return lambda name, value: of[name]


def _bars(files: Files, chart: Chart) -> list[Drawn]:
    """A figure for each group of cases, several for a large one, all of a group on the same axis."""
    drawn = []
    for stem, result in files.items():
        for group in groups_of(result):
            rows = rows_of(result, group).values()
            bars = [Bar(words_of(next(iter(row.values()))), found) for row in rows if (found := chart.values(row))]
            if not bars:
                continue
            per_figure = 30 // max(len(bar.values) for bar in bars)
            parts = math.ceil(len(bars) / per_figure)
            size = math.ceil(len(bars) / parts)
            for part in range(parts):
                figure = _bar_figure(bars, bars[part * size : (part + 1) * size], chart)
                which = f", {part + 1} of {parts}" if parts > 1 else ""
                drawn.append(Drawn(f"{stem}: {group}{which}", chart.caption, figure))
    return drawn


def _bar_figure(everything: list[Bar], bars: list[Bar], chart: Chart) -> "Figure":
    """Some of a group's bars, on the axis of all of them."""
    from matplotlib.figure import Figure

    labels = [wrapped(bar.label, 50, 3) for bar in bars]
    heights = [
        max(0.15 * len(bar.values) + 0.09, 0.14 * label.count("\n") + 0.24)
        for bar, label in zip(bars, labels, strict=True)
    ]
    figure = Figure(figsize=(WIDTH, 0.85 + sum(heights)), layout="constrained")
    axes = figure.add_subplot()
    top, middles = 0.0, []
    for bar, height in zip(bars, heights, strict=True):
        middles.append(top + height / 2)
        for i, (name, value) in enumerate(bar.values.items()):
            y = middles[-1] + 0.15 * (i - (len(bar.values) - 1) / 2)
            _bar(axes, y, value, chart.paint(name, value), chart.log)
        top += height
    _value_axis(axes, [value for bar in everything for value in bar.values.values()], chart.log)
    axes.set_yticks(middles, labels)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(top, 0)
    axes.set_xlabel(chart.xlabel)
    fullest_first = sorted(everything, key=lambda bar: -len(bar.values))  # has the names in their order
    names = dict.fromkeys(name for bar in fullest_first for name in bar.values)
    legend(figure, chart.legend or {name: chart.paint(name, Spread(1, 1, 1)) for name in names}, line=False)
    return figure


def _bar(axes: "Axes", y: float, value: Spread, style: Style, log: bool) -> None:
    start = 1.0 if log else 0.0
    axes.barh(y, value.median - start, left=start, height=0.13, color=style.color, hatch=style.hatch, zorder=2)
    if value.low < value.high:
        axes.plot([value.low, value.high], [y, y], color=INK, linewidth=0.8, zorder=3)
    left = log and value.median < 1
    axes.annotate(
        f"{value.median:.2f}" if log else f"{value.median:.0f}",
        (value.low if left else value.high, y),
        xytext=(-3 if left else 3, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center_baseline",
        fontsize=7,
    )


def _value_axis(axes: "Axes", values: Iterable[Spread], log: bool) -> None:
    """Room for the numbers beside the bars; the line that bars start at; few ticks."""
    values = list(values)
    low, high = min(value.low for value in values), max(value.high for value in values)
    axes.grid(axis="x", color=GRID, linewidth=0.6, zorder=0)
    axes.axvline(1 if log else 0, color=INK, linewidth=0.8, zorder=4)
    if not log:
        axes.set_xlim(0, 1.1 * max(high, 10))
        return
    low, high = min(low, 1.0), max(high, 1.1)
    room = 0.09 * max(math.log(high / low), 0.2)
    axes.set_xscale("log")
    axes.set_xlim(low * math.exp(-room * (low < 1) - 0.1 * room), high * math.exp(room))
    ticks = _ticks(*axes.get_xlim())
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _ticks(low: float, high: float) -> list[float]:
    """Even steps around 1 where few of them are enough."""
    for step in (0.05, 0.1, 0.2):
        ticks = [round(1 + step * i, 8) for i in range(-20, 21) if low <= 1 + step * i <= high]
        if 3 <= len(ticks) <= 8:
            return ticks
    return log_ticks(low, high)
