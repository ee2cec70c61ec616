"""The measurements of prefixes: right results pass, wrong ones are flagged, the report says what was measured."""

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import CPU, ROOT, a_result, committed, run_bench
from torch import Tensor

from bench import (
    cases,
    measure,
    prefix_decode,
    prefix_models,
    prefix_sites,
    report,
    report_pages,
    report_prefix,
    report_rows,
)
from bench.bench_lora import Measured

QUICK = list(cases.cpu_prefix(quick=True))
SITES = [case for case in QUICK if isinstance(case, cases.PrefixSiteCase)]
SITES += [replace(case, prefixes=2) for case in SITES[:3]]
MODELS = [case for case in QUICK if isinstance(case, cases.PrefixModelCase)]
PROMPT = next(case for case in QUICK if isinstance(case, cases.PrefixPromptCase))


@pytest.fixture(scope="module")
def with_one_wrong(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A quick run in which peft_fast's attention reads the prefix's values one slot too far."""
    folder = tmp_path_factory.mktemp("wrong_prefix")
    (folder / "spoil_prefix.py").write_text(
        "from dataclasses import replace\n"
        "from bench import prefix_models, prefix_sites\n"
        "ours = prefix_sites.PROVIDERS['peft_fast']\n"
        "prefix_sites.PROVIDERS['peft_fast'] = lambda case, t: ours(case, replace(t, prefix_v=t.prefix_v.roll(1, 0)))\n"
        "made = prefix_models.PrefixPrompt.made\n"
        "prefix_models.PrefixPrompt.made = lambda self, name: (\n"
        "    made(self, name)[::-1] if name == 'peft_fast' else made(self, name))\n"
        "loss = prefix_models.PrefixModels.loss\n"
        "def spoiled(self, name, model):\n"
        "    output, wanted = loss(self, name, model)\n"
        "    output.loss = output.loss * (1.001 if name == 'peft_fast' else 1)\n"
        "    return output, wanted\n"
        "prefix_models.PrefixModels.loss = spoiled\n"
    )
    out = folder / "out.json"
    ran = run_bench(
        "run", "--suite", "prefix", "--quick", "--only", "fwd-4x24 or prompt or train-4x16", "--out", str(out),
        PYTHONPATH=f"{folder}{os.pathsep}{ROOT}", PYTEST_PLUGINS="spoil_prefix",
    )  # fmt: skip
    return ran, out


def test_wrong_prefixes_are_flagged_and_never_timed(
    with_one_wrong: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
) -> None:
    ran, out = with_one_wrong
    assert ran.returncode != 0, ran.stdout
    result = json.loads(out.read_text())
    groups = {"prefix attention", "prefix prompt", "prefix model"}
    assert {(row["group"], row["provider"]) for row in result["wrong"]} == {(group, "peft_fast") for group in groups}
    timed = {(b["extra_info"]["group"], b["extra_info"]["provider"]) for b in result["benchmarks"]}
    assert {(group, "peft") for group in groups} <= timed
    assert not {(group, "peft_fast") for group in groups} & timed
    assert result["peft_fast"]["suite"] == "prefix"
    reported = run_bench("report", str(out), "--plots", str(tmp_path))
    assert reported.returncode == 1, reported.stderr
    assert re.search(r"peft_fast +WRONG", reported.stdout)


@pytest.mark.parametrize("step", cases.PREFIX_STEPS)
def test_the_gpu_steps_of_prefixes_run_dry(step: str, tmp_path: Path) -> None:
    out = tmp_path / f"{step}.json"
    ran = run_bench("run", "--gpu", step, "--dry", "--out", str(out))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads(out.read_text())
    groups = ("prefix model", "prefix decode") if step == "prefix-model" else ("prefix attention",)
    for group in groups:
        rows = report_rows.rows_of(result, group)
        assert rows and all({"base", "peft_fast"} <= set(row) for row in rows.values())


def test_gpu_sh_knows_every_step(tmp_path: Path) -> None:
    script = ROOT / "bench" / "gpu.sh"
    named = re.search(r'^all="(.*?)"', script.read_text(), re.S | re.M)
    assert named is not None
    steps = named[1].replace("\\", " ").split()
    assert set(steps) - {"prefix-check"} == set(cases.GPU_STEPS)
    assert steps.index("prefix-check") < min(steps.index(step) for step in cases.PREFIX_STEPS)
    called = tmp_path / "python"  # notes what it is called with
    called.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    called.chmod(0o755)
    environment = os.environ | {"PYTHON": str(called), "DRY": "1"}
    subprocess.run([str(script), "all", str(tmp_path)], env=environment, check=True, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "-m pytest tests -q -m gpu" in calls
    for step in cases.GPU_STEPS:
        assert f"-m bench run --gpu {step} --out {tmp_path}/gpu-{step}.json --dry" in calls


def test_every_prefix_step_has_its_cases() -> None:
    for quick in (True, False):
        found = list(cases.cpu_prefix(quick))
        assert len(set(map(str, found))) == len(found)
    for step in cases.PREFIX_STEPS:
        found = list(cases.gpu_prefix(step))
        assert found and len(set(map(str, found))) == len(found)


@pytest.mark.parametrize("case", SITES, ids=str)
def test_attention_agrees_with_fp64_and_a_wrong_one_does_not(case: cases.PrefixSiteCase) -> None:
    site = prefix_sites.make_site(case, CPU, 0)
    plain = prefix_sites.outputs(prefix_sites.PROVIDERS["concatenated"], case, site.copies[0])
    for name in prefix_sites.providers(case, CPU):
        exact = prefix_sites.exact(site, prefix=name != "base")
        out = prefix_sites.outputs(prefix_sites.PROVIDERS[name], case, site.copies[0], name != "base")
        same = out if name == "base" else plain
        assert len(out) == (1 if case.mode != "train" else 4 if name == "base" else 6)
        error, share = measure.error_over_budget(out, same, exact)
        assert 0 < error < 0.03 and share <= 1
        for i in range(len(out)):
            wrong = [*out[:i], out[i] * 1.1, *out[i + 1 :]]
            assert measure.error_over_budget(wrong, same, exact)[1] > 1
    without = prefix_sites.outputs(prefix_sites.PROVIDERS["base"], case, site.copies[0], False)
    assert measure.error_over_budget(without[:1], plain[:1], prefix_sites.exact(site, True)[:1])[1] > 1


@pytest.mark.parametrize("mode, tensors", [("fwd", 0), ("decode", 0), ("train", 5)])
def test_what_is_timed_is_what_was_checked(mode: str, tensors: int) -> None:
    case = cases.PrefixSiteCase(mode, 3, 8, 5, heads=4, kv_heads=2, head_size=16)
    site = prefix_sites.make_site(case, CPU, cache_bytes=2 * int(case.bytes(True)))
    assert len(site.copies) == (5 if mode == "decode" else 1)
    for name in ("peft", "two calls", "peft_fast"):
        run = prefix_sites.runner(name, site)
        found = run(len(site.copies))
        expected = prefix_sites.outputs(prefix_sites.PROVIDERS[name], case, site.copies[0])
        if tensors:
            assert all(torch.equal(a, b) for a, b in zip(found, expected[1:], strict=True))
        else:
            assert torch.equal(found, expected[0])


def test_flops_and_bytes_of_attention_with_a_prefix() -> None:
    case = cases.PrefixSiteCase("fwd", 2, 4, 3, heads=4, kv_heads=2, head_size=8)
    assert case.flops(False) == 2 * 2 * 8 * 2 * 4 * (1 + 2 + 3 + 4)
    assert case.flops(True) - case.flops(False) == 2 * 2 * 8 * 2 * 4 * (4 * 3)
    assert case.bytes(False) == 4 * 8 * (2 * 2 * 4 * 4 + 2 * 2 * 2 * 4)
    assert case.bytes(True) - case.bytes(False) == 4 * 8 * 2 * 2 * 3  # once, not once per row
    decode = replace(case, mode="decode")
    assert decode.flops(True) == 2 * 2 * 8 * 2 * 4 * (4 + 3)


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_models_agree_with_fp64_and_another_prefix_does_not(case: cases.PrefixModelCase) -> None:
    models = prefix_models.PrefixModels(case, CPU, tiny=True)
    for name in prefix_models.NAMES:
        assert measure.error_over_budget(*models.checked(name), norm=2)[1] <= 1
    if case.prefixes == 1:
        with torch.no_grad():
            for weight in models.models["peft_fast"].prompt_encoder.parameters():
                weight[0] += 0.5
    else:  # every row has another one's
        models.models["peft_fast"].prompt_encoder["a0"], models.models["peft_fast"].prompt_encoder["a1"] = (
            models.models["peft_fast"].prompt_encoder[name] for name in ("a1", "a0")
        )
    assert measure.error_over_budget(*models.checked("peft_fast"), norm=2)[1] > 1


def test_steps_after_another_choice_of_a_token_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in MODELS if case.mode == "generate" and case.prefixes == 1)
    models = prefix_models.PrefixModels(case, CPU, tiny=True)
    generated = models.generated

    def one_chose_otherwise(name: str, model: Any) -> tuple[Tensor, Tensor]:
        logits, tokens = generated(name, model)
        if name == "peft_fast":
            tokens[0, 1] += 1
        return logits, tokens

    monkeypatch.setattr(models, "generated", one_chose_otherwise)
    for found in models.checked("peft_fast"):
        assert [len(row) for row in found] == [2, *[case.new] * (case.rows - 1)]


def test_all_prompts_are_those_of_the_formula() -> None:
    prompt = prefix_models.PrefixPrompt(PROMPT, tiny=True)
    exact, plain = prompt.exact(), prompt.outputs("peft")
    for name in prefix_models.PROMPT_NAMES:
        out = prompt.outputs(name)
        assert len(out) == 2 * prompt.layers + 5
        assert measure.error_over_budget(out, plain, exact)[1] <= 1
        wrong = [*out[:-1], out[-1] * 1.1]
        assert measure.error_over_budget(wrong, plain, exact)[1] > 1


def test_a_training_step_needs_less_memory_than_peft() -> None:
    case = cases.PrefixModelCase("train", 8, 16, 64)
    models = prefix_models.PrefixModels(case, CPU, tiny=True)
    peak = {}
    for name in ("peft", "peft_fast"):
        step = models.runner(name)
        step(0)
        with measure.PeakMemory(CPU) as memory:
            step(0)
        peak[name] = memory.bytes
    assert peak["peft_fast"] < peak["peft"]
    assert all(w.grad is None for w in models.models["peft_fast"].parameters())


@pytest.mark.parametrize("prefixes", [1, 2])
def test_a_decode_step_with_other_prefixes_is_wrong(prefixes: int) -> None:
    decoder = prefix_decode.PrefixDecoder(CPU, tiny=True)
    case = cases.PrefixDecodeCase(4, 6, prefixes)
    decoder.bring(case)
    exact, plain = (list(t) for t in (decoder.exact(case, True), decoder.runner("peft", case)(0)))
    step = decoder.runner("peft_fast", case)
    assert torch.equal(step(0), step(1)), "a call is the same step again"
    assert measure.error_over_budget(list(step(0)), plain, exact, norm=2)[1] <= 1
    static = prefix_decode.static_step(decoder.models["peft_fast"], 4, {}, torch.bfloat16)
    if prefixes == 1:
        assert measure.error_over_budget(list(static(0)), plain, exact, norm=2)[1] <= 1
    else:
        assert measure.error_over_budget(list(static(0)), plain, exact, norm=2)[1] > 1
    assert measure.error_over_budget(list(decoder.runner("base", case)(0)), plain, exact, norm=2)[1] > 1


def test_the_strongest_rival_is_the_fastest() -> None:
    times = {"base": [0.1] * 3, "peft": [3.0, 2.0, 1.0], "two calls": [1.5, 1.5, 1.5], "peft_fast": [1.2, 1.2, 1.8]}
    measured = Measured(times, {name: {} for name in times})
    measured.add_strongest(("peft", "two calls", "flex"))
    assert measured.info["peft_fast"]["strongest"] == "two calls"
    assert measured.info["peft_fast"]["ratio_to_strongest"]["median"] == 0.8


def test_committed_results_of_prefixes_are_of_a_whole_run_and_right() -> None:
    result = committed("prefix")
    if result is None:
        return
    assert not result["wrong"] and not result["peft_fast"]["quick"] and report_rows.suite_of(result) == "prefix"
    groups = ("prefix attention", "prefix prompt", "prefix model")
    measured = [case for group in groups for case in report_rows.rows_of(result, group)]
    assert set(measured) == set(report_prefix.CASES)


def a_prefix_result(ratio: float) -> dict[str, Any]:
    """A result file of ``--suite prefix``, with peft at twice the base and peft_fast at ``ratio``, made up."""
    benchmarks = []
    for name, case in report_prefix.CASES.items():
        group = {
            cases.PrefixSiteCase: "prefix attention", cases.PrefixPromptCase: "prefix prompt",
        }.get(type(case), "prefix model")  # fmt: skip
        times = {"base": 1.0, "peft": 2.0, "peft_fast": ratio}
        if group == "prefix prompt":
            del times["base"]
        if isinstance(case, cases.PrefixSiteCase):
            times["two calls"] = 1.8
            if case.prefixes > 1:
                times["concatenated"] = times.pop("peft")
        for provider, over in times.items():
            info: dict[str, Any] = {"group": group, "case": name, "provider": provider, "error": 0.01}
            if "train" in name and group == "prefix model":
                info |= {"peak_bytes": 1e8 * over, "peak_bytes_to_base": over}
            if provider != "base" and "base" in times:
                info["ratio_to_base"] = {"median": over, "low": over, "high": over}
            if provider == "peft_fast" and "peft" in times:
                info["ratio_to_peft"] = {"median": over / 2, "low": over / 2, "high": over / 2}
            if provider == "peft_fast" and group == "prefix attention":
                info["strongest"] = "two calls"
                info["ratio_to_strongest"] = {"median": over / 1.8, "low": 0.1, "high": 2.0}
            benchmarks.append({"extra_info": info, "stats": {"median": 0.01 * over}})
    about = {**a_result()["peft_fast"], "suite": "prefix"}
    return {"benchmarks": benchmarks, "wrong": [], "peft_fast": about}


def test_the_report_shows_losses_of_prefixes_too(tmp_path: Path) -> None:
    printed = report.side_by_side(a_prefix_result(2.5))
    assert "MISSED  train-16x64-P128-fp32: 0.80 times as fast as peft, must 1.0" in printed
    assert "fwd-8x128-P20-fp32: 1.39 (0.10..2.00) of the time of two calls" in printed
    assert "met     generate-16x32-P128-fp32: 1.33 times as fast" in report.side_by_side(a_prefix_result(1.5))
    table = "\n".join(report_prefix.lines(a_prefix_result(2.5)))
    assert "| attention forward, 8 x 128 tokens, P = 20, fp32 | 10 ms | 2.00x | 1.80x | 2.50x | 1.39 |" in table
    assert "P = 128, 4 prefixes, fp32 | 10 ms | 2.00x | 1.80x | 2.50x | 1.39 |" in table
    assert "| training step, 16 x 64 tokens, P = 128, fp32 | 10 ms | 2.00x | - | 2.50x | 1.25 |" in table
    assert "growth of memory in the training step, 16 x 64 tokens, P = 512, fp32 | 100 MB | 2.00x | - | 2.50x" in table
    assert "| 20 ms | - | 25 ms | 1.25 |" in table  # a projection: there is none without a prefix
    headline = "\n".join(report_pages.headlines({**report.committed_results(), "prefix": a_prefix_result(2.5)}))
    assert "P = 128, 4 prefixes, fp32 | 10 ms | 2.00x | 2.50x | 1.39 |" in headline
    pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib")
    drawn = report.draw(a_prefix_result(1.5), tmp_path, "cpu-prefix")
    assert [path.name for path in drawn] == ["cpu-prefix-attention.png", "cpu-prefix-model.png"]
