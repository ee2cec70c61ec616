"""What README.md and docs/benchmarks.md show of the committed results: headlines there, everything here."""

from pathlib import Path
from typing import Any, NamedTuple

from ..cases.suites import SUITES
from . import picture, predict as report_predict, scaling as report_scaling
from .rows import Files, all_rows, load, machine, rows_of, spread_of, table, time_in_words, where, words_of

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
PICTURE = ROOT / "docs" / "beside_peft.svg"
RESULTS = Path(__file__).parents[1] / "results"
NOT_YET = "not measured yet"
# suite -> the cases that README.md shows beside the one with the worst ratio; "memory CASE": growth of memory;
# "compiled CASE": both libraries under torch.compile
HEADLINES = {
    "lora": ("lora-fwd-8x128-bf16", "lora-fwd-1x1-bf16", "compiled lora-fwd-1x1-bf16"),
    "mixed": ("mixed-32x1-32of32-bf16-adapters", "mixed-8x1-1of100-fp32", "load_adapter-as-number-100"),
    "prefix": ("train-8x128-P1024-fp32", "decode-8x256-P128-fp32"),
    "quant": ("quant-fwd-8x128-nf4-bf16",),
    "train": (
        *("lora-train-8x128-bf16-p0.05", "memory lora-train-8x128-bf16-p0.05", "prefix-train-16x64-P128-fp32"),
        *("quant-train-8x128-nf4-bf16-autocast-p0.05", "memory quant-train-8x128-nf4-bf16-autocast-p0.05"),
    ),
    "generate": ("lora-generate-16x32-4adapters-bf16", "prefix-generate-16x32-P128-fp32-4prefixes"),
    "host": (),
}
NOTES = {
    "lora": "One layer: a site of a quarter of Llama-3-8B's sizes. Models: a Llama with hidden size 512 and 8 layers, "
    "LoRA of rank 16 on all linear layers as `get_peft_model` makes it.",
    "mixed": "The same Llama with adapters of ranks 4 to 64; rows take theirs in turn. Management: 224 linear layers.",
    "prefix": "P: learned tokens. 8 query heads, 2 of keys, size 64. `two calls`: torch's flash attention of the text "
    "and of the prefix, merged by their logs of sums; `concatenated`: peft's way, as if it could mix prefixes.",
    "quant": "NF4 with double quantization. Models: hidden size 512, 4 layers, LoRA of rank 16 on all linear layers.",
    "train": "Forward, loss, backward to the adapter and to the model's input. Memory: the most that tensors hold "
    "during a step, above what they held before.",
    "generate": "Greedy, with a dynamic cache. peft generates for several prefixes one after another.",
    "host": "What Python and torch do for a layer and a token before kernels run: a GPU's path, measured on "
    "a CPU with tensors so small that an operator costs about what launching a kernel does.",
}


class Entry(NamedTuple):
    """A line of the tables, in words. peft, strongest, peft_fast: multiples of the base, times where there is none.

    ratio: peft_fast over the strongest other; worst: the same as a number.
    """

    words: str
    base: str
    peft: str
    strongest: str
    peft_fast: str
    ratio: str
    worst: float

    @property
    def cells(self) -> tuple[str, ...]:
        return self[:-1]


HEAD = " | base | peft | strongest other | peft_fast | peft_fast / strongest "


def committed() -> tuple[Files, Files]:
    """The files in bench/results/cpu and bench/results/gpu; none where nothing was measured."""
    cpu, gpu = (load(RESULTS / d) if any((RESULTS / d).glob("*.json")) else {} for d in ("cpu", "gpu"))
    return cpu, gpu


def pages(cpu: Files, gpu: Files) -> dict[Path, str]:
    """The texts that the two pages must have. Raises: ValueError for results of a --quick or --dry run."""
    for result in (*cpu.values(), *gpu.values()):
        if result["peft_fast"]["quick"] or result["peft_fast"]["dry"]:
            raise ValueError("the pages show whole runs of `python -m bench run`, and this one was --quick or --dry")
    text = BENCHMARKS.read_text()
    for suite in SUITES:
        text = with_block(text, suite, "\n".join(_suite_lines(suite, cpu.get(suite))))
    text = with_block(text, "scaling", "\n".join(_scaling_lines(cpu)))
    text = with_block(text, "predictions", "\n".join(_prediction_lines(cpu)))
    text = with_block(text, "gpu", "\n".join(_gpu_lines(gpu)))
    readme = with_block(README.read_text(), "headlines", "\n".join(headlines(cpu, gpu)))
    readme = with_block(readme, "sentence", picture.sentence(cpu))
    return {README: readme, BENCHMARKS: text, PICTURE: picture.draw(cpu)}


def entries(result: dict[str, Any]) -> dict[str, Entry]:
    """Lines by case; those of memory by "memory CASE"."""
    found, memory = {}, {}
    for group in dict.fromkeys(info["group"] for info in all_rows(result) if info["group"] != "ceilings"):
        for case, row in rows_of(result, group).items():
            ours = row.get("peft_fast", {})
            ratio = spread_of(ours, "ratio_to_strongest")
            if ratio is None:
                continue
            found[case] = _entry(row, ratio.median)
            if "peft compiled" in row and "peft_fast compiled" in row:
                found[f"compiled {case}"] = _compiled_entry(row)
            if all("peak_bytes" in row.get(who, {}) for who in ("base", "peft", "peft_fast")):
                memory[f"memory {case}"] = _memory_entry(row)
    return found | memory


def _entry(row: dict[str, dict[str, Any]], ratio: float) -> Entry:
    ours = row["peft_fast"]
    strongest = ours["strongest"]
    base = time_in_words(row["base"]["median"]) if "base" in row else "-"
    peft = _multiple(row["peft"]) if "peft" in row else "-"
    best = f"{_multiple(row[strongest])} {strongest}" if strongest != "peft" else peft
    return Entry(words_of(ours), base, peft, best, _multiple(ours), f"{ratio:.2f}", ratio)


def _compiled_entry(row: dict[str, dict[str, Any]]) -> Entry:
    """Both libraries under torch.compile, beside the base without."""
    theirs, ours = row["peft compiled"], row["peft_fast compiled"]
    medians = [spread_of(info, "ratio_to_base") for info in (ours, theirs)]
    ratio = medians[0].median / medians[1].median if medians[0] and medians[1] else float("nan")
    cells = (_multiple(theirs), _multiple(theirs), _multiple(ours))
    words = f"{words_of(ours)}, both libraries compiled"
    return Entry(words, time_in_words(row["base"]["median"]), *cells, f"{ratio:.2f}", ratio)


def _multiple(info: dict[str, Any]) -> str:
    ratio = spread_of(info, "ratio_to_base")
    return f"{ratio.median:.2f}x" if ratio else time_in_words(info["median"])


def _memory_entry(row: dict[str, dict[str, Any]]) -> Entry:
    base, peft, ours = (row[who]["peak_bytes"] for who in ("base", "peft", "peft_fast"))
    cells = (f"{base / 1e6:.0f} MB", f"{peft / base:.2f}x", f"{peft / base:.2f}x", f"{ours / base:.2f}x")
    return Entry(f"memory of: {words_of(row['peft_fast'])}", *cells, f"{ours / peft:.2f}", ours / peft)


def headlines(cpu: Files, gpu: Files) -> list[str]:
    """README's table: a selection of each suite, with the worst ratio of it."""
    rows: list[tuple[str, ...]] = []
    for suite in SUITES:
        found = entries(cpu[suite]) if suite in cpu else {}
        if not found:
            rows.append((suite, NOT_YET, *"----"))
            continue
        worst = max(found, key=lambda case: found[case].worst)
        shown = dict.fromkeys((*(case for case in HEADLINES[suite] if case in found), worst))
        rows += [(f"{suite}: {found[case].words}", *found[case].cells[1:]) for case in shown]
    rows += [("GPU", f"{len(gpu)} steps: docs/benchmarks.md" if gpu else NOT_YET, *"----")]
    measured = "; ".join(dict.fromkeys(machine(result) for result in cpu.values()))
    return [*table(HEAD, rows), "", f"CPU: {measured or NOT_YET}."]


def _suite_lines(suite: str, result: dict[str, Any] | None) -> list[str]:
    if result is None:
        return [f"{NOT_YET.capitalize()}."]
    found = [entry.cells for entry in entries(result).values()]
    about = f"`python -m bench run --suite {suite}` on {where(result)}."
    return [*table(HEAD, found), "", f"{NOTES[suite]} {about}"]


def _scaling_lines(cpu: Files) -> list[str]:
    found = report_scaling.fits(cpu)
    return ["```", *report_scaling.lines(found), "```"] if found else [f"{NOT_YET.capitalize()}."]


def _prediction_lines(cpu: Files) -> list[str]:
    rows = report_predict.summary(report_predict.predictions(cpu))
    return table(" | provider | rows | median error | quartiles ", rows) if rows else [f"{NOT_YET.capitalize()}."]


def _gpu_lines(gpu: Files) -> list[str]:
    if not gpu:
        return [f"{NOT_YET.capitalize()}: no row of this page comes from a GPU."]
    lines = []
    for step, result in gpu.items():
        lines += [f"### {step}", "", *table(HEAD, [e.cells for e in entries(result).values()]), "", where(result), ""]
    return lines


def with_block(text: str, name: str, content: str) -> str:
    """A page with the content between two marks replaced. Raises: ValueError if they are not there once each."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must contain {begin} and {end} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
