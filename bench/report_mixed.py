"""The report's part on mixed batches and on the management of adapters: lines of the tables, targets, pictures."""

from pathlib import Path
from typing import Any

from .cases import MixedCase, cpu_mixed
from .report_rows import Entry, Rows, rows_of, table, where

NAMES = ("peft", "peft_fast", "peft_fast ids")
COLORS = {"peft": "#d1774f", "peft_fast": "#3f7fb5"}
CASES: dict[str, MixedCase] = {str(case): case for case in cpu_mixed(quick=False)}
FLAT_TOLERANCE = 1.1  # growth of the time over the base's that is still noise


def label(case: MixedCase) -> str:
    """A case in words."""
    dtype = case.dtype + (", bf16 adapters" if case.adapters == "same" else "")
    more = ", an adapter's rows together" if case.together else ""
    tokens = "" if case.tokens == 1 else f" of {case.tokens} tokens"
    return f"{case.rows} rows{tokens}, {case.distinct} of {case.loaded} adapters, {dtype}{more}"


def targets(rows: Rows, flat: Rows) -> list[str]:
    """What the project aims at and what was measured, met or missed; nothing for cases that are no target."""
    lines = []
    for name, by_provider in rows.items():
        ours, case = by_provider.get("peft_fast", {}), CASES.get(name)
        if case is None or "ratio_to_base" not in ours:
            continue
        if case.aim is not None:
            over = ours["ratio_to_base"]["median"]
            lines.append(f"{_verdict(over <= case.aim)} {name}: {over:.2f} times the base, aim {case.aim}")
        if "ratio_to_peft" in ours:
            faster = 1 / ours["ratio_to_peft"]["median"]
            verdict = _verdict(faster >= case.faster)
            lines.append(f"{verdict} {name}: {faster:.2f} times as fast as peft, must {case.faster}")
    for provider, growth in growth_of(flat).items():
        verdict = "       " if provider == "peft" else _verdict(growth <= FLAT_TOLERANCE)
        lines.append(f"{verdict} {provider}: from {_span(flat)}, time over the base grows {growth:.2f} times")
    return lines


def _verdict(met: bool) -> str:
    return "met    " if met else "MISSED "


def _span(flat: Rows) -> str:
    first, *_, last = (row["base"]["loaded"] for row in flat.values())
    return f"{first} to {last} loaded adapters"


def growth_of(flat: Rows) -> dict[str, float]:
    """By provider: time over the base with most adapters loaded, divided by that with fewest."""
    if len(flat) < 2:
        return {}
    first, *_, last = flat.values()
    return {
        name: last[name]["ratio_to_base"]["median"] / first[name]["ratio_to_base"]["median"]
        for name in NAMES
        if all("ratio_to_base" in row.get(name, {}) for row in (first, last))
    }


def entries(result: dict[str, Any]) -> dict[str, Entry]:
    """Lines by case: batches, then operations of management."""
    found = {}
    for name, by_provider in (rows_of(result, "mixed") | rows_of(result, "flat")).items():
        multiples = [f"{by_provider[who]['ratio_to_base']['median']:.2f}x" for who in NAMES[:2]]
        ratio = f"{by_provider['peft_fast']['ratio_to_peft']['median']:.2f}"
        base = f"{1e3 * by_provider['base']['median']:.1f} ms"
        found[name] = Entry(label(CASES[name]), base, *multiples, ratio)
    for name, by_provider in rows_of(result, "manage").items():
        ours = by_provider["peft_fast"]
        what = f"{ours['operation']} as adapter number {ours['nth']}, 224 layers"
        times = [f"{_ms(by_provider[who]['median'])} ms" for who in NAMES[:2]]
        found[name] = Entry(what, "-", *times, f"{ours['ratio_to_peft']['median']:.2f}")
    return found


def lines(result: dict[str, Any]) -> list[str]:
    """The tables of batches and of management, and what they are of."""
    manage, growth = rows_of(result, "manage"), growth_of(rows_of(result, "flat"))
    batches = [entry for name, entry in entries(result).items() if name not in manage]
    return [
        *table(" one pass over | base | peft | peft_fast | peft_fast / peft ", batches),
        "",
        *_manage_lines(manage),
        "",
        'The model of the first table; a row is one token unless it says more, "8 of 32" means that 8 adapters of 32 '
        "loaded ones are in the batch, of ranks 4 to 64, named in turn by `adapter_names=[...]`. From 4 to 100 loaded "
        f"adapters, the time over the base's grows {growth['peft']:.2f} times in peft and {growth['peft_fast']:.2f} "
        "times in peft_fast. Management: a Llama of 32 small layers, rank 8. "
        f"`python -m bench run --suite mixed` on {where(result)}.",
    ]


def _manage_lines(manage: Rows) -> list[str]:
    """A line per operation, a column per number of adapters."""
    found = {(info["operation"], info["nth"]): row for row in manage.values() for info in row.values()}
    counts = sorted({nth for _, nth in found})
    rows = []
    for operation in dict.fromkeys(operation for operation, _ in found):
        cells = []
        for nth in counts:
            row = found[operation, nth]
            times = [_ms(row[who]["median"]) for who in NAMES[:2]]
            cells.append(f"{' / '.join(times)} ms ({1 / row['peft_fast']['ratio_to_peft']['median']:.0f}x)")
        rows.append((f"{operation}, peft / peft_fast", *cells))
    return table(f" 224 layers, as adapter | {' | '.join(f'number {n}' for n in counts)} ", rows)


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.0f}" if ms >= 10 else f"{ms:.1f}"


def draw(rows: dict[str, Rows], about: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Two pictures: what a mixed batch costs, and what managing adapters costs the more of them there are."""
    drawn = []
    folder.mkdir(parents=True, exist_ok=True)
    if any("ratio_to_base" in p.get("peft_fast", {}) for p in (rows["mixed"] | rows["flat"]).values()):
        drawn.append(_draw_batches(rows["mixed"] | rows["flat"], about, folder / f"{stem}-batches.png"))
    if rows["manage"]:
        drawn.append(_draw_manage(rows["manage"], about, folder / f"{stem}-manage.png"))
    return drawn


def _draw_batches(rows: Rows, about: dict[str, Any], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {case: p for case, p in rows.items() if "ratio_to_base" in p.get("peft_fast", {})}
    figure, axes = plt.subplots(figsize=(8.5, 1.4 + 0.36 * len(rows)), layout="constrained")
    for at, by_provider in enumerate(rows.values()):
        for shift, name in enumerate(COLORS):
            info = by_provider.get(name, {}).get("ratio_to_base")
            if info is None:
                continue
            y = at + (shift - 0.5) * 0.38
            axes.barh(y, info["median"], height=0.38, color=COLORS[name], label=name if at == 0 else None)
            box = dict(facecolor="white", edgecolor="none", pad=0.4)
            axes.text(info["median"] * 1.02, y, f"{info['median']:.2f}", va="center", fontsize=7, bbox=box, zorder=5)
    for at, case in enumerate(rows):
        aim = CASES[case].aim if case in CASES else None
        if aim is not None:
            first = not any(line.get_label() == "aim of peft_fast" for line in axes.lines)
            label_of_line = "aim of peft_fast" if first else None
            axes.plot([aim, aim], [at - 0.45, at + 0.45], color="black", linewidth=1, label=label_of_line)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    largest = max(i["ratio_to_base"]["median"] for p in rows.values() for i in p.values() if "ratio_to_base" in i)
    ticks = [t for t in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24) if t < 1.1 * largest]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xlim(0.97, 1.25 * largest)
    axes.set_yticks(range(len(rows)), [label(CASES[c]) if c in CASES else c for c in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("time over the time of the base without an adapter", fontsize=9)
    axes.set_title(f"A batch whose rows take different adapters\n{about['device']}, {about['date']}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_manage(rows: Rows, about: dict[str, Any], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    operations = list(dict.fromkeys(info["operation"] for row in rows.values() for info in row.values()))
    counts = sorted({info["nth"] for row in rows.values() for info in row.values()})
    for marker, operation in zip("osv^", operations, strict=False):
        for name in NAMES[:2]:
            found = [
                (info["nth"], 1e3 * info["median"])
                for row in rows.values()
                for info in [row.get(name, {})]
                if info.get("operation") == operation and "median" in info
            ]
            if found:
                axes.plot(*zip(*found, strict=True), marker=marker, color=COLORS[name], linewidth=1.2, markersize=5)
    handles = [plt.Line2D([], [], color=COLORS[name], label=name) for name in NAMES[:2]]
    handles += [
        plt.Line2D([], [], color="#333333", marker=marker, linestyle="none", label=operation)
        for marker, operation in zip("osv^", operations, strict=False)
    ]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(axis="y", linewidth=0.4, color="#cccccc")
    axes.set_xlabel("as adapter number", fontsize=9)
    axes.set_ylabel("ms", fontsize=9)
    axes.set_title(f"Managing adapters, 224 linear layers\n{about['device']}, {about['date']}", fontsize=10)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
