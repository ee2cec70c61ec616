"""Pictures of sweeps: a panel per sweep, a curve per provider, both axes logarithmic."""

import math
from typing import TYPE_CHECKING

from .rows import Files, time_in_words
from .scaling import Curve
from .styles import GRID, INK, WIDTH, Drawn, Style, legend, log_ticks, styles, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def panel_figures(files: Files, found: list[Curve], columns: int) -> list[Drawn]:
    """Panels of a suite and an axis, at most three rows of them in a figure."""
    sweeps: dict[tuple[str, str], dict[str, list[Curve]]] = {}
    for curve in found:
        sweeps.setdefault((curve.suite, curve.axis), {}).setdefault(curve.title, []).append(curve)
    of, drawn, size = styles(files), [], 3 * columns
    for (suite, axis), panels in sweeps.items():
        shown = [panel for panel in panels.values() if any(len(curve.points) > 1 for curve in panel)]
        parts = math.ceil(len(shown) / size)
        for part in range(parts):
            figure = _panel_figure(shown[part * size : (part + 1) * size], of, columns)
            which = f", {part + 1} of {parts}" if parts > 1 else ""
            caption = "Median time of a call; bands: quartiles. Wrong results have no time."
            if any(point.least for panel in shown for curve in panel for point in curve.points):
                caption += " Dotted: the least that the machine's ceilings allow peft_fast."
            drawn.append(Drawn(f"{suite}: time over {axis}{which}", caption, figure))
    return drawn


def _panel_figure(panels: list[list[Curve]], of: dict[str, Style], columns: int) -> "Figure":
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / columns)
    columns = min(columns, len(panels)) if columns > 2 else columns
    height = 3.0 if columns == 2 else 2.4
    figure = Figure(figsize=(WIDTH, 0.5 + height * rows), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for curve in panel:
            _curve(axes, curve, of[curve.provider])
        _curve_axes(axes, panel, columns)
    legend(figure, {c.provider: of[c.provider] for panel in panels for c in panel}, line=True)
    return figure


def _curve(axes: "Axes", curve: Curve, style: Style) -> None:
    x = [point.x for point in curve.points]
    ours = curve.provider == "peft_fast"
    axes.fill_between(
        x, [p.q1 for p in curve.points], [p.q3 for p in curve.points], color=style.color, alpha=0.18, linewidth=0
    )
    axes.plot(
        x, [p.seconds for p in curve.points], color=style.color, linestyle=style.dashes, marker=style.marker,
        markersize=3.5, linewidth=1.8 if ours else 1.2, zorder=4 if ours else 3,
    )  # fmt: skip
    least = [(p.x, p.least) for p in curve.points if p.least]
    if ours and least:
        axes.plot(*zip(*least, strict=True), color=INK, linestyle=":", linewidth=1, zorder=2)


def _curve_axes(axes: "Axes", panel: list[Curve], columns: int) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(wrapped(panel[0].title, 100 // columns, 2))
    axes.set_xlabel(panel[0].axis)
    x = _apart(sorted({point.x for curve in panel for point in curve.points}), 8 if columns == 2 else 6)
    axes.set_xticks(x, [f"{value:g}" for value in x])
    low, high = axes.get_ylim()
    if high / low < 2:  # a flat curve is to look flat
        middle = math.sqrt(low * high)
        low, high = middle / 1.5, middle * 1.5
        axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: time_in_words(seconds * (1 + 1e-9))))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _apart(x: list[float], most: int) -> list[float]:
    """Of sorted numbers, those that stand far enough apart on a log axis for ``most`` labels; the last one always."""
    if len(x) < 2:
        return x
    gap, kept = math.log(x[-1] / x[0]) / most, [x[-1]]
    for value in reversed(x[:-1]):
        if math.log(kept[-1] / value) >= 0.999 * gap:
            kept.append(value)
    return kept[::-1]
