"""The measurements measure: wrong results are flagged, rounds are interleaved, the pages say what was measured."""

import copy
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import measure, run
from bench.__main__ import main as bench_main
from bench.bench_suites import ReplayClock
from bench.cases import kinds as cases, suites
from bench.report import command as report, pages as report_pages, predict as report_predict, rows as report_rows
from bench.session import Session
from bench.subjects import host_layer, lora_models, lora_sites, manage_cases, mixed_cases
from bench.subjects.registry import SUBJECTS
from bench.subjects.subject import Measured, TakesNoPart, measure_case
from peft_fast.cli import bench as bench_command
from peft_fast.cli.main import main as cli_main
from peft_fast.jobs.errors import JobError
from peft_fast.tuning import clock

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CASE = cases.OpCase("o", 48, 40, 8, 4, "train", "bf16", "fp32", 0.1)


def run_bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    # a pytest that takes itself for one of xdist's workers times nothing
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=280)


def dry_session(suite: str) -> Session:
    return Session(suite, None, "cpu", quick=True, dry=True)


# ------------------------------------------------------------------------------------------------------------ a run
@pytest.fixture(scope="module")
def with_one_wrong(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A GPU step tried on the CPU, with a peft_fast whose layer doubles its output."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "spoil.py").write_text(
        "from bench.subjects import lora_sites\n"
        "build = lora_sites.PROVIDERS['peft_fast']\n"
        "def spoiled(*args):\n"
        "    layer = build(*args)\n"
        "    layer.register_forward_hook(lambda module, args, y: y * 2)\n"
        "    return layer\n"
        "lora_sites.PROVIDERS['peft_fast'] = spoiled\n"
    )
    ran = run_bench(
        "run", "--step", "forward-o", "--dry", "--only", "M16-r8 or ceiling", "--out", str(folder / "out"),
        PYTHONPATH=f"{folder}{os.pathsep}{ROOT}", PYTEST_PLUGINS="spoil",
    )  # fmt: skip
    return ran, folder / "out"


def test_a_wrong_result_is_flagged_and_never_timed(
    with_one_wrong: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    ran, out = with_one_wrong
    assert ran.returncode == 1, ran.stdout
    assert "failed, or wrong results: forward-o" in ran.stderr and "peft_fast is wrong: error" in ran.stderr
    assert re.search(r"peft_fast +WRONG", ran.stdout)
    result = json.loads((out / "forward-o.json").read_text())
    assert [row["provider"] for row in result["wrong"]] == ["peft_fast"]
    timed = {b["extra_info"]["provider"] for b in result["benchmarks"] if b["extra_info"]["group"] == "one layer"}
    assert timed == {"base", "plain torch", "peft"}
    assert "wrong" in (out / "results.csv").read_text() and "wrong" in (out / "report.html").read_text().lower()
    assert sorted(path.name for path in out.iterdir()) == [
        "forward-o.json", "forward-o.log", "report.html", "results.csv",
    ]  # fmt: skip


def test_a_row_says_what_it_was_measured_with(with_one_wrong: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    result = json.loads((with_one_wrong[1] / "forward-o.json").read_text())
    about = result["peft_fast"]
    assert about["versions"]["torch"] == torch.__version__ and about["versions"]["bitsandbytes"]
    assert about["commit"] and about["date"] and about["device"] and about["threads"] == 1
    assert about["dry"] and about["step"] == "forward-o" and about["suite"] == "lora"
    assert set(about["ceilings"]) == {"bytes", "bf16", "fp32", "call"}
    info = next(b["extra_info"] for b in result["benchmarks"] if b["extra_info"]["provider"] == "peft")
    assert {"flops", "bytes", "share_of_roofline", "error", "ratio_to_base", "words", "sweeps"} <= set(info)
    assert {b["extra_info"]["case"] for b in result["benchmarks"] if b["extra_info"]["group"] == "ceilings"} == {
        "bytes", "bf16", "fp32",
    }  # fmt: skip


def test_an_interrupted_run_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lora.json").write_text("before")

    def interrupted(command: list[str], **keywords: Any) -> None:
        part = next(Path(word.split("=", 1)[1]) for word in command if word.startswith("--benchmark-json="))
        part.write_text('{"half')
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    assert bench_main(["run", "--suite", "lora", "--out", str(tmp_path)]) == 130
    assert (tmp_path / "lora.json").read_text() == "before" and not list(tmp_path.glob(".*"))
    assert "finished files stay" in capsys.readouterr().err


def test_all_suites_are_measured_even_if_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measured(name: str, args: Any, device: str, out: Path) -> int:
        asked.append(name)
        return int(name == "mixed")

    monkeypatch.setattr(run, "_measure", measured)
    assert bench_main(["run", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert asked == list(suites.SUITES)


def test_a_wrong_path_is_found_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_measure", lambda *args: pytest.fail("measured"))
    assert bench_main(["run", "--out", str(tmp_path), "--compare", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert bench_main(["run", "--show", "--out", str(tmp_path)]) == 2
    assert "no result files" in capsys.readouterr().err
    (tmp_path / "lora.json").write_text("{")
    assert bench_main(["report", str(tmp_path)]) == 2
    assert "is not JSON" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- peft-fast bench
def test_an_installed_package_says_that_it_needs_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_command.peft_fast, "__file__", str(tmp_path / "site-packages/peft_fast/__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert cli_main(["bench", "--quick"]) == 1
    assert "clone of the repository" in capsys.readouterr().err
    monkeypatch.chdir(ROOT / "docs")  # but a clone around us will do
    started = []

    class Process:
        def __init__(self, command: list[str], cwd: Path) -> None:
            started.append((command, cwd))

        def wait(self, timeout: float | None = None) -> int:
            return 7

    monkeypatch.setattr(subprocess, "Popen", Process)
    assert cli_main(["bench", "--suite", "quant", "--out", "there", "--compare", "before"]) == 7
    ((command, cwd),) = started
    assert cwd == ROOT and command[2:6] == ["bench", "run", "--suite", "quant"]
    assert command[-4:] == ["--out", str(ROOT / "docs/there"), "--compare", str(ROOT / "docs/before")]


def test_stopped_by_ctrl_c(tmp_path: Path) -> None:
    """As a terminal does it: the signal goes to all of the group."""
    command = [sys.executable, "-m", "peft_fast", "bench", "--quick", "--suite", "lora", "--out", str(tmp_path)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=inherited,
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "measuring: lora\n"
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and f"stopped in lora; finished files stay in {tmp_path}" in told
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob(".*"))


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench_command.importlib.util.find_spec
    monkeypatch.setattr(
        bench_command.importlib.util, "find_spec", lambda name: None if name == "pytest_benchmark" else found(name)
    )
    with pytest.raises(JobError, match=r"bench needs pytest-benchmark: pip install"):
        bench_command.run(run_arguments())


def run_arguments() -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    bench_command.add_to(parser)
    return parser.parse_args([])


def test_both_commands_have_the_same_suites() -> None:
    assert bench_command.SUITES == (*suites.SUITES, "all")


# -------------------------------------------------------------------------------------------------------------- cases
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_case_has_a_name_of_its_own_words_and_a_subject(suite: str, quick: bool) -> None:
    found = [*suites.cpu_cases(suite, quick), *suites.gpu_cases(suite, quick)]
    for device in (CPU, torch.device("cuda")):
        for case in found:
            providers = SUBJECTS[type(case)].providers(case, device)
            assert "peft_fast" in providers and len(set(providers)) == len(providers)
            assert case.words and str(case.tiny())
    for some in (suites.cpu_cases(suite, quick), suites.gpu_cases(suite, quick)):
        assert len({str(case) for case in some}) == len(some) == len({case.words for case in some})
    assert quick or len(suites.cpu_cases(suite, True)) < len(suites.cpu_cases(suite, False))


def test_a_case_is_measured_once_though_two_suites_could_have_it() -> None:
    names = [str(case) for suite in suites.SUITES for case in suites.cpu_cases(suite, False)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("suite", suites.SUITES)
def test_the_points_of_a_curve_are_measured(suite: str) -> None:
    for sweeps, found in (
        (suites.cpu_sweeps(suite, False), suites.cpu_cases(suite, False)),
        (suites.cpu_sweeps(suite, True), suites.cpu_cases(suite, True)),
        (suites.gpu_sweeps(suite), suites.gpu_cases(suite, False)),
    ):
        names = {str(case) for case in found}
        assert len({sweep.title for sweep in sweeps}) == len(sweeps)
        for sweep in sweeps:
            assert len(sweep.points) >= 3 and {str(case) for case in sweep.points.values()} <= names
    axes = {sweep.axis for s in suites.SUITES for sweep in suites.cpu_sweeps(s, False)}
    assert axes == {"tokens", "rank", "adapters used", "adapters loaded", "prefix length", "batch"}


def test_every_step_has_its_cases() -> None:
    for step, (suite, found) in suites.GPU_STEPS.items():
        assert suite in suites.SUITES and (found or step == "ceilings")
        assert len(set(map(str, found))) == len(found)
    assert {case.M for case in suites.GPU_STEPS["forward-qkv"][1]} >= {1, 16384}


def test_gpu_sh_knows_every_step_and_passes_over_what_is_there(tmp_path: Path) -> None:
    script = (ROOT / "bench" / "gpu.sh").read_text()
    (steps,) = re.findall(r'^steps="([^"]+)"', script, flags=re.M)
    known = steps.replace("\\\n", "").split()
    assert set(known) == {*suites.GPU_STEPS, "check", "tune-configs", "tune-choices"}
    campaign = (ROOT / "docs" / "gpu_campaign.md").read_text()
    assert all(step in campaign or f"-{step.split('-')[1]}" in campaign for step in known)

    def sh(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), **environment}
        return subprocess.run(
            ["bash", "bench/gpu.sh", *words], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    assert sh().returncode == 2 and sh("nothing").returncode == 2
    (tmp_path / "mixed.json").write_text("measured")
    ran = sh("mixed", DRY="1")
    assert ran.returncode == 0 and "passed over" in ran.stdout and (tmp_path / "mixed.json").read_text() == "measured"


@pytest.mark.parametrize(
    ("step", "only"),
    [
        *[("backward", "o-M64"), ("mixed", "mixed-o-M8-4"), ("decode-mixed", "decode"), ("ceilings", "")],
        *[("prefix-decode", "P20"), ("quant-linear", "q-M4"), ("decode-prefix", "decode"), ("train-quant", "int8")],
    ],
)
def test_a_step_of_the_gpu_campaign_runs_dry(step: str, only: str, tmp_path: Path) -> None:
    ran = run_bench("run", "--step", step, "--dry", "--out", str(tmp_path), *(["--only", only] if only else []))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads((tmp_path / f"{step}.json").read_text())
    assert result["peft_fast"]["dry"] and not result["wrong"]
    for group in report_rows.groups_of(result):
        rows = report_rows.rows_of(result, group)
        assert all({"base", "peft_fast"} <= set(row) and {"peft", "concatenated"} & set(row) for row in rows.values())


# ------------------------------------------------------------------------------------------------------ what a case is
class Doubling(nn.Module):
    """Wraps a layer and gives twice its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x) * 2


def test_what_a_case_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    session = dry_session("lora")
    case = suites.cpu_sweeps("lora", True)[0].points[16]
    small = replace(case, K=48, N=40)
    monkeypatch.setattr(Session, "sweeps_of", lambda self, case: {"a curve": ("tokens", 16)})
    result = measure_case(lora_sites.LoraSite(small, session), session)
    assert set(result.samples) == set(result.info) == {"base", "plain torch", "peft", "peft_fast"} and not session.wrong
    info = result.info["peft_fast"]
    assert info["sweeps"] == {"a curve": ("tokens", 16)} and info["words"] == small.words
    assert info["strongest"] in ("plain torch", "peft") and info["ratio_to_strongest"]["median"] > 0
    assert info["flops"] == small.flops(True) and info["bytes"] == small.bytes(True)
    median = sorted(result.samples["peft_fast"])[len(result.samples["peft_fast"]) // 2]
    ceilings = session.ceilings()
    floor = max(small.flops(True) / ceilings["bf16"], small.bytes(True) / ceilings["bytes"])
    assert info["share_of_roofline"] == pytest.approx(floor / median, rel=0.5) and info["tokens_per_second"] > 0


def test_one_that_cannot_run_here_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> nn.Module:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setitem(lora_sites.PROVIDERS, "peft compiled", broken)
    monkeypatch.setitem(lora_sites.PROVIDERS, "plain torch compiled", lora_sites.PROVIDERS["plain torch"])
    session = dry_session("lora")
    result = measure_case(lora_sites.LoraSite(replace(CASE, compiled=True), session), session)
    assert "C++ compiler" in result.absent["peft compiled"] and "peft compiled" not in result.info
    assert "plain torch compiled" in result.samples and not session.wrong
    assert not isinstance(lora_sites.without_compiler("peft", RuntimeError("no compiler")), TakesNoPart)
    assert not isinstance(lora_sites.without_compiler("peft compiled", RuntimeError("shapes")), TakesNoPart)


@pytest.mark.parametrize("provider", ["base", "plain torch", "peft", "peft_fast"])
@pytest.mark.parametrize("mode", ["fwd", "train"])
def test_providers_agree_with_fp64_and_a_wrong_one_does_not(provider: str, mode: str) -> None:
    site = lora_sites.make_site(cases.OpCase("o", 48, 40, 8, 4, mode, "bf16", "fp32", 0.1), CPU, 0)
    exact = lora_sites.exact(site, lora=provider != "base")
    layer = lora_sites.layers(provider, site)[0]
    out = lora_sites.outputs(layer, site)
    plain = out if provider == "base" else lora_sites.outputs(lora_sites.layers("plain torch", site)[0], site)
    error, share = measure.error_over_budget(out, plain, exact)
    assert 0 < error < 0.02 and share <= 1
    for i in range(len(out)):
        wrong = [*out[:i], out[i] * 1.1, *out[i + 1 :]]
        assert measure.error_over_budget(wrong, plain, exact)[1] > 1
    assert measure.error_over_budget([*out[:-1], out[-1] * float("nan")], plain, exact)[1] == float("inf")
    assert measure.error_over_budget(out[:-1], plain, exact)[1] == float("inf")


@pytest.mark.parametrize("mode", ["fwd", "train"])
def test_models_agree_with_fp64_and_another_adapter_does_not(mode: str) -> None:
    session = dry_session("train")
    case = cases.ModelCase(mode, "bf16", 2, 8, dropout=0.1)
    subject = lora_models.LoraModel(case, session)
    for name in lora_models.NAMES:
        error, share = subject.error(name)
        assert 0 < error < 0.1 and share <= 1
    with torch.no_grad():
        lora_models.adapters(subject.models["peft_fast"])[3].mul_(1.5)
    assert subject.error("peft_fast")[1] > 1
    assert subject.models["peft_fast"].training == (mode == "train")
    assert subject.work("peft").flops > subject.work("base").flops > 0


def test_all_providers_of_a_training_case_do_the_same_work() -> None:
    site = lora_sites.make_site(CASE, CPU, 0)
    for provider in ("plain torch", "peft", "peft_fast"):
        gradients = lora_sites.runner(provider, site)(0)
        assert [tuple(g.shape) for g in gradients] == [(8, 48), (4, 48), (40, 4)]
    assert [tuple(g.shape) for g in lora_sites.runner("base", site)(0)] == [(8, 48)]


def test_few_tokens_find_the_weights_outside_the_cache() -> None:
    small = cases.OpCase("o", 64, 64, 1, 4)
    site = lora_sites.make_site(small, CPU, cache_bytes=64 * 64 * 2 * 3)
    assert len(site.copies) == 7
    used = lora_sites.runner("base", site)
    outs = [used(i) for i in range(8)]
    assert torch.equal(outs[0], outs[7]) and not torch.equal(outs[0], outs[1])


def test_rounds_are_interleaved_and_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_SAMPLE_SECONDS", 0.0)
    order: list[str] = []
    functions = {name: lambda i, name=name: order.append(name) for name in "abc"}
    monkeypatch.setattr(clock, "_calls_per_sample", lambda function, device: 1)
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


# -------------------------------------------------------------------------------------------------------------- pages
def a_row(case: str, provider: str, over: float | None, **more: Any) -> dict[str, Any]:
    """A row of a result file: a provider that takes ``over`` times the base's half second."""
    info = {"case": case, "words": f"words of {case}", "group": "model", "provider": provider, "error": 0.01}
    info |= {"error_over_budget": 0.5, "sweeps": {}, "dtype": "bf16", **more}
    if over is not None:
        info["ratio_to_base"] = {"median": over, "low": over, "high": over}
    median = 0.5 * (over or 1)
    return {"extra_info": info, "stats": {"median": median, "q1": median, "q3": median, "rounds": 5}}


def a_result(suite: str = "lora", ratio: float = 1.2, case: str = "a-case") -> dict[str, Any]:
    """A result file as ``python -m bench run`` writes it, with made-up numbers: peft at 1.8 times the base."""
    ours = {"median": ratio / 1.8, "low": ratio / 1.8, "high": ratio / 1.8}
    benchmarks = [
        a_row(case, "base", None, peak_bytes=1e6),
        a_row(case, "peft", 1.8, peak_bytes=3e6, peak_bytes_to_base=3.0),
        a_row(case, "peft_fast", ratio, ratio_to_peft=ours, strongest="peft", ratio_to_strongest=ours, aim=1.3,
              must=2.0, peak_bytes=1.5e6, peak_bytes_to_base=1.5),
    ]  # fmt: skip
    about = {
        "device": "some CPU", "driver": "", "threads": 1, "versions": {"torch": "2.13.0"}, "commit": "abc",
        "date": "2026-01-01", "quick": False, "dry": False, "step": "", "suite": suite, "load_at_start": 0.0,
        "seconds": 10, "ceilings": {"bytes": 1e10, "bf16": 1e11, "fp32": 1e11, "call": 1e-6},
    }  # fmt: skip
    return {"benchmarks": benchmarks, "wrong": [], "peft_fast": about}


def test_the_pages_show_the_committed_results_or_say_that_there_are_none() -> None:
    for page, text in report_pages.pages(*report_pages.committed()).items():
        assert page.read_text() == text, "run `python -m bench report --readme`"


@pytest.mark.parametrize("suite", suites.SUITES)
def test_committed_results_are_of_a_whole_run_and_right(suite: str) -> None:
    result = report_pages.committed()[0].get(suite)
    if result is None:
        return  # then the pages say so, see above
    about = result["peft_fast"]
    assert not result["wrong"] and not about["quick"] and not about["dry"] and about["suite"] == suite
    assert not about["commit"].endswith("+"), "measured with changes that are not committed"
    measured = {info["case"] for info in report_rows.all_rows(result) if info["group"] != "ceilings"}
    assert measured == {str(case) for case in suites.cpu_cases(suite, quick=False)}
    assert set(report_pages.HEADLINES[suite]) <= set(report_pages.entries(result)), "README names another case"


def test_the_headlines_have_the_worst_ratio_of_each_suite() -> None:
    files = {"lora": a_result(ratio=1.2), "mixed": a_result("mixed", 2.7)}
    files["mixed"]["benchmarks"] += a_result("mixed", 1.0, case=report_pages.HEADLINES["mixed"][0])["benchmarks"]
    lines = report_pages.headlines(files, {})
    assert "| lora: words of a-case | 500 ms | 1.80x | 1.80x | 1.20x | 0.67 |" in lines
    assert "| mixed: words of a-case | 500 ms | 1.80x | 1.80x | 2.70x | 1.50 |" in lines
    assert len([line for line in lines if line.startswith("| mixed:")]) == 2
    assert "| train | not measured yet | - | - | - | - |" in lines and "| GPU | not measured yet" in "\n".join(lines)


def test_lines_of_memory_and_of_the_strongest() -> None:
    result = a_result()
    ours = result["benchmarks"][2]["extra_info"]
    result["benchmarks"].insert(0, a_row("a-case", "plain torch compiled", 1.5))
    ours |= {"strongest": "plain torch compiled", "ratio_to_strongest": {"median": 0.8, "low": 0.8, "high": 0.8}}
    found = report_pages.entries(result)
    cells = ("words of a-case", "500 ms", "1.80x", "1.50x plain torch compiled", "1.20x", "0.80")
    assert found["a-case"].cells == cells
    result["benchmarks"] += [a_row("a-case", "peft compiled", 1.5), a_row("a-case", "peft_fast compiled", 0.9)]
    compiled = ("words of a-case, both libraries compiled", "500 ms", "1.50x", "1.50x", "0.90x", "0.60")
    assert report_pages.entries(result)["compiled a-case"].cells == compiled
    assert found["memory a-case"].cells == ("memory of: words of a-case", "1 MB", "3.00x", "3.00x", "1.50x", "0.50")


def test_a_suite_that_was_not_measured() -> None:
    text = report_pages.pages({}, {})
    assert text[report_pages.BENCHMARKS].count("Not measured yet") == len(suites.SUITES) + 4
    gpu = report_pages.pages({}, {"forward-o": a_result()})[report_pages.BENCHMARKS]
    assert "### forward-o" in gpu and "| words of a-case | 500 ms |" in gpu


def test_an_edited_table_is_noticed() -> None:
    files = {"lora": a_result()}
    text = report_pages.pages(files, {})[report_pages.README]
    line = "| lora: words of a-case | 500 ms | 1.80x | 1.80x | 1.20x | 0.67 |"
    table = "\n".join(report_pages.headlines(files, {}))
    assert line in text and report_pages.with_block(text, "headlines", table) == text
    edited = text.replace(line, line.replace("1.20x", "1.02x"))
    assert edited != text and report_pages.with_block(edited, "headlines", table) == text
    with pytest.raises(ValueError, match="bench:headlines"):
        report_pages.with_block(text.replace("<!-- /bench:headlines -->", ""), "headlines", table)


@pytest.mark.parametrize("kind", ["quick", "dry"])
def test_a_quick_run_does_not_get_into_the_pages(kind: str) -> None:
    result = a_result()
    result["peft_fast"][kind] = True
    with pytest.raises(ValueError, match=kind):
        report_pages.pages({"lora": result}, {})


def test_report_fills_in_both_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results" / "cpu").mkdir(parents=True)
    (tmp_path / "results" / "cpu" / "lora.json").write_text(json.dumps(a_result()))
    monkeypatch.setattr(report_pages, "RESULTS", tmp_path / "results")
    for name in ("README", "BENCHMARKS", "PICTURE"):
        page = getattr(report_pages, name)
        (tmp_path / page.name).write_text(page.read_text())
        monkeypatch.setattr(report_pages, name, tmp_path / page.name)
    assert bench_main(["report", str(tmp_path / "results" / "cpu"), "--readme"]) == 0
    for name in ("README.md", "benchmarks.md"):
        assert "words of a-case | 500 ms | 1.80x | 1.80x | 1.20x | 0.67 |" in (tmp_path / name).read_text()


def test_the_report_says_which_targets_were_met() -> None:
    printed = "\n".join(report.side_by_side(a_result()))
    assert "met     words of a-case: 1.20 times the base, aim 1.3" in printed
    assert "MISSED  words of a-case: 1.50 times as fast as peft, must 2.0" in printed
    assert "MISSED  words of a-case: 1.40 times the base" in "\n".join(report.side_by_side(a_result(ratio=1.4)))


def test_a_run_prints_its_own_and_the_page_has_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lora", "mixed"):
        (tmp_path / f"{name}.json").write_text(json.dumps(a_result(name, case=f"case-of-{name}")))
    assert report.report(tmp_path, only=["mixed"]) == 0
    printed = capsys.readouterr().out
    assert "words of case-of-mixed" in printed and "case-of-lora" not in printed
    assert all(f"words of case-of-{name}" in (tmp_path / "report.html").read_text() for name in ("lora", "mixed"))


def test_predictions_stand_beside_measurements() -> None:
    result = a_result()
    base, _, ours = (row["extra_info"] for row in result["benchmarks"])
    base |= {"flops": 1e9, "bytes": 2e9, "roofline_seconds": 0.2, "launches": 1}  # 0.2 s by its bytes at 1e10 a second
    config = lora_models.base_model(64, 2).config.to_dict()
    ours["plan"] = {"config": config, "workload": {"batch": 1, "tokens": 16, "adapters": 1, "rank": 16, "used": 1}}
    first, second = report_predict.predictions({"lora": result})
    assert (first.provider, first.bound) == ("base", "memory")
    assert first.predicted == pytest.approx(0.2 + 1e-6) and first.error == pytest.approx(-0.6, abs=1e-4)
    assert second.provider == "peft_fast" and 0 < second.predicted < second.measured == 0.6
    assert any("-60%" in line for line in report_predict.lines([first, second]))
    result["wrong"] = [{**base, "group": "model"}]
    assert len(report_predict.predictions({"lora": result})) == 2


# ------------------------------------------------------------------------------------------------------ mixed batches
QUICK = cases.MixedCase(4, 1, 3, 3)


@pytest.fixture(scope="module")
def loaded() -> mixed_cases.Loaded:
    made = mixed_cases.Loaded(small=True)
    made.bring(QUICK)
    return made


@pytest.mark.parametrize("provider", ["peft", "peft_fast", "peft_fast ids"])
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


def test_a_batch_with_other_rows_adapters_is_flagged_and_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = mixed_cases.Loaded.runner

    def rotated(self: Any, case: cases.MixedCase, provider: str) -> Any:
        if provider != "peft_fast":
            return runner(self, case, provider)
        names = [*case.names[1:], case.names[0]]
        model, ids = self.models["peft_fast"], mixed_cases.token_ids(case)
        return torch.no_grad()(lambda i: model(ids, adapter_names=names).logits)

    monkeypatch.setattr(mixed_cases.Loaded, "runner", rotated)
    session = dry_session("mixed")
    result = measure_case(mixed_cases.MixedBatch(QUICK, session), session)
    assert [info["provider"] for info in session.wrong] == ["peft_fast"]
    assert set(result.samples) == {"base", "peft", "peft_fast ids"}


def test_the_rows_of_a_mixed_case_and_what_is_loaded() -> None:
    assert cases.MixedCase(4, 1, 2, 9).names == ["a0", "a1", "a0", "a1"]
    assert cases.MixedCase(4, 1, 2, 9, together=True).names == ["a0", "a0", "a1", "a1"]
    for quick in (True, False):
        found = [case for case in suites.cpu_cases("mixed", quick) if isinstance(case, cases.MixedCase)]
        made = sum(
            (a.dtype, a.adapters) != (b.dtype, b.adapters) or b.loaded < a.loaded for a, b in itertools.pairwise(found)
        )
        assert made <= 3, "adapters are only added: else models are made anew"


def test_a_copied_adapter_of_peft_is_as_an_added_one() -> None:
    managed = manage_cases.Managed(small=True)
    assert managed.wrong("peft") == managed.wrong("peft_fast") == {}
    added, copied = managed.models["peft"], copy.deepcopy(managed.models["peft"])
    added.add_adapter("a1", managed.configs["peft"])
    manage_cases.copy_adapter(copied, "a0", "a1")

    def seen(model: Any) -> Any:
        modules = [(name, type(module)) for name, module in model.named_modules()]
        weights = [(name, w.shape, w.dtype, w.requires_grad) for name, w in model.named_parameters()]
        dicts = [
            {key: dict(value) for key, value in vars(layer).items() if isinstance(value, dict) and key[0] != "_"}
            for _, layer in lora_models.lora_sites_of(model)
        ]
        return modules, weights, dicts, set(model.peft_config), model.active_adapters

    assert seen(added) == seen(copied)
    managed.bring(cases.ManageCase("add_adapter", 4, 1))
    assert all(set(model.peft_config) == {"a0", "a1", "a2"} for model in managed.models.values())
    assert set(managed.round("peft_fast")) == set(suites.MANAGEMENT)


def test_management_is_measured_once_for_all_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    session, rounds = dry_session("mixed"), []
    original = manage_cases.Managed.round
    monkeypatch.setattr(
        manage_cases.Managed, "round", lambda self, which: rounds.append(which) or original(self, which)
    )
    for operation in suites.MANAGEMENT:
        result = measure_case(manage_cases.Management(cases.ManageCase(operation, 2, 3), session), session)
        assert {len(times) for times in result.samples.values()} == {3} and "ratio_to_peft" in result.info["peft_fast"]
    assert rounds == ["peft", "peft_fast", "peft_fast", "peft", "peft", "peft_fast"]
    monkeypatch.setattr(manage_cases.Managed, "wrong", lambda self, which: {"set_adapter": "did not"})
    result = measure_case(manage_cases.Management(cases.ManageCase("set_adapter", 3, 2), session), session)
    assert not result.samples and [info["why"] for info in session.wrong] == ["did not", "did not"]


@pytest.mark.parametrize("adapters", ["bf16", "fp32"])
def test_host_time_is_that_of_the_path_a_gpu_takes(adapters, monkeypatch):
    """Plain torch is called directly, by the choice for a GPU, and afterwards all is as it was."""
    from peft_fast.ops import choice, functional

    asked = []
    real = choice._automatic.__wrapped__
    monkeypatch.setattr(choice, "_automatic", lambda *key: asked.append(key) or real(*key))
    monkeypatch.setattr(choice._automatic, "cache_clear", lambda: None, raising=False)
    monkeypatch.setattr(functional, "linear_fwd", lambda *args: pytest.fail("an operator was called"))
    before = functional.choose, functional._on_cpu
    case = cases.HostCase(adapters=adapters)
    session = Session("host", None, "cpu", quick=True, dry=True)
    measured = measure_case(host_layer.HostLayer(case, session), session)
    assert set(measured.samples) == {"base", "plain torch", "peft", "peft_fast"} and not session.wrong
    assert {key[1].type for key in asked} == {"cuda"} and {key[3:7] for key in asked} == {(1, 64, 64, 16)}
    assert measured.info["peft_fast"]["strongest"] == "peft"
    assert (functional.choose, functional._on_cpu) == before
