"""``python -m bench report``: a result file side by side, as pictures, and in README.md and docs/benchmarks.md."""

import argparse
import json
from pathlib import Path
from typing import Any

from . import report_mixed, report_prefix, report_quant
from .report_lora import LABELS
from .report_pages import Results, pages
from .report_rows import rows_of, targets, time_in_words, where
from .run import RESULTS, SUITES

GROUPS = (
    *("op", "model", "mixed", "flat", "manage", "mixed site", "decode"),
    *("prefix attention", "prefix prompt", "prefix model", "prefix decode"),
    *("quant weight", "quant site", "quant model"),
)
PEFT_LIMIT = 1.05
TITLES = {  # of the pictures with bars
    "model": "Llama, all-linear LoRA r = 16",
    "op": "One linear layer with LoRA",
    "prefix attention": "Attention of one layer with a prefix",
    "prefix model": "Llama with a prefix",
    "quant model": "Quantized Llama, all-linear LoRA r = 16",
    "quant site": "One quantized linear layer with LoRA r = 16",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m bench report``."""
    parser.add_argument("file", nargs="?", type=Path, help="default: those of all suites in bench/results")
    parser.add_argument("--readme", action="store_true", help="put bench/results into README.md and docs/benchmarks.md")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the pictures here; default: beside the file")


def run(args: argparse.Namespace) -> int:
    """Print, draw, fill in; 1 if a file tells of wrong results."""
    committed = [path for stem in SUITES.values() if (path := RESULTS / f"{stem}.json").exists()]
    wrong = False
    for file in [args.file] if args.file else committed:
        result = json.loads(file.read_text())
        print(side_by_side(result))
        for path in draw(result, args.plots or file.parent, file.stem):
            print(f"drew {path}")
        wrong = wrong or bool(result["wrong"])
    if args.readme:
        for page, text in pages(committed_results()).items():
            page.write_text(text)
            print(f"filled in {page}")
    return 1 if wrong else 0


def committed_results() -> Results:
    """The files in bench/results by suite, None for one that was not measured."""
    files = {suite: RESULTS / f"{stem}.json" for suite, stem in SUITES.items()}
    return {suite: json.loads(file.read_text()) if file.exists() else None for suite, file in files.items()}


def side_by_side(result: dict[str, Any]) -> str:
    """A text table per group: time, ratios, share of the roofline, error. Losses stand beside wins."""
    lines = [where(result)]
    ceilings = result["peft_fast"]["ceilings"]
    lines.append(f"ceilings: copy {ceilings['bytes'] / 1e9:.1f} GB/s, bf16 {ceilings['bf16'] / 1e9:.0f} GFLOP/s, "
                 f"fp32 {ceilings['fp32'] / 1e9:.0f} GFLOP/s")  # fmt: skip
    for group in GROUPS:
        rows = rows_of(result, group)
        if not rows:
            continue
        width = max(len(case) for case in rows)
        head = (
            f"{'time':>10} {'/base':>6} {'/peft':>6} {'quartiles':>13} {'roofline':>8} {'error':>8} {'memory/base':>11}"
        )
        lines += ["", f"{group:<{width}} {'provider':<20} {head}"]
        for case, by_provider in rows.items():
            for provider, info in by_provider.items():
                lines.append(f"{case:<{width}} {provider:<20} {_cells(info)}")
    slow = over_limit(result)
    lines += ["", *report_mixed.targets(rows_of(result, "mixed"), rows_of(result, "flat"))]
    for cases, suite, part in ((report_prefix.CASES, "prefix", "attention"), (report_quant.CASES, "quant", "weight")):
        lines += targets(cases, rows_of(result, f"{suite} model"), rows_of(result, f"{suite} {part}"))
    lines += [f"peft_fast over peft: worst median ratio {slow[0]:.3f} ({slow[1]}), limit {PEFT_LIMIT}"]
    return "\n".join(lines)


def over_limit(result: dict[str, Any]) -> tuple[float, str]:
    """The largest median ratio of peft_fast's time to peft's, and where."""
    found = [
        (info["ratio_to_peft"]["median"], case)
        for group in GROUPS
        for case, by_provider in rows_of(result, group).items()
        for info in [by_provider.get("peft_fast", {})]
        if "ratio_to_peft" in info
    ]
    return max(found, default=(float("nan"), "not measured"))


def _cells(info: dict[str, Any]) -> str:
    if info.get("wrong"):
        return f"     WRONG: error {info['error']:.1e} is {info['error_over_budget']:.1f} times its budget; not timed"
    to_base, to_peft = info.get("ratio_to_base"), info.get("ratio_to_peft")
    spread = to_peft or to_base
    quartiles = f"{spread['low']:.2f}..{spread['high']:.2f}" if spread else "-"
    share = f"{100 * info['share_of_roofline']:.0f}%" if "share_of_roofline" in info else "-"
    memory = f"{info['peak_bytes_to_base']:.2f}" if "peak_bytes_to_base" in info else "-"
    ratios = [f"{r['median']:.2f}" if r else "-" for r in (to_base, to_peft)]
    times = f"{time_in_words(info['median']):>10} {ratios[0]:>6} {ratios[1]:>6} {quartiles:>13}"
    rate = f" {info['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in info else ""
    return f"{times} {share:>8} {info['error']:>8.0e} {memory:>11}{rate}"


def _label(case: str) -> str:
    return LABELS.get(case) or (report_quant if case in report_quant.CASES else report_prefix).label(case)


def draw(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Bars of time over the base: one picture for models, one for single layers; two of mixed batches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = {group: rows_of(result, group) for group in ("mixed", "flat", "manage")}
    drawn = report_mixed.draw(groups, result["peft_fast"], folder, stem)
    colors = {"plain torch": "#9a9a9a", "peft": "#d1774f", "concatenated": "#e8b79e"}
    colors |= {"two calls": "#9a9a9a", "peft_fast": "#3f7fb5"}
    for group, title in TITLES.items():
        rows = {c: p for c, p in rows_of(result, group).items() if "ratio_to_base" in p.get("peft_fast", {})}
        if not rows:
            continue
        names, shown = [n for n in colors if any(n in p for p in rows.values())], set[str]()
        figure, axes = plt.subplots(figsize=(8, 1.3 + 0.17 * len(rows) * (len(names) + 0.8)), layout="constrained")
        for at, (_case, by_provider) in enumerate(rows.items()):
            for shift, name in enumerate(names):
                info = by_provider.get(name, {}).get("ratio_to_base")
                if info is None:
                    continue
                y, height = at + (shift - (len(names) - 1) / 2) * 0.8 / len(names), 0.8 / len(names)
                axes.barh(y, info["median"], height=height, color=colors[name], label=None if name in shown else name)
                shown.add(name)
                axes.text(info["median"] + 0.02, y, f"{info['median']:.2f}", va="center", fontsize=8)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(rows)), [_label(case) for case in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.12 * max(i["ratio_to_base"]["median"] for p in rows.values() for n, i in p.items()
                                    if n in names and "ratio_to_base" in i))  # fmt: skip
        axes.set_xlabel("time over the time of the base without an adapter", fontsize=9)
        axes.set_title(f"{title}\n{result['peft_fast']['device']}, {result['peft_fast']['date']}", fontsize=10)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{stem}-{group.split()[-1]}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        drawn.append(path)
    return drawn
