"""The measurements measure: wrong results are flagged, rounds are interleaved, README says what was measured."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases, measure, providers, report
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
    rows = report.rows_of(json.loads(out.read_text()), "op")
    assert len(rows) == 2 and all(set(row) == set(providers.PROVIDERS) for row in rows.values())


def test_every_step_has_its_cases() -> None:
    for step in cases.GPU_STEPS[1:]:
        found = list(cases.gpu_ops(step))
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


def committed() -> dict[str, Any] | None:
    path = report.RESULTS / "cpu.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_readme_shows_the_committed_results_or_says_that_there_are_none() -> None:
    text = report.README.read_text()
    assert report.with_table(text, report.readme_table(committed())) == text, "run `python -m bench report --readme`"


def test_committed_results_are_of_a_whole_run_and_right() -> None:
    result = committed()
    if result is None:
        return  # then README says so, see above
    assert not result["wrong"] and not result["peft_fast"]["quick"] and not result["peft_fast"]["dry"]
    rows = report.rows_of(result, "model")
    assert set(rows) == {case.name for case in cases.cpu_models(quick=False)}
    assert set(report.rows_of(result, "op")) == {str(case) for case in cases.cpu_ops(quick=False)}


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
    table = report.readme_table(a_result())
    text = report.with_table(report.README.read_text(), table)
    assert report.with_table(text, table) == text and "1.20x" in text and "1.80x" in text
    edited = text.replace("1.20x", "1.02x")
    assert report.with_table(edited, table) != edited
    with pytest.raises(ValueError, match="bench:cpu"):
        report.with_table(text.replace(report.END, ""), table)


def test_a_quick_run_does_not_get_into_the_readme() -> None:
    result = a_result()
    result["peft_fast"]["quick"] = True
    with pytest.raises(ValueError, match="quick"):
        report.readme_table(result)


def test_the_report_draws_and_prints_losses_beside_wins(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib")
    result = a_result(ratio=2.0)
    assert "worst median ratio 1.111 (train-bf16-dropout)" in report.side_by_side(result)
    drawn = report.draw(result, tmp_path, "cpu")
    assert [path.name for path in drawn] == ["cpu-model.png"] and drawn[0].stat().st_size > 5000
