"""``python -m bench report``: a folder of results side by side, as CSV and as a page, and in README.md and docs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import compare as report_compare, csv as report_csv, predict as report_predict, scaling as report_scaling
from .pages import committed, pages
from .rows import all_rows, groups_of, load, rows_of, spread_of, time_in_words, where, words_of

HERE = Path(__file__).parents[1]
CPU = HERE / "results" / "cpu"  # the committed baseline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m bench report``."""
    parser.add_argument("folder", nargs="?", type=Path, default=CPU, metavar="DIR", help="default: bench/results/cpu")
    parser.add_argument("--compare", type=Path, metavar="DIR", help="results of an earlier run")
    parser.add_argument("--readme", action="store_true", help="put bench/results into README.md and docs/benchmarks.md")


def run(args: argparse.Namespace) -> int:
    """Report, fill in; 1 if a file tells of wrong results, 2 if there is nothing to report."""
    status = report(args.folder, args.compare)
    if args.readme and status == 0:
        for page, text in pages(*committed()).items():
            page.write_text(text)
            print(f"filled in {page}")
    return status


def report(folder: Path, compare: Path | None = None, only: Sequence[str] = ()) -> int:
    """Print; write results.csv and report.html of the whole folder into it. Returns the exit code of ``run``.

    only: the files to print, by name without ".json"; none: all.
    """
    try:
        files, old = load(folder), None if compare is None else load(compare)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = {name: result for name, result in files.items() if not only or name in only}
    for result in shown.values():
        print("\n".join(side_by_side(result)), end="\n\n")
    print("\n".join([*report_scaling.lines(report_scaling.fits(shown)), ""]))
    print("\n".join(report_predict.lines(report_predict.predictions(shown))))
    if old is not None:
        print("\n".join(["", *report_compare.lines(old, files)]))
    report_csv.write(files, folder / "results.csv")
    print(f"\nwrote {folder / 'results.csv'}")
    try:
        from . import html as report_html

        report_html.write(files, folder / "report.html", old)
        print(f"wrote {folder / 'report.html'}")
    except ModuleNotFoundError as error:
        print(f"no page with plots: {error} (pip install -e '.[bench]')", file=sys.stderr)
    return 1 if any(result["wrong"] for result in files.values()) else 0


def side_by_side(result: dict[str, Any]) -> list[str]:
    """The cases of a file, a line per provider, and which targets were met."""
    lines = [where(result)]
    for group in groups_of(result):
        rows = rows_of(result, group)
        words = {case: words_of(next(iter(by_provider.values()))) for case, by_provider in rows.items()}
        width = max(map(len, [group, *words.values()]))
        lines += ["", f"{group:<{width}} {'':<21} {'time':>10} {'/ base':>6} {'/ peft':>6} {'quartiles':>13} "
                      f"{'roofline':>8} {'error':>8} {'memory/base':>11}"]  # fmt: skip
        for case, by_provider in rows.items():
            lines += [f"{words[case]:<{width}} {name:<21} {_cells(info)}" for name, info in by_provider.items()]
    return [*lines, "", *_targets(result)]


def _cells(info: dict[str, Any]) -> str:
    if info.get("wrong"):
        return f"     WRONG: error {info['error']:.1e} is {info['error_over_budget']:.1f} times its budget; not timed"
    to_base, to_peft = spread_of(info, "ratio_to_base"), spread_of(info, "ratio_to_peft")
    spread = to_peft or to_base
    quartiles = f"{spread.low:.2f}..{spread.high:.2f}" if spread else "-"
    share = f"{100 * info['share_of_roofline']:.0f}%" if "share_of_roofline" in info else "-"
    memory = f"{info['peak_bytes_to_base']:.2f}" if "peak_bytes_to_base" in info else "-"
    ratios = [f"{r.median:.2f}" if r else "-" for r in (to_base, to_peft)]
    times = f"{time_in_words(info['median']):>10} {ratios[0]:>6} {ratios[1]:>6} {quartiles:>13}"
    graph = f"  in a graph {time_in_words(info['graph']['median'])}" if "graph" in info else ""
    rate = f" {info['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in info else ""
    return f"{times} {share:>8} {info['error']:>8.0e} {memory:>11}{rate}{graph}"


def _targets(result: dict[str, Any]) -> list[str]:
    """Of peft_fast: where a case has a target, whether it was met."""
    lines = []
    for info in all_rows(result):
        to_base, to_peft = spread_of(info, "ratio_to_base"), spread_of(info, "ratio_to_peft")
        if info["provider"] != "peft_fast":
            continue
        if "aim" in info and to_base:
            verdict = "met    " if to_base.median <= info["aim"] else "MISSED "
            lines.append(f"{verdict} {words_of(info)}: {to_base.median:.2f} times the base, aim {info['aim']}")
        if "must" in info and to_peft:
            verdict = "met    " if to_peft.inverse.median >= info["must"] else "MISSED "
            faster = f"{to_peft.inverse.median:.2f} times as fast as peft, must {info['must']}"
            lines.append(f"{verdict} {words_of(info)}: {faster}")
    return lines
