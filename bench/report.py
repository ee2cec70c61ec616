"""``python -m bench report``: a result file side by side, as plots, and as the table in README.md."""

import argparse
import json
from pathlib import Path
from typing import Any

from . import report_mixed, report_prefix
from .run import HERE, RESULTS, SUITES

README = HERE.parent / "README.md"
MARKS = {"lora": "cpu", "mixed": "mixed", "prefix": "prefix"}  # suite -> the block's name in README.md
GROUPS = (
    *("op", "model", "mixed", "flat", "manage", "mixed site", "decode"),
    *("prefix attention", "prefix prompt", "prefix model", "prefix decode"),
)
# what the project aims at, peft_fast over the base model: time, and growth of memory in the training step
TARGETS = {"forward-bf16": 1.2, "one-token-bf16": 1.15, "train-bf16-dropout": 1.25}
MEMORY_TARGET, PEFT_LIMIT = 1.2, 1.05
LABELS = {
    "forward-bf16": "forward, 8 x 128 tokens, bf16",
    "one-token-bf16": "one token, bf16",
    "train-bf16-dropout": "training step, bf16, dropout 0.05",
    "train-bf16-adapters": "training step, bf16, bf16 adapters",
    "forward-fp32": "forward, 8 x 128 tokens, fp32",
    "one-token-fp32": "one token, fp32",
    "train-fp32-dropout": "training step, fp32, dropout 0.05",
}
TITLES = {  # of the pictures with bars
    "model": "Llama, all-linear LoRA r = 16",
    "op": "One linear layer with LoRA",
    "prefix attention": "Attention of one layer with a prefix",
    "prefix model": "Llama with a prefix",
}
Rows = dict[str, dict[str, dict[str, Any]]]  # case -> provider -> extra_info with median


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m bench report``."""
    parser.add_argument("file", nargs="?", type=Path, help="default: those of all suites in bench/results")
    parser.add_argument("--readme", action="store_true", help="put the summary into README.md")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the pictures here; default: beside the file")


def run(args: argparse.Namespace) -> int:
    """Print, draw, fill in; 1 if a file tells of wrong results."""
    committed = [RESULTS / f"{stem}.json" for stem in SUITES.values()]
    wrong = False
    for file in [args.file] if args.file else [path for path in committed if path.exists()]:
        result = json.loads(file.read_text())
        print(side_by_side(result))
        for path in draw(result, args.plots or file.parent, file.stem):
            print(f"drew {path}")
        if args.readme:
            README.write_text(with_table(README.read_text(), readme_table(result), suite_of(result)))
            print(f"filled in {README}")
        wrong = wrong or bool(result["wrong"])
    return 1 if wrong else 0


def suite_of(result: dict[str, Any]) -> str:
    """The suite that a file is of; files from before there were several are "lora"."""
    return str(result["peft_fast"].get("suite", "lora"))


def rows_of(result: dict[str, Any], group: str) -> Rows:
    """Cases of a group in the order they were measured; wrong ones carry "wrong" and no time."""
    rows: Rows = {}
    for benchmark in result["benchmarks"]:
        info = benchmark["extra_info"]
        if info["group"] == group:
            rows.setdefault(info["case"], {})[info["provider"]] = {**info, "median": benchmark["stats"]["median"]}
    for info in result["wrong"]:
        if info["group"] == group:
            rows.setdefault(info["case"], {})[info["provider"]] = {**info, "wrong": True}
    return rows


def where(result: dict[str, Any]) -> str:
    """One line: on what, with what, when."""
    about = result["peft_fast"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    return f"{about['device']}, {threads}, {versions}, commit {about['commit']}, {about['date']}"


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
    lines += report_prefix.targets(rows_of(result, "prefix attention"), rows_of(result, "prefix model"))
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
    times = f"{_time(info['median']):>10} {ratios[0]:>6} {ratios[1]:>6} {quartiles:>13}"
    rate = f" {info['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in info else ""
    return f"{times} {share:>8} {info['error']:>8.0e} {memory:>11}{rate}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def readme_table(result: dict[str, Any] | None) -> str:
    """The summary for README.md: models as multiples of the base without an adapter. Raises: ValueError if quick."""
    if result is None:
        return "Not measured yet."
    about = result["peft_fast"]
    if about["quick"] or about["dry"]:
        raise ValueError("README.md shows a whole run of `python -m bench run`, and this one was --quick or --dry")
    if suite_of(result) != "lora":
        return _readme_mixed(result) if suite_of(result) == "mixed" else _readme_prefix(result)
    lines = ["| | base | peft | peft_fast | peft_fast / peft |", "|---|---|---|---|---|"]
    rows = rows_of(result, "model")
    for case, by_provider in rows.items():
        cells = [_time(by_provider["base"]["median"])]
        cells += [f"{by_provider[name]['ratio_to_base']['median']:.2f}x" for name in ("peft", "peft_fast")]
        cells.append(f"{by_provider['peft_fast']['ratio_to_peft']['median']:.2f}")
        lines.append(f"| {LABELS.get(case, case)} | {' | '.join(cells)} |")
    for case, by_provider in rows.items():
        if case in TARGETS and "peak_bytes" in by_provider["base"]:
            cells = [f"{by_provider['base']['peak_bytes'] / 1e6:.0f} MB"]
            cells += [f"{by_provider[name]['peak_bytes_to_base']:.2f}x" for name in ("peft", "peft_fast")]
            cells.append(f"{by_provider['peft_fast']['peak_bytes'] / by_provider['peft']['peak_bytes']:.2f}")
            lines.append(f"| growth of memory in the training step, bf16, dropout 0.05 | {' | '.join(cells)} |")
    lines += [
        "",
        "Llama with hidden size 512 and 8 layers, LoRA of rank 16 on all linear layers, as `get_peft_model` makes it. "
        "Medians of interleaved rounds, as multiples of the base model without an adapter. "
        f"`python -m bench run` on {where(result)}.",
    ]
    return "\n".join(lines)


def _readme_mixed(result: dict[str, Any]) -> str:
    lines = report_mixed.readme_lines(*(rows_of(result, group) for group in ("mixed", "flat", "manage")))
    growth = report_mixed.growth_of(rows_of(result, "flat"))
    lines += [
        "",
        'The model of the table above; a row is one token unless it says more, "8 of 32" means that 8 adapters of 32 '
        "loaded ones are in the batch, of ranks 4 to 64, named in turn by `adapter_names=[...]`. From 4 to 100 loaded "
        f"adapters, the time over the base's grows {growth['peft']:.2f} times in peft and {growth['peft_fast']:.2f} "
        "times in peft_fast. "
        "Management: a Llama of 32 small layers, rank 8. "
        f"`python -m bench run --suite mixed` on {where(result)}.",
    ]
    return "\n".join(lines)


def _readme_prefix(result: dict[str, Any]) -> str:
    attention, prompts, models = (rows_of(result, f"prefix {what}") for what in ("attention", "prompt", "model"))
    lines = report_prefix.readme_lines(attention, prompts, models, _time)
    lines += [
        "",
        "P: learned tokens. Attention: 8 query heads, 2 of keys, size 64. Models: a Llama with hidden size 512 and 4 "
        "layers of such heads. Medians of interleaved rounds, as multiples of the same without a prefix. `two calls`: "
        "torch's flash attention of the text and of the prefix, merged by their logs of sums. With several prefixes, "
        "rows take them in turn: peft generates for one after another, and its attention is shown as if it could mix "
        "them. Memory: the most that tensors hold during a step, above what they held before. "
        f"`python -m bench run --suite prefix` on {where(result)}.",
    ]
    return "\n".join(lines)


def with_table(text: str, table: str, suite: str = "lora") -> str:
    """README's text with a suite's block between its two marks replaced. Raises: ValueError if they are not there."""
    begin, end = f"<!-- bench:{MARKS[suite]} -->", f"<!-- /bench:{MARKS[suite]} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"README.md must contain {begin} and {end} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


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
        axes.set_yticks(range(len(rows)), [LABELS.get(case) or report_prefix.label(case) for case in rows], fontsize=8)
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
