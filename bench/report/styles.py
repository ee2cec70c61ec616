"""What all pictures of the report share: a provider's colour, fonts, legends, the words around a figure."""

import itertools
import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple

from .rows import Files, all_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind eyes. The page puts its own ink and grid in place of these two.
INK, GRID = "#22262b", "#d9dde2"
BLUE, VERMILION, GREY = "#0072b2", "#d55e00", "#8c939b"
_SKY, _GREEN, _PURPLE, _ORANGE = "#56b4e9", "#009e73", "#cc79a7", "#e69f00"
LOOK: dict[str, Any] = {
    "font.size": 8.5,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
LOOK |= {f"{what}color": INK for what in ("text.", "axes.label", "xtick.", "ytick.")}
LOOK |= {"axes.edgecolor": INK, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6}
LOOK |= {"xtick.labelsize": 8, "ytick.labelsize": 8, "axes.titlesize": 8.5, "axes.titlelocation": "left"}
WIDTH = 9.0  # inches


class Style(NamedTuple):
    """How a provider looks everywhere: compiled ones as what they compile, but dashed or hatched."""

    color: str
    marker: str = "o"
    dashes: str = "-"
    hatch: str = ""


_KNOWN = {
    "base": Style(GREY),
    "peft": Style(VERMILION),
    "peft_fast": Style(BLUE),
    "plain torch": Style(_ORANGE),
    "bitsandbytes": Style(_PURPLE),
    "concatenated": Style(_ORANGE, "s"),
    "two calls": Style(_GREEN),
    "flex": Style(_PURPLE, "s"),
    "strongest": Style(_GREEN),
}
_SPARE = [Style(color, marker, "-.") for marker in "^Dvs" for color in (_SKY, _PURPLE, _GREEN, _ORANGE)]


class Drawn(NamedTuple):
    """A figure, with what is above and below it on a page."""

    title: str
    caption: str
    figure: "Figure"


def styles(files: Files) -> dict[str, Style]:
    """A style for each provider; the same ones get the same in every run that has the same providers."""
    names = {str(info["provider"]) for result in files.values() for info in all_rows(result)}
    found = dict(_KNOWN)
    spare = itertools.cycle(_SPARE)
    for name in sorted(names - set(found), key=lambda name: (name.endswith(" compiled"), name)):
        plain = found.get(name.removesuffix(" compiled"))
        found[name] = plain._replace(dashes="--", hatch="////") if plain else next(spare)
    return found


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: the densest of some usual sets that puts at most eight of them there."""
    decades = [10.0**k for k in range(-9, 7)]
    for several in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        ticks = [m * decade for decade in decades for m in several if low <= m * decade <= high]
        if len(ticks) <= 8:
            break
    return ticks


def wrapped(text: str, width: int, most: int) -> str:
    """In at most so many lines, cut where that is not enough."""
    return "\n".join(textwrap.wrap(text, width, max_lines=most, placeholder=" …", break_on_hyphens=False))


def legend(figure: "Figure", names: dict[str, Style], line: bool) -> None:
    """Above the figure: which style is whose, if there are several."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if len(names) < 2:
        return
    handles = [
        Line2D([], [], color=s.color, linestyle=s.dashes, marker=s.marker, markersize=3.5, label=name)
        if line
        else Patch(facecolor=s.color, hatch=s.hatch, label=name)
        for name, s in names.items()
    ]
    labels = [name[:30] for name in names]
    figure.legend(handles, labels, loc="outside upper left", ncols=5, frameon=False, fontsize=8)
