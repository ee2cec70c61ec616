"""The pages of a benchmark run: HTML, pictures, CSV, exponents and comparisons, from result files made here."""

import copy
import csv
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.report import (
    compare as report_compare,
    csv as report_csv,
    html as report_html,
    plots as report_plots,
    scaling as report_scaling,
)
from bench.report.rows import Files, load

pytest.importorskip("matplotlib")

ABOUT: dict[str, Any] = {
    "device": "A <machine> & co", "driver": "", "threads": 1, "commit": "abc1234", "date": "2026-01-02",
    "ceilings": {"bytes": 3e10, "bf16": 2e11, "fp32": 1e11}, "quick": False, "dry": False, "step": "",
    "versions": {"torch": "2.13.0", "triton": "3.9.0", "transformers": "5.23.0", "peft": "0.21.2"},
    "load_at_start": 0.1, "seconds": 12,
}  # fmt: skip
HOSTILE = '<script>alert(\'x\')</script> & "$x_$" \x07 id="f0-0-p"'


def spread(median: float, width: float = 0.01) -> dict[str, float]:
    return {"median": median, "low": median * (1 - width), "high": median * (1 + width)}


def row(case: str, group: str, provider: str, seconds: float, **more: Any) -> dict[str, Any]:
    """A benchmark of pytest-benchmark's JSON: one provider of one case."""
    stats = {"median": seconds, "q1": seconds * 0.99, "q3": seconds * 1.01, "rounds": 9}
    info = {"case": case, "group": group, "provider": provider, "error": 1e-3, "error_over_budget": 0.5}
    return {"group": f"{group} {case}", "name": case, "stats": stats, "extra_info": info | more}


def case_rows(case: str, group: str, base: float, peft: float, ours: float, **more: Any) -> list[dict[str, Any]]:
    """base, peft and peft_fast of one case, with their ratios; peft and ours: multiples of base."""
    more = {"words": f"{case} in words", "share_of_roofline": 0.5} | more
    ratio = spread(ours / peft)
    best = {"ratio_to_peft": ratio, "strongest": "peft", "ratio_to_strongest": ratio}
    return [
        row(case, group, "base", base, **more),
        row(case, group, "peft", base * peft, ratio_to_base=spread(peft), **more),
        row(case, group, "peft_fast", base * ours, ratio_to_base=spread(ours), **best, **more),
    ]


def sweep(group: str, title: str, axis: str, xs: list[float], exponent: float) -> list[dict[str, Any]]:
    return [
        found
        for x in xs
        for found in case_rows(f"{title}-{x:g}", group, 1e-4 * x**exponent, 1.4, 1.1, sweeps={title: [axis, x]})
    ]


def result(benchmarks: list[dict[str, Any]], wrong: list[dict[str, Any]], **about: Any) -> dict[str, Any]:
    ceilings = [row(name, "ceilings", "torch", 1.0, per_second=value) for name, value in ABOUT["ceilings"].items()]
    for ceiling in ceilings:  # as they are written, they have no error
        del ceiling["extra_info"]["error"], ceiling["extra_info"]["error_over_budget"]
    return {"peft_fast": ABOUT | about, "benchmarks": [*ceilings, *benchmarks], "wrong": wrong}


def files() -> Files:
    """All groups, wrong rows, graph columns, missing optional fields, names that would break a careless page."""
    lora = sweep("one layer", "o 1024 x 1024, r = 16, bf16", "tokens", [1, 16, 256, 4096], 0.75)
    lora += sweep("one layer", "o 1024 x 1024, M = 64", "rank", [4, 8, 16, 64], 0.0)
    lora += case_rows("lost", "one layer", 1e-3, 1.2, 1.5)
    lora += [row("lost", "one layer", "plain torch compiled", 2e-3, ratio_to_base=spread(1.9))]
    lora += case_rows(HOSTILE, "one layer", 1e-3, 1.3, 1.1, words=HOSTILE, sweeps={HOSTILE: ["tokens", 1]})
    lora += [row("bare", HOSTILE, HOSTILE, 1e-3)]
    wrong = {"case": "spoiled", "group": "one layer", "provider": "peft_fast", "words": HOSTILE}
    wrong_rows = [wrong | {"error": math.inf, "error_over_budget": math.inf}, wrong | {"provider": "peft_fast:split"}]
    mixed = sweep("mixed batch", "32 rows", "adapters used", [1, 2, 4, 8], 0.5)
    mixed += sweep("mixed batch", "8 rows of 4", "adapters loaded", [4, 10, 100], 0.01)
    mixed += [
        row("add", "management", "peft", 0.2),
        row("add", "management", "peft_fast", 0.01, ratio_to_peft=spread(0.05)),
    ]
    prefix = sweep("attention", "8 x 128", "prefix length", [20, 128, 1024], 1.0)
    train = sweep("training step", "Llama, bf16", "batch", [1, 2, 4], 1.0)
    more = {"peak_bytes": 1000, "peak_bytes_to_base": 1.5, "tokens_per_second": 2e4}
    train += case_rows("step", "training step", 0.5, 1.6, 1.2, **more)
    graph = spread(5e-5) | {"ratio_to_base": 1.2, "ratio_to_peft": spread(0.7)}
    decode = case_rows("decode", "decode step", 1e-4, 3.0, 1.1, graph=graph)
    bare = ABOUT | {"suite": "generate", "ceilings": {}, "versions": {}}
    return {
        "lora": result(lora, wrong_rows, suite="lora"),
        "mixed": result(mixed, [], suite="mixed"),
        "prefix": result(prefix, [], suite="prefix"),
        "train": result(train, [], suite="train", quick=True),
        "generate": {"peft_fast": bare, "benchmarks": decode, "wrong": []},
    }


class Page(HTMLParser):
    """What is in a page; AssertionError where an element is not closed as it was opened."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        self.ids += [value or "" for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "new" / "report.html"
    old = copy.deepcopy(files())
    old["lora"]["peft_fast"]["device"] = "another"
    report_html.write(files(), path, compared=old)
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_ids_are_unique(page: str) -> None:
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    referred = {value[1:] for name, value in parsed.attributes if name == "href"}
    referred |= set(re.findall(r"url\(#([^)]+)\)", " ".join(value for _, value in parsed.attributes)))
    assert referred <= set(parsed.ids) and any(name.startswith("f0-0-") for name in referred)


def test_pictures_in_the_page_are_xml(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) > 10
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_nothing_of_a_file_is_taken_for_html(page: str) -> None:
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "alert('x')" in "".join(parsed.text)


def test_the_page_loads_nothing(page: str) -> None:
    parsed = Page(page)
    assert not parsed.tags & {"script", "link", "iframe", "object", "img", "image", "base"}
    loading = [value for name, value in parsed.attributes if name in ("src", "href", "data", "srcset", "xlink:href")]
    assert all(value.startswith("#") for value in loading)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_the_page_tells_what_it_has_to(page: str) -> None:
    text = "".join(Page(page).text)
    about = ("A <machine> & co", "2 wrong, not timed", "--quick", "abc1234", "torch 2.13.0", "another", "▼", "▲")
    for told in (*about, "graph: peft_fast / base", "plain torch compiled / base", "How it was measured"):
        assert told in text, told
    bad = page[page.index('<div class="box bad">') :]
    assert bad.index("peft_fast:split") < bad.index("</div>")


def test_losses_are_marked_like_wins(page: str) -> None:
    line = next(line for line in page.splitlines() if "lost in words" in line and "<tr" in line and "title=" in line)
    assert '<td class="loss">▼ 0.80' in line
    assert page.count('class="win"') > 1


def test_a_run_without_a_kind_of_case_says_so(tmp_path: Path) -> None:
    report_html.write({"generate": files()["generate"]}, tmp_path / "page.html")
    text = "".join(Page((tmp_path / "page.html").read_text()).text)
    assert text.count("No case of this kind in this run.") == 3  # memory, and both kinds of curves
    assert "wrong, not timed" not in text and "Comparison" not in text


def test_every_kind_of_picture_is_drawn_for_all_that_has_its_numbers() -> None:
    drawn = {kind: [title for title, _, _ in figures] for kind, figures in report_plots.figures(files()).items()}
    assert drawn["Memory"] == ["train: training step"]
    assert drawn["Time over tokens"] == ["lora: time over tokens"]
    assert [title.split("over ")[1] for title in drawn["Time over adapters, prefix length, rank and batch"]] == [
        "rank", "adapters used", "adapters loaded", "prefix length", "batch",
    ]  # fmt: skip
    assert "mixed: management" in drawn["Speed over peft"]
    assert "generate: decode step" in drawn["Overhead over the base"]
    assert "lora: one layer" in drawn["Share of what the machine allows"]


def test_many_cases_become_several_pictures_that_hold_all_of_them() -> None:
    many = [found for i in range(101) for found in case_rows(f"number {i}.", "one layer", 1e-3, 1.3, 1.1)]
    figures = report_plots.figures({"lora": result(many, [])})["Overhead over the base"]
    labels = [label.get_text() for _, _, figure in figures for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"number {i}. in words" for i in range(101)]
    assert len(figures) == math.ceil(101 / 15) and figures[0].title.endswith(f"1 of {len(figures)}")


def test_labels_of_bars_do_not_overlap() -> None:
    words = "a case whose words are long, " * 9
    many = [found for i in range(9) for found in case_rows(f"{i}", "one layer", 1e-3, 1.3, 1.1, words=f"{i} {words}")]
    for drawn in report_plots.figures({"lora": result(many, [])}).values():
        for _, _, figure in drawn:
            figure.draw_without_rendering()
            boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
            assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))


def test_the_table_has_every_row_once(tmp_path: Path) -> None:
    report_csv.write(files(), tmp_path / "new" / "all.csv")
    with (tmp_path / "new" / "all.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(f["benchmarks"]) + len(f["wrong"]) for f in files().values())
    assert [r["median_seconds"] for r in rows if r["wrong"] == "True"] == ["", ""]
    hostile = next(r for r in rows if r["case"] == HOSTILE and r["provider"] == "peft_fast")
    assert hostile["words"] == HOSTILE and json.loads(hostile["sweeps"]) == {HOSTILE: ["tokens", 1]}
    assert float(hostile["ratio_to_base_high"]) == pytest.approx(1.1 * 1.01)
    assert (hostile["torch"], hostile["commit"], hostile["file"]) == ("2.13.0", "abc1234", "lora")
    graph = next(r for r in rows if r["case"] == "decode" and r["provider"] == "peft_fast")
    assert float(graph["graph_median_seconds"]) == 5e-5 and float(graph["graph_ratio_to_peft_median"]) == 0.7


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.37, -0.8])
def test_exponents_of_power_laws_are_found(exponent: float) -> None:
    benchmarks = sweep("one layer", "o", "tokens", [1, 16, 64, 4096], exponent)
    found = report_scaling.fits({"lora": result(benchmarks[::-1], [])})
    assert {fit.curve.provider for fit in found} == {"base", "peft", "peft_fast"}
    for fit in found:
        assert fit.exponent == pytest.approx(exponent, abs=1e-6) and fit.last == pytest.approx(exponent, abs=1e-6)
        assert fit.standard_error < 1e-6 and fit.r_squared == pytest.approx(1) and fit.remark == ""


def curve(provider: str, times: list[float]) -> list[dict[str, Any]]:
    """Rows at x = 1, 2, 4, ..."""
    return [
        row(f"{provider}{i}", "one layer", provider, seconds, sweeps={"o": ["rank", 2**i]})
        for i, seconds in enumerate(times)
    ]


def test_a_fit_is_least_squares_with_its_standard_error() -> None:
    times = [1.0, 2.5, 3.5, 9.0]
    (fit,) = report_scaling.fits({"lora": result(curve("peft", times), [])})
    # by the textbook: y = ln 1, ln 2.5, ln 3.5, ln 9 over x = 0, 1, 2, 3 in units of ln 2
    y = [math.log(t) for t in times]
    slope = (-1.5 * y[0] - 0.5 * y[1] + 0.5 * y[2] + 1.5 * y[3]) / 5
    residuals = [value - sum(y) / 4 - slope * (i - 1.5) for i, value in enumerate(y)]
    assert fit.exponent == pytest.approx(slope / math.log(2))
    assert fit.standard_error == pytest.approx(math.sqrt(sum(r * r for r in residuals) / 2 / 5) / math.log(2))
    assert fit.last == pytest.approx(math.log(9 / 3.5) / math.log(2))


def test_curves_that_are_no_power_law_are_told() -> None:
    rows = curve("up", [1, 2, 4, 8]) + curve("knee", [1, 1, 1, 1, 1, 9])
    rows += curve("level", [1, 1.02, 0.99]) + curve("two", [1, 2])
    found = report_scaling.fits({"lora": result(rows, [])})
    assert {fit.curve.provider: fit.remark for fit in found} == {"up": "", "knee": "bends", "level": "flat"}
    text = report_scaling.lines(found)
    assert text[0].startswith("time over rank") and len(text) == 4
    assert text[2].endswith("bends") and "knee" in text[2]


def moved(change: dict[str, Any]) -> dict[tuple[str, str], str]:
    """Marks by (case, provider) after a change to peft_fast's row of case "a"."""
    before = {
        "lora": result([*case_rows("a", "one layer", 1e-3, 1.5, 1.2), *case_rows("b", "one layer", 1e-3, 1.5, 1.2)], [])
    }
    after = copy.deepcopy(before)
    ours = next(b for b in after["lora"]["benchmarks"] if b["extra_info"]["provider"] == "peft_fast")
    ours["extra_info"] |= change
    return {(m.words[0], m.provider): m.mark for m in report_compare.compare(before, after) if m.mark}


def test_only_what_moved_beyond_the_noise_is_marked() -> None:
    ours = ("a", "peft_fast")
    assert moved({}) == {}
    assert moved({"ratio_to_base": spread(1.3)}) == {ours: "slower"}
    assert moved({"ratio_to_base": spread(1.1)}) == {ours: "faster"}
    assert moved({"ratio_to_base": spread(1.3, width=0.1)}) == {}  # the quartiles overlap
    assert moved({"ratio_to_base": spread(1.2 * 1.025, width=0.0)}) == {}  # apart, but by less than 3 %
    assert moved({"ratio_to_base": spread(1.2 * 1.035, width=0.0)}) == {ours: "slower"}


def test_times_are_compared_on_one_machine_only_and_only_without_a_ratio() -> None:
    before = {"lora": result(case_rows("a", "one layer", 1e-3, 1.5, 1.2), [])}
    slower = {"lora": result(case_rows("a", "one layer", 2e-3, 1.5, 1.2), [])}
    assert [m.mark for m in report_compare.compare(before, slower)] == ["slower", "", ""]  # base has no ratio
    slower["lora"]["peft_fast"]["device"] = "another"
    assert [m.mark for m in report_compare.compare(before, slower)] == ["", "", ""]
    text = report_compare.lines(before, slower)
    assert text[:2] == [
        "other device: A <machine> & co before, another now",
        "times of different machines are not comparable: only rows with a ratio to the base are judged",
    ]


def test_new_gone_and_wrong_rows_are_told() -> None:
    a, b = (case_rows(name, "one layer", 1e-3, 1.5, 1.2) for name in "ab")
    spoiled = [{**a[2]["extra_info"], "words": "a"}]
    right, wrong = {"x": result(a, [])}, {"y": result([*a[:2], *b[:1]], spoiled, quick=True)}
    marks = {(m.words[0], m.provider): m.mark for m in report_compare.compare(right, wrong)}
    assert marks == {("a", "base"): "", ("a", "peft"): "", ("a", "peft_fast"): "became wrong", ("b", "base"): "new"}
    back = {(m.words[0], m.provider): m.mark for m in report_compare.compare(wrong, right)}
    assert back[("a", "peft_fast")] == "became right" and back[("b", "base")] == "gone"
    assert "still wrong" in [m.mark for m in report_compare.compare(wrong, wrong)]
    assert report_compare.lines(right, wrong)[:2] == [
        "a --quick run now: y", "1 became wrong, 1 new, 2 unchanged within the noise",
    ]  # fmt: skip


def test_suites_that_only_one_run_measured_are_told_in_a_line() -> None:
    a = case_rows("a", "one layer", 1e-3, 1.5, 1.2)
    before = {"lora": result(a, [], suite="lora"), "mixed": result(a, [], suite="mixed")}
    now = {"lora": result(a, [], suite="lora")}
    assert report_compare.lines(before, now) == [
        "not compared, only measured before: mixed", "3 unchanged within the noise",
    ]  # fmt: skip


def test_folders_without_results_are_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no result files"):
        load(tmp_path)
    for stem, found in files().items():
        (tmp_path / f"{stem}.json").write_text(json.dumps(found))
    assert list(load(tmp_path)) == ["lora", "mixed", "prefix", "train", "generate"]
    (tmp_path / "zz.json").write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match=r"zz\.json is no result"):
        load(tmp_path)
    (tmp_path / "zz.json").write_text('{"benchmarks": [')
    with pytest.raises(ValueError, match=r"zz\.json is not JSON"):
        load(tmp_path)
