"""README's picture and its one sentence with a number: time beside the base model, from the committed results.

Written as SVG by hand, so that the same results give the same file everywhere.
"""

import math
from typing import NamedTuple
from xml.sax.saxutils import escape

from .rows import Files, all_rows, spread_of

# (suite, case, what it is for somebody who has ten seconds)
CASES = (
    ("mixed", "mixed-32x1-32of32-bf16-adapters", "a token for 32 rows, each its own adapter"),
    ("generate", "prefix-generate-16x32-P128-fp32-4prefixes", "generating for 16 rows, 4 prefixes"),
    ("generate", "lora-generate-16x32-4adapters-bf16", "generating for 16 rows, 4 adapters"),
    ("train", "lora-train-8x128-bf16-p0.05", "LoRA, a training step"),
    ("train", "quant-train-8x128-nf4-bf16-autocast-p0.05", "LoRA on a 4-bit base, a training step"),
    ("lora", "lora-fwd-8x128-bf16", "LoRA, 8 x 128 tokens"),
    ("lora", "lora-fwd-1x1-bf16", "LoRA, one token"),
    ("train", "prefix-train-16x64-P128-fp32", "prefix tuning, a training step"),
)
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BAR = 760, 292, 64, 46, 38, 13
_TITLE = "time as a multiple of the base model&#8217;s, one CPU core: shorter is better"
_OURS, _THEIRS, _GRID = "#2f6fde", "#9aa3ad", "#c9ced6"


class Times(NamedTuple):
    """As multiples of the base's."""

    words: str
    peft: float
    peft_fast: float


def times(files: Files) -> list[Times]:
    """Of the cases that were measured."""
    found = []
    for suite, case, words in CASES:
        rows = [info for info in all_rows(files[suite]) if info["case"] == case] if suite in files else []
        medians = {info["provider"]: spread_of(info, "ratio_to_base") for info in rows}
        peft, ours = medians.get("peft"), medians.get("peft_fast")
        if peft and ours:
            found.append(Times(words, peft.median, ours.median))
    return found


def sentence(files: Files) -> str:
    """The first of them in words."""
    first = next(iter(times(files)), None)
    if first is None:
        return "Not measured yet."
    return (
        f"A batch of 32 rows, each with an adapter of its own, takes {first.peft_fast:.1f} times as long as the base "
        f"model alone; with peft it takes {first.peft:.1f} times as long (one CPU core, same run)."
    )


def draw(files: Files) -> str:
    """Two bars for each case, on a scale of powers of two from the base's own time."""
    rows = times(files)
    most = max((row.peft for row in rows), default=2.0)
    doublings = max(1, math.ceil(math.log2(most)))
    span = (_WIDTH - _LEFT - _RIGHT) / doublings
    bottom = _TOP + _ROW * len(rows)

    def across(value: float) -> float:
        return round(_LEFT + span * max(0.0, math.log2(value)), 1)

    text = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 34}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{escape(_said(rows))}</title>",
        f'<rect width="{_WIDTH}" height="{bottom + 34}" fill="#ffffff"/>',
        _text(
            _LEFT, 18, "time as a multiple of the base model&#8217;s, one CPU core: shorter is better", weight="bold"
        ),
        *(
            f'<line x1="{across(2**n)}" x2="{across(2**n)}" y1="{_TOP - 10}" y2="{bottom}" stroke="{_GRID}"/>'
            + _text(across(2**n), bottom + 16, f"{2**n}x", anchor="middle", fill="#5b6570")
            for n in range(doublings + 1)
        ),
    ]
    for index, row in enumerate(rows):
        top = _TOP + _ROW * index
        text.append(_text(_LEFT - 10, top + 17, escape(row.words), anchor="end"))
        for offset, name, value, color in ((0, "peft", row.peft, _THEIRS), (_BAR, "peft_fast", row.peft_fast, _OURS)):
            width = round(max(across(value) - _LEFT, 1.5), 1)
            text.append(f'<rect x="{_LEFT}" y="{top + offset}" width="{width}" height="{_BAR - 1}" fill="{color}"/>')
            label = f"{value:.2f}x {name}"
            text.append(_text(_LEFT + width + 5, top + offset + 10, label, size=11, fill="#30363d"))
    return "\n".join([*text, "</svg>\n"])


def _text(
    x: float, y: float, content: str, *, anchor: str = "start", fill: str = "#1f2328", size: int = 13, weight: str = ""
) -> str:
    bold = f' font-weight="{weight}"' if weight else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{fill}" font-size="{size}"{bold}>{content}</text>'


def _said(rows: list[Times]) -> str:
    """What a screen reader says instead."""
    lines = (f"{row.words}: peft {row.peft:.2f}, peft_fast {row.peft_fast:.2f}" for row in rows)
    return "Time as a multiple of the base model's. " + "; ".join(lines)
