"""The measurements measure: wrong results are flagged, rounds are interleaved, README says what was measured."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    cases,
    manage_cases,
    measure,
    mixed_cases,
    providers,
    report,
    report_lora,
    report_mixed,
    report_pages,
    report_rows,
    run,
)
from bench.__main__ import main as bench_main
from bench.bench_lora import Measured, ReplayClock

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CASE = cases.OpCase("o", 48, 40, 8, 4, "train", "bf16", "fp32", 0.1)


def run_bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    # a pytest that takes itself for one of xdist's workers times nothing
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def with_one_wrong(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A GPU step tried on the CPU, with a peft_fast whose layer doubles its output."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "spoil.py").write_text(
        "from bench import providers\n"
        "build = providers.PROVIDERS['peft_fast']\n"
        "def spoiled(*args):\n"
        "    layer = build(*args)\n"
        "    layer.register_forward_hook(lambda module, args, y: y * 2)\n"
        "    return layer\n"
        "providers.PROVIDERS['peft_fast'] = spoiled\n"
    )
    out = folder / "out.json"
    ran = run_bench(
        "run", "--gpu", "forward-o", "--dry", "--only", "M16-r8 or ceiling", "--out", str(out),
        PYTHONPATH=f"{folder}{os.pathsep}{ROOT}", PYTEST_PLUGINS="spoil",
    )  # fmt: skip
    return ran, out


def test_a_wrong_result_is_flagged_and_never_timed(
    with_one_wrong: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
) -> None:
    ran, out = with_one_wrong
    assert ran.returncode != 0, ran.stdout
    result = json.loads(out.read_text())
    assert [row["provider"] for row in result["wrong"]] == ["peft_fast"]
    timed = {b["extra_info"]["provider"] for b in result["benchmarks"] if b["extra_info"]["group"] == "op"}
    assert timed == {"base", "plain torch", "peft"}
    reported = run_bench("report", str(out), "--plots", str(tmp_path))
    assert reported.returncode == 1
    assert re.search(r"peft_fast +WRONG", reported.stdout)


def test_a_row_says_what_it_was_measured_with(with_one_wrong: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    result = json.loads(with_one_wrong[1].read_text())
    about = result["peft_fast"]
    assert about["versions"]["torch"] == torch.__version__
    assert about["commit"] and about["date"] and about["device"] and about["threads"] == 1
    info = next(b["extra_info"] for b in result["benchmarks"] if b["extra_info"]["provider"] == "peft")
    assert {"flops", "bytes", "share_of_roofline", "error", "ratio_to_base"} <= set(info)
    assert {b["extra_info"]["case"] for b in result["benchmarks"] if b["extra_info"]["group"] == "ceilings"} == {
        "bytes", "bf16", "fp32",
    }  # fmt: skip


def test_a_step_of_the_gpu_campaign_runs_dry(tmp_path: Path) -> None:
    out = tmp_path / "backward.json"
    ran = run_bench("run", "--gpu", "backward", "--dry", "--out", str(out), "--only", "o-M64")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = report_rows.rows_of(json.loads(out.read_text()), "op")
    assert len(rows) == 2 and all(set(row) == set(providers.PROVIDERS) for row in rows.values())


def test_every_step_has_its_cases() -> None:
    for step in cases.GPU_STEPS[1:]:
        found = [*cases.gpu_ops(step), *cases.gpu_mixed(step), *cases.gpu_prefix(step), *cases.gpu_quant(step)]
        assert found and len(set(map(str, found))) == len(found)
    assert {case.M for case in cases.gpu_ops("forward-qkv")} >= {1, 16384}


@pytest.mark.parametrize("provider", ["base", "plain torch", "peft", "peft_fast"])
@pytest.mark.parametrize("mode", ["fwd", "train"])
def test_providers_agree_with_fp64_and_a_wrong_one_does_not(provider: str, mode: str) -> None:
    site = providers.make_site(cases.OpCase("o", 48, 40, 8, 4, mode, "bf16", "fp32", 0.1), CPU, 0)
    exact = providers.exact(site, lora=provider != "base")
    layer = providers.layers(provider, site)[0]
    out = providers.outputs(layer, site)
    plain = out if provider == "base" else providers.outputs(providers.layers("plain torch", site)[0], site)
    error, share = measure.error_over_budget(out, plain, exact)
    assert 0 < error < 0.02 and share <= 1
    for i in range(len(out)):
        wrong = [*out[:i], out[i] * 1.1, *out[i + 1 :]]
        assert measure.error_over_budget(wrong, plain, exact)[1] > 1
    assert measure.error_over_budget([*out[:-1], out[-1] * float("nan")], plain, exact)[1] == float("inf")
    assert measure.error_over_budget(out[:-1], plain, exact)[1] == float("inf")


def test_all_providers_of_a_training_case_do_the_same_work() -> None:
    site = providers.make_site(CASE, CPU, 0)
    for provider in ("plain torch", "peft", "peft_fast"):
        gradients = providers.runner(provider, site)(0)
        assert [tuple(g.shape) for g in gradients] == [(8, 48), (4, 48), (40, 4)]
    assert [tuple(g.shape) for g in providers.runner("base", site)(0)] == [(8, 48)]


def test_few_tokens_find_the_weights_outside_the_cache() -> None:
    small = cases.OpCase("o", 64, 64, 1, 4)
    site = providers.make_site(small, CPU, cache_bytes=64 * 64 * 2 * 3)
    assert len(site.copies) == 7
    used: list[int] = []
    run = providers.runner("base", site)
    outs = [run(i) for i in range(8)]
    assert torch.equal(outs[0], outs[7]) and not torch.equal(outs[0], outs[1])
    assert not used


def test_rounds_are_interleaved_and_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_SAMPLE_SECONDS", 0.0)
    order: list[str] = []
    functions = {name: lambda i, name=name: order.append(name) for name in "abc"}
    monkeypatch.setattr(measure, "_calls_per_sample", lambda function, device: 1)
    samples = measure.interleaved(functions, CPU, seconds=0.0, min_rounds=4)
    assert "".join(order) == "abcbcacababc"
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_ratios_are_taken_round_by_round() -> None:
    slow_moment = {"base": [1.0, 10.0, 1.0, 1.0, 1.0], "peft": [1.5, 15.0, 1.5, 1.5, 1.5]}
    measured = Measured(slow_moment, {"base": {}, "peft": {}})
    measured.add_ratios("base")
    assert measured.info["peft"]["ratio_to_base"] == {"median": 1.5, "low": 1.5, "high": 1.5}
    assert "ratio_to_base" not in measured.info["base"]


def test_the_clock_replays_samples() -> None:
    clock = ReplayClock()
    clock.load([0.5, 0.25])
    first = -clock() + clock()
    assert (first, -clock() + clock()) == (0.5, 0.25)


def test_memory_counts_what_is_alive_and_what_autograd_keeps() -> None:
    x = torch.randn(1000, 100, requires_grad=True)
    w = torch.randn(100, 100)
    with measure.PeakMemory(CPU) as memory:
        a = x.detach() + 1
        a = a * 2
        del a
    assert 800_000 <= memory.bytes <= 810_000
    assert measure.saved_bytes(lambda: ((x @ w).exp() * 2).sum(), [w, x]) == 400_000


def test_flops_and_bytes_of_a_case() -> None:
    case = cases.OpCase("o", 100, 200, 10, 4, "fwd", "bf16", "fp32")
    assert case.flops(False) == 2 * 10 * 100 * 200
    assert case.flops(True) - case.flops(False) == 2 * 10 * 4 * 300
    assert case.bytes(False) == 2 * (10 * 100 + 100 * 200 + 10 * 200)
    assert case.bytes(True) - case.bytes(False) == 4 * 4 * 300


def committed(suite: str = "lora") -> dict[str, Any] | None:
    return report.committed_results()[suite]


def test_the_pages_show_the_committed_results_or_say_that_there_are_none() -> None:
    for page, text in report_pages.pages(report.committed_results()).items():
        assert page.read_text() == text, "run `python -m bench report --readme`"


@pytest.mark.parametrize("suite", run.SUITES)
def test_the_headlines_have_the_worst_ratio(suite: str) -> None:
    result = committed(suite)
    if result is None:
        return
    entries = report_pages.SUITES[suite][1].entries(result)
    shown = report_pages.HEADLINES[suite][1]
    assert max(float(entries[case].ratio) for case in shown) == max(float(entry.ratio) for entry in entries.values())


def test_a_suite_that_was_not_measured() -> None:
    text = report_pages.pages(dict.fromkeys(run.SUITES))
    assert "| LoRA | not measured yet | - | - | - |" in text[report_pages.README]
    assert text[report_pages.BENCHMARKS].count("Not measured yet.") == len(run.SUITES)


def test_committed_results_are_of_a_whole_run_and_right() -> None:
    result = committed()
    if result is None:
        return  # then README says so, see above
    assert not result["wrong"] and not result["peft_fast"]["quick"] and not result["peft_fast"]["dry"]
    rows = report_rows.rows_of(result, "model")
    assert set(rows) == {case.name for case in cases.cpu_models(quick=False)}
    assert set(report_rows.rows_of(result, "op")) == {str(case) for case in cases.cpu_ops(quick=False)}


def test_committed_results_of_mixed_batches_are_of_a_whole_run_and_right() -> None:
    result = committed("mixed")
    if result is None:
        return
    assert not result["wrong"] and not result["peft_fast"]["quick"] and report_rows.suite_of(result) == "mixed"
    measured = {**report_rows.rows_of(result, "mixed"), **report_rows.rows_of(result, "flat")}
    assert set(measured) == {str(case) for case in cases.cpu_mixed(quick=False)}
    wanted = {f"{operation}-{case}" for operation in manage_cases.OPERATIONS for case in cases.cpu_manage(quick=False)}
    assert set(report_rows.rows_of(result, "manage")) == wanted


def a_result(ratio: float = 1.2) -> dict[str, Any]:
    """A result file as ``python -m bench run`` writes it, with made-up numbers."""
    benchmarks = []
    for provider, over_base in (("base", None), ("peft", 1.8), ("peft_fast", ratio)):
        info = {"group": "model", "case": "train-bf16-dropout", "provider": provider, "error": 0.01, "flops": 1.0}
        info |= {"peak_bytes": 1e6 * (over_base or 1), "peak_bytes_to_base": over_base or 1}
        if over_base:
            info["ratio_to_base"] = {"median": over_base, "low": over_base, "high": over_base}
        if provider == "peft_fast":
            info["ratio_to_peft"] = {"median": ratio / 1.8, "low": 0.5, "high": 0.9}
        benchmarks.append({"extra_info": info, "stats": {"median": 0.5 * (over_base or 1)}})
    about = {
        "device": "some CPU", "threads": 1, "versions": {"torch": "2.13.0"}, "commit": "abc", "date": "2026-01-01",
        "quick": False, "dry": False, "ceilings": {"bytes": 1e10, "bf16": 1e11, "fp32": 1e11},
    }  # fmt: skip
    return {"benchmarks": benchmarks, "wrong": [], "peft_fast": about}


def test_an_edited_table_is_noticed() -> None:
    pages = report_pages.pages({**report.committed_results(), "lora": a_whole_result()})
    text = pages[report_pages.README]
    line = "| LoRA: training step, bf16, dropout 0.05 | 500 ms | 1.80x | 1.20x | 0.67 |"
    assert line in text and line.replace("LoRA: ", "") in pages[report_pages.BENCHMARKS]
    table = "\n".join(report_pages.headlines({**report.committed_results(), "lora": a_whole_result()}))
    assert report_pages.with_block(text, "headlines", table) == text
    edited = text.replace(line, line.replace("1.20x", "1.02x"))
    assert edited != text and report_pages.with_block(edited, "headlines", table) == text
    with pytest.raises(ValueError, match="bench:headlines"):
        report_pages.with_block(text.replace("<!-- /bench:headlines -->", ""), "headlines", table)


def a_whole_result() -> dict[str, Any]:
    """`a_result` with every case of LoRA."""
    result = a_result()
    result["benchmarks"] = [
        {**row, "extra_info": {**row["extra_info"], "case": case}}
        for case in report_lora.LABELS
        for row in result["benchmarks"]
    ]
    return result


@pytest.mark.parametrize("kind", ["quick", "dry"])
def test_a_quick_run_does_not_get_into_the_pages(kind: str) -> None:
    result = a_result()
    result["peft_fast"][kind] = True
    with pytest.raises(ValueError, match=kind):
        report_pages.pages({**report.committed_results(), "lora": result})


def test_report_fills_in_both_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("README", "BENCHMARKS"):
        page = getattr(report_pages, name)
        (tmp_path / page.name).write_text(page.read_text().replace("x |", "x  |"))
        monkeypatch.setattr(report_pages, name, tmp_path / page.name)
    monkeypatch.setattr(report, "draw", lambda *args: [])
    assert bench_main(["report", "--readme"]) == 0
    for page in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
        assert (tmp_path / page.name).read_text() == page.read_text()


def test_the_report_draws_and_prints_losses_beside_wins(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib")
    result = a_result(ratio=2.0)
    assert "worst median ratio 1.111 (train-bf16-dropout)" in report.side_by_side(result)
    drawn = report.draw(result, tmp_path, "cpu")
    assert [path.name for path in drawn] == ["cpu-model.png"] and drawn[0].stat().st_size > 5000


# ------------------------------------------------------------------------------------------------- mixed batches
QUICK = next(case for case in cases.cpu_mixed(quick=True) if case.group == "mixed")


@pytest.fixture(scope="module")
def loaded() -> mixed_cases.Loaded:
    models = mixed_cases.Loaded(small=True)
    models.bring(QUICK)
    return models


@pytest.fixture(scope="module")
def mixed_with_one_wrong(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A quick run in which peft_fast is given the names of the rows in reverse, and its set_adapter does nothing."""
    folder = tmp_path_factory.mktemp("wrong_mix")
    (folder / "spoil_mix.py").write_text(
        "import peft_fast\n"
        "from dataclasses import replace\n"
        "from bench import mixed_cases\n"
        "runner = mixed_cases.Loaded.runner\n"
        "def spoiled(self, case, provider):\n"
        "    if provider != 'peft_fast':\n"
        "        return runner(self, case, provider)\n"
        "    class Reversed(type(case)):\n"
        "        names = case.names[::-1]\n"
        "    return runner(self, Reversed(**vars(case)), provider)\n"
        "mixed_cases.Loaded.runner = spoiled\n"
        "peft_fast.PeftModel.set_adapter = lambda *args, **kwargs: None\n"
    )
    out = folder / "out.json"
    ran = run_bench(
        "run", "--suite", "mixed", "--quick", "--only", f"{QUICK} or as-number-2", "--out", str(out),
        PYTHONPATH=f"{folder}{os.pathsep}{ROOT}", PYTEST_PLUGINS="spoil_mix",
    )  # fmt: skip
    return ran, out


def test_a_batch_with_other_rows_adapters_is_flagged_and_never_timed(
    mixed_with_one_wrong: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
) -> None:
    ran, out = mixed_with_one_wrong
    assert ran.returncode != 0, ran.stdout
    result = json.loads(out.read_text())
    assert {(row["group"], row["provider"]) for row in result["wrong"]} == {
        ("mixed", "peft_fast"), ("manage", "peft_fast"),
    }  # fmt: skip
    timed = [
        (b["extra_info"]["group"], b["extra_info"]["case"], b["extra_info"]["provider"]) for b in result["benchmarks"]
    ]
    assert {p for g, _, p in timed if g == "mixed"} == {"base", "peft", "peft_fast ids"}
    managed = {f"{operation}-as-number-2" for operation in manage_cases.OPERATIONS}
    assert {c for g, c, p in timed if g == "manage" and p == "peft"} == managed
    assert {c for g, c, p in timed if g == "manage" and p == "peft_fast"} == managed - {"set_adapter-as-number-2"}
    reported = run_bench("report", str(out), "--plots", str(tmp_path))
    assert reported.returncode == 1, reported.stderr
    assert re.search(r"peft_fast +WRONG", reported.stdout)


@pytest.mark.parametrize("step, only", [("mixed", "o-M8"), ("mixed-model", "1of")])
def test_the_gpu_steps_of_mixed_batches_run_dry(step: str, only: str, tmp_path: Path) -> None:
    out = tmp_path / f"{step}.json"
    ran = run_bench("run", "--gpu", step, "--dry", "--out", str(out), "--only", only)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = report_rows.rows_of(json.loads(out.read_text()), "mixed site" if step == "mixed" else "decode")
    assert rows and all(
        {"base", "peft_fast" if step == "mixed" else "peft_fast ids"} <= set(row) for row in rows.values()
    )


@pytest.mark.parametrize("provider", mixed_cases.NAMES[1:])
def test_one_row_with_anothers_adapter_is_wrong(provider: str, loaded: mixed_cases.Loaded) -> None:
    exact = mixed_cases.by_row(loaded.exact(QUICK, lora=True))
    plain = mixed_cases.by_row(loaded.runner(QUICK, "peft")(0))
    out = mixed_cases.by_row(loaded.runner(QUICK, provider)(0))
    assert measure.error_over_budget(out, plain, exact, norm=2)[1] <= 1
    model = loaded.models["peft_fast"]
    with torch.no_grad():
        others = model(mixed_cases.token_ids(QUICK), adapter_names=[*QUICK.names[1:], QUICK.names[0]]).logits
    for row in range(QUICK.rows - 1):
        wrong = [*out[:row], others[row], *out[row + 1 :]]
        assert measure.error_over_budget(wrong, plain, exact, norm=2)[1] > 1


def test_the_rows_of_a_mixed_case_and_what_is_loaded() -> None:
    assert cases.MixedCase(4, 1, 2, 9).names == ["a0", "a1", "a0", "a1"]
    assert cases.MixedCase(4, 1, 2, 9, together=True).names == ["a0", "a0", "a1", "a1"]
    for quick in (True, False):
        found = list(cases.cpu_mixed(quick))
        assert len(set(map(str, found))) == len(found)
        for kind in {(case.dtype, case.adapters) for case in found}:
            counts = [case.loaded for case in found if (case.dtype, case.adapters) == kind]
            assert counts == sorted(counts), "adapters are only added: else models are made anew"


def test_a_copied_adapter_of_peft_is_as_an_added_one(tmp_path: Path) -> None:
    managed = manage_cases.Managed(tmp_path, small=True)
    assert managed.wrong("peft") == managed.wrong("peft_fast") == {}
    added, copied = managed.models["peft"], copy.deepcopy(managed.models["peft"])
    added.add_adapter("a1", managed.configs["peft"])
    manage_cases.copy_adapter(copied, "a0", "a1")

    def seen(model: Any) -> Any:
        modules = [(name, type(module)) for name, module in model.named_modules()]
        weights = [(name, w.shape, w.dtype, w.requires_grad) for name, w in model.named_parameters()]
        dicts = [
            {key: dict(value) for key, value in vars(layer).items() if isinstance(value, dict) and key[0] != "_"}
            for _, layer in mixed_cases.lora_sites(model)
        ]
        return modules, weights, dicts, set(model.peft_config), model.active_adapters

    assert seen(added) == seen(copied)
    managed.bring(cases.ManageCase(4, 1))
    assert all(set(model.peft_config) == {"a0", "a1", "a2"} for model in managed.models.values())
    assert set(managed.round("peft_fast")) == set(manage_cases.OPERATIONS)


def a_mixed_result(ratio: float) -> dict[str, Any]:
    """A result file of ``--suite mixed``, with peft at 6 times the base and peft_fast at ``ratio``, made up."""
    benchmarks = []

    def add(provider: str, over: float, **info: Any) -> None:
        info |= {"provider": provider, "error": 0.01}
        if provider != "base" and info["group"] != "manage":
            info["ratio_to_base"] = {"median": over, "low": over, "high": over}
        if provider.startswith("peft_fast"):
            info["ratio_to_peft"] = {"median": over / 6.0, "low": 0.1, "high": 0.9}
        benchmarks.append({"extra_info": info, "stats": {"median": 0.01 * over}})

    for case in cases.cpu_mixed(quick=False):
        for provider, over in (("base", 1.0), ("peft", 6.0), ("peft_fast", ratio), ("peft_fast ids", ratio)):
            add(provider, over, group=case.group, case=str(case), loaded=case.loaded)
    for manage in cases.cpu_manage(quick=False):
        for operation in manage_cases.OPERATIONS:
            for provider, over in (("peft", 6.0), ("peft_fast", ratio)):
                name = f"{operation}-{manage}"
                add(provider, over, group="manage", case=name, operation=operation, nth=manage.nth)
    about = {**a_result()["peft_fast"], "suite": "mixed"}
    return {"benchmarks": benchmarks, "wrong": [], "peft_fast": about}


def test_the_report_says_which_targets_are_met(tmp_path: Path) -> None:
    printed = report.side_by_side(a_mixed_result(1.5))
    assert "met     mixed-32x1-32of32-fp32: 1.50 times the base, aim 2.0" in printed
    assert "MISSED  mixed-32x1-1of32-fp32: 1.50 times the base, aim 1.4" in printed
    assert "met     mixed-32x1-32of32-fp32: 4.00 times as fast as peft, must 3.0" in printed
    assert "MISSED  mixed-8x1-1of100-fp32: 4.00 times as fast as peft, must 6.0" in printed
    assert "peft_fast: from 4 to 100 loaded adapters, time over the base grows 1.00 times" in printed
    table = "\n".join(report_mixed.lines(a_mixed_result(1.5)))
    assert "| 8 rows, 1 of 100 adapters, fp32 | 10.0 ms | 6.00x | 1.50x | 0.25 |" in table
    assert "| load_adapter, peft / peft_fast | 60 / 15 ms (4x) |" in table
    headline = "\n".join(report_pages.headlines({**report.committed_results(), "mixed": a_mixed_result(1.5)}))
    assert "| mixed batch: set_adapter as adapter number 100, 224 layers | - | 60 ms | 15 ms | 0.25 |" in headline
    assert set(report_mixed.CASES) == {str(case) for case in cases.cpu_mixed(quick=False)}
    pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib")
    drawn = report.draw(a_mixed_result(1.5), tmp_path, "cpu-mixed")
    assert [path.name for path in drawn] == ["cpu-mixed-batches.png", "cpu-mixed-manage.png"]
