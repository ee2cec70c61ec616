"""How times grow along a sweep: the exponent of the power law that fits best, and whether there is one.

log(time) = exponent * log(x) + constant,    by least squares over the points of one provider
"""

import math
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from .rows import Files, all_rows

FLAT = 1.1  # a curve whose largest time is less than this times its smallest does not grow
POWER_LAW = 0.9  # least R2 of a curve that is one


class Point(NamedTuple):
    """A median time with its quartiles, in seconds, at x; least: what the machine's ceilings allow, if known."""

    x: float
    seconds: float
    q1: float
    q3: float
    least: float | None


class Curve(NamedTuple):
    """The points of one provider in a sweep, by increasing x."""

    suite: str
    title: str
    axis: str
    provider: str
    points: tuple[Point, ...]


class Fit(NamedTuple):
    """A power law through a curve.

    exponent: of time over x, with its standard error.    r_squared: 1 where all points lie on it.
    last: exponent between the last two points.           growth: largest time over the smallest.
    """

    curve: Curve
    exponent: float
    standard_error: float
    r_squared: float
    last: float
    growth: float

    @property
    def remark(self) -> str:
        """ "flat" if times hardly differ, "bends" if they follow no power law, else ""."""
        if self.growth < FLAT:
            return "flat"
        return "bends" if self.r_squared < POWER_LAW else ""


def curves(files: Files) -> list[Curve]:
    """Every provider's curve in every sweep. Wrong rows have no time and are no points; x = 0 has no logarithm."""
    found: dict[tuple[str, str, str, str], dict[float, Point]] = {}
    for suite, result in files.items():
        for info in all_rows(result):
            seconds = info.get("median", 0)
            if not 0 < seconds < math.inf:
                continue
            for title, (axis, x) in (info.get("sweeps") or {}).items():
                if x > 0:
                    quartiles = info.get("q1", seconds), info.get("q3", seconds)
                    point = Point(float(x), seconds, *quartiles, info.get("roofline_seconds"))
                    found.setdefault((suite, title, axis, info["provider"]), {})[point.x] = point
    return [Curve(*key, tuple(by_x[x] for x in sorted(by_x))) for key, by_x in found.items()]


def fits(files: Files) -> list[Fit]:
    """A fit for every sweep and provider with at least three points, by axis."""
    found = [_fit(curve) for curve in curves(files) if len(curve.points) >= 3]
    axes = list(dict.fromkeys(fit.curve.axis for fit in found))
    return sorted(found, key=lambda fit: axes.index(fit.curve.axis))


def _fit(curve: Curve) -> Fit:
    x = [math.log(point.x) for point in curve.points]
    y = [math.log(point.seconds) for point in curve.points]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    spread_x = math.fsum((a - mean_x) ** 2 for a in x)
    spread_y = math.fsum((b - mean_y) ** 2 for b in y)
    exponent = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread_x
    residual = math.fsum((b - mean_y - exponent * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    error = math.sqrt(residual / (len(x) - 2) / spread_x)
    r_squared = 1 - residual / spread_y if spread_y > 0 else 1.0
    last = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return Fit(curve, exponent, error, r_squared, last, math.exp(max(y) - min(y)))


def cells(fit: Fit) -> tuple[str, ...]:
    """Provider, points, from .. to, exponent, R2, exponent between the last two, remark; in words."""
    points = fit.curve.points
    law = f"{fit.exponent:.2f} ± {fit.standard_error:.2f}"
    span = f"{points[0].x:g} .. {points[-1].x:g}"
    return fit.curve.provider, str(len(points)), span, law, f"{fit.r_squared:.3f}", f"{fit.last:.2f}", fit.remark


HEAD = ("provider", "points", "from .. to", "exponent", "R2", "last two", "")


def lines(found: Iterable[Fit]) -> list[str]:
    """A text table per axis. "bends": no power law (R2 < 0.9), look at the curve; "flat": all within 10 %."""
    text = []
    for axis, of_axis in groupby(found, key=lambda fit: fit.curve.axis):
        rows = [(f"{fit.curve.suite}: {fit.curve.title}", *cells(fit)) for fit in of_axis]
        head = (f"time over {axis}", *HEAD)
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        for row in [head, *rows]:
            left, right = row[:2], row[2:-1]
            aligned = [cell.ljust(width) for cell, width in zip(left, widths, strict=False)]
            aligned += [cell.rjust(width) for cell, width in zip(right, widths[2:], strict=False)]
            text.append("  ".join([*aligned, row[-1]]).rstrip())
        text.append("")
    return text[:-1]
