"""The measurements of quantized bases: right results pass, wrong ones are flagged, the report says what there is."""

import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_bench import CPU, ROOT, a_result, committed, run_bench

from bench import cases, conftest, measure, quant_models, quant_sites, report, report_pages, report_quant, report_rows
from bench.bench_lora import Measured
from bench.bench_quant import right
from bench.providers import DTYPES

QUICK = list(cases.cpu_quant(quick=True))
SITES = [case for case in QUICK if isinstance(case, cases.QuantSiteCase)]
SITES.append(cases.QuantSiteCase("o", 64, 96, 8, "train", dtype="fp32"))
MODELS = [case for case in QUICK if isinstance(case, cases.QuantModelCase)]
MODELS.append(cases.QuantModelCase("train", 2, 8, dropout=0.05, size="8b"))

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


@pytest.fixture(scope="module")
def with_one_wrong(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A quick run in which peft_fast's weights are rounded once more, its layers doubled, its loss a little off."""
    folder = tmp_path_factory.mktemp("wrong_quant")
    (folder / "spoil_quant.py").write_text(
        "from bench import quant_models, quant_sites\n"
        "ours = quant_sites.DEQUANTIZERS['peft_fast']\n"
        "quant_sites.DEQUANTIZERS['peft_fast'] = lambda layer: ours(layer).bfloat16().float()\n"
        "build = quant_sites.PROVIDERS['peft_fast']\n"
        "def spoiled(site, dropout):\n"
        "    layer = build(site, dropout)\n"
        "    layer.register_forward_hook(lambda module, args, y: y * 2)\n"
        "    return layer\n"
        "quant_sites.PROVIDERS['peft_fast'] = spoiled\n"
        "called = quant_models.QuantModels.called\n"
        "def off(self, name, given):\n"
        "    output = called(self, name, given)\n"
        "    output.loss = output.loss * (1.001 if name == 'peft_fast' else 1)\n"
        "    return output\n"
        "quant_models.QuantModels.called = off\n"
    )
    out = folder / "out.json"
    ran = run_bench(
        "run", "--suite", "quant", "--quick", "--only", "dequantize-128x256-fp32 or o-M4-nf4 or train-2x16-int8",
        "--out", str(out), PYTHONPATH=f"{folder}{os.pathsep}{ROOT}", PYTEST_PLUGINS="spoil_quant",
    )  # fmt: skip
    return ran, out


def test_wrong_results_are_flagged_and_never_timed(
    with_one_wrong: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
) -> None:
    ran, out = with_one_wrong
    assert ran.returncode != 0, ran.stdout
    result = json.loads(out.read_text())
    groups = {"quant weight", "quant site", "quant model"}
    assert {(row["group"], row["provider"]) for row in result["wrong"]} == {(group, "peft_fast") for group in groups}
    timed = {(b["extra_info"]["group"], b["extra_info"]["provider"]) for b in result["benchmarks"]}
    assert timed == {
        *(("quant weight", name) for name in ("bitsandbytes", "plain torch")),
        *((group, name) for group in ("quant site", "quant model") for name in ("base", "peft")),
    }
    assert result["peft_fast"]["suite"] == "quant" and result["peft_fast"]["versions"]["bitsandbytes"][0].isdigit()
    rows = report_rows.rows_of(result, "quant model")["train-2x16-int8-fp32"]
    assert rows["peft"]["peak_bytes_to_base"] > 1
    reported = run_bench("report", str(out), "--plots", str(tmp_path))
    assert reported.returncode == 1, reported.stderr
    assert len(re.findall(r"peft_fast +WRONG", reported.stdout)) == 3


def test_every_step_has_its_cases_and_they_have_whole_blocks() -> None:
    for step in (None, *cases.QUANT_STEPS):
        for quick, dry in ((False, False), (False, True), (True, False)):
            session: Any = SimpleNamespace(step=step, quick=quick, dry=dry)
            found = [case for several in conftest._quant(session).values() for case in several]
            assert found and len(set(map(str, found))) == len(found)
            for case in found:
                if not isinstance(case, cases.QuantModelCase):
                    assert case.K % 64 == 0 and case.N % 32 == 0
                assert not (dry and getattr(case, "mode", "") == "graph")


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_dequantize_the_same_bits_and_one_bit_is_noticed(dtype: str) -> None:
    case = cases.QuantWeightCase(64, 128, dtype)
    layers = quant_sites.weights(case, CPU, cache_bytes=2 * int(case.bytes()))
    assert len(layers) == 5 and len({layer.weight.data_ptr() for layer in layers}) == 5
    exact = quant_sites.exact_weight(layers[0])
    assert exact.dtype == DTYPES[dtype]
    for dequantize in quant_sites.DEQUANTIZERS.values():
        for layer in (layers[0], layers[-1]):
            assert quant_sites.error_in_bits(dequantize(layer), exact) == (0.0, 0.0)
    wrong = exact.clone()
    wrong.view({2: torch.int16, 4: torch.int32}[exact.itemsize])[3, 5] ^= 1
    error, share = quant_sites.error_in_bits(wrong, exact)
    assert 0 < error < 0.01 and share == float("inf")
    assert quant_sites.error_in_bits(exact.to(torch.float64), exact)[1] == float("inf")


@pytest.mark.parametrize("case", SITES, ids=str)
def test_layers_agree_with_fp64_and_wrong_ones_do_not(case: cases.QuantSiteCase) -> None:
    site = quant_sites.make_site(case, CPU, 0)
    plain = quant_sites.outputs("peft", site)
    for name in quant_sites.providers(case, CPU):
        exact = quant_sites.exact(site, lora=name != "base")
        out = quant_sites.outputs(name, site)
        same = out if name == "base" else plain
        assert len(out) == (1 if case.mode != "train" else 2 if name == "base" else 4)
        error, share = measure.error_over_budget(out, same, exact)
        assert 0 < error < 0.03 and share <= 1
        for i in range(len(out)):
            wrong = [*out[:i], out[i] * 1.2, *out[i + 1 :]]
            assert measure.error_over_budget(wrong, same, exact)[1] > 1
    for library in ("peft", "peft_fast"):
        kind = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[case.kind]
        layer = quant_sites.PROVIDERS[library](site, 0.0)
        assert (type(layer).__name__, type(layer).__module__) == (kind, f"{library}.tuners.lora.bnb")


def test_what_is_timed_is_what_was_checked() -> None:
    few = cases.QuantSiteCase("o", 128, 64, 3)
    site = quant_sites.make_site(few, CPU, cache_bytes=3 * 64 * 128)
    assert site.copies > 5
    for name in quant_sites.PROVIDERS:
        assert torch.equal(quant_sites.runner(name, site)(site.copies - 1), quant_sites.outputs(name, site)[0])
    site = quant_sites.make_site(cases.QuantSiteCase("o", 128, 64, 3, "train"), CPU, 0)
    for name in quant_sites.PROVIDERS:
        expected = quant_sites.outputs(name, site)[1:]
        assert all(torch.equal(a, b) for a, b in zip(quant_sites.runner(name, site)(0), expected, strict=True))
    dropped = quant_sites.make_site(cases.QuantSiteCase("o", 128, 64, 3, "train", dropout=0.5), CPU, 0)
    assert not torch.equal(quant_sites.runner("peft_fast", dropped)(0)[1], quant_sites.outputs("peft_fast", site)[2])


def test_flops_and_bytes_of_a_quantized_layer() -> None:
    case = cases.QuantSiteCase("o", 256, 128, 10, kind="int8")
    assert case.flops(False) == 2 * 10 * 256 * 128
    assert case.bytes(False) == 2 * (10 * 256 + 10 * 128) + 256 * 128 + 4 * 128
    assert case.bytes(True) - case.bytes(False) == 4 * 16 * (256 + 128)
    layer = quant_sites.quantized("nf4", 128, 256, torch.bfloat16, CPU)
    state = layer.weight.quant_state
    stored = layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert cases.quantized_bytes("nf4", 128, 256) == stored
    assert cases.QuantWeightCase(128, 256, "fp32").bytes() == stored + 4 * 128 * 256


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_models_agree_with_fp64_and_another_adapter_does_not(case: cases.QuantModelCase) -> None:
    models = quant_models.QuantModels(case, CPU, tiny=True)
    for name in quant_models.NAMES:
        out, same, exact = models.checked(name)
        assert len(out) == (1 if case.mode != "train" else 2 if name == "base" else 2 + 2 * 14)
        error, share = measure.error_over_budget(out, same, exact, norm=2)
        assert 0 < error < 0.1 and share <= 1
    models.runner("peft_fast")(0)
    dropped = models.outputs("peft_fast")
    assert torch.equal(dropped[0], out[0]), "the check leaves dropout out, and models as they were"
    with torch.no_grad():
        for weight in quant_models._adapters(models.models["peft_fast"])[::2]:
            weight[0] += 0.1
    out, same, exact = models.checked("peft_fast")
    assert measure.error_over_budget(out, same, exact, norm=2)[1] > 1
    models.forget()
    assert models.truth is None
    if case.mode == "train":
        assert models.loss("peft_fast").requires_grad


def test_a_wrong_one_is_noted_twice() -> None:
    result, session = Measured(), SimpleNamespace(wrong=[])
    info = {"case": "c", "group": "quant site", "provider": "peft_fast"}
    assert right(result, session, info, 0.1, 1.0) and not session.wrong  # type: ignore[arg-type]
    assert not right(result, session, info, 0.1, 1.01)  # type: ignore[arg-type]
    assert session.wrong == [{**info, "error": 0.1, "error_over_budget": 1.01}] == list(result.info.values())


def test_committed_results_of_quantized_bases_are_of_a_whole_run_and_right() -> None:
    result = committed("quant")
    if result is None:
        return
    assert not result["wrong"] and not result["peft_fast"]["quick"] and report_rows.suite_of(result) == "quant"
    groups = ("quant weight", "quant site", "quant model")
    assert {case for group in groups for case in report_rows.rows_of(result, group)} == set(report_quant.CASES)


def a_quant_result(ratio: float) -> dict[str, Any]:
    """A result file of ``--suite quant``, with peft at twice the base and peft_fast at ``ratio``, made up."""
    benchmarks = []
    for name, case in report_quant.CASES.items():
        times = {"base": 1.0, "peft": 2.0, "peft_fast": ratio}
        group = "quant model" if isinstance(case, cases.QuantModelCase) else "quant site"
        if isinstance(case, cases.QuantWeightCase):
            group, times = "quant weight", {"bitsandbytes": 2.0, "plain torch": 8.0, "peft_fast": 2.0}
        for provider, over in times.items():
            info: dict[str, Any] = {"group": group, "case": name, "provider": provider, "error": 0.01}
            if group == "quant model" and "train" in name:
                info |= {"peak_bytes": 1e8 * over, "peak_bytes_to_base": over}
            if provider not in ("base", "bitsandbytes") and "base" in times:
                info["ratio_to_base"] = {"median": over, "low": over, "high": over}
            if provider == "peft_fast" and "peft" in times:
                info["ratio_to_peft"] = {"median": over / 2, "low": over / 2, "high": over / 2}
            if provider == "peft_fast" and group == "quant weight":
                info |= {"strongest": "bitsandbytes", "ratio_to_strongest": {"median": 1.0, "low": 0.9, "high": 1.1}}
            benchmarks.append({"extra_info": info, "stats": {"median": 0.01 * over}})
    about = {**a_result()["peft_fast"], "suite": "quant", "versions": {"torch": "2.13.0", "bitsandbytes": "0.50.2"}}
    return {"benchmarks": benchmarks, "wrong": [], "peft_fast": about}


def test_the_report_shows_what_was_met_and_missed(tmp_path: Path) -> None:
    printed = report.side_by_side(a_quant_result(2.5))
    assert "MISSED  train-8x128-nf4-fp32: 0.80 times as fast as peft, must 1.0" in printed
    assert "dequantize-4096x4096-bf16: 1.00 (0.90..1.10) of the time of bitsandbytes" in printed
    assert printed.count("MISSED") == 3 and "MISSED" not in report.side_by_side(a_quant_result(2.0))
    table = "\n".join(report_quant.lines(a_quant_result(1.5)))
    step = "NF4, 8 x 128 tokens, bf16 autocast, dropout 0.05"
    assert f"| QLoRA step, {step} | 10 ms | 2.00x | - | 1.50x | 0.75 |" in table
    assert f"| growth of memory in the QLoRA step, {step} | 100 MB | 2.00x | - | 1.50x | 0.75 |" in table
    assert "| one token, NF4, bf16 | 10 ms | 2.00x | - | 1.50x | 0.75 |" in table
    assert "| one layer 1024 x 1024, NF4, forward, one token, fp32 | 10 ms | 2.00x | - | 1.50x | 0.75 |" in table
    assert "| dequantizing NF4, 4096 x 4096, to bf16 | - | 20 ms | 80 ms | 20 ms | 1.00 |" in table
    assert table.count("\n| ") == len(report_quant.CASES) + 3  # with those of memory
    pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib")
    drawn = report.draw(a_quant_result(1.5), tmp_path, "cpu-quant")
    assert sorted(path.name for path in drawn) == ["cpu-quant-model.png", "cpu-quant-site.png"]
    for path in drawn:
        assert f"../bench/results/{path.name})" in table


def test_the_headlines_show_the_worst_ratio_once() -> None:
    def lines(ratio: float) -> list[str]:
        found = report_pages.headlines({**dict.fromkeys(report_pages.SUITES), "quant": a_quant_result(ratio)})
        assert found[-1] == "CPU: some CPU, 1 thread, torch 2.13.0, bitsandbytes 0.50.2."
        return [line for line in found if line.startswith("| quantized base: ")]

    better, worse = lines(1.5), lines(2.5)
    assert len(better) == 6 and "dequantizing NF4" in better[-1] and better[-1].endswith("| 1.00 |")
    assert len(worse) == 5, "the worst is among the others"
    assert [line.split(", ")[0].removeprefix("| quantized base: ") for line in worse] == [
        "QLoRA step", "QLoRA step", "training step", "growth of memory in the QLoRA step", "one token",
    ]  # fmt: skip
    both = {**dict.fromkeys(report_pages.SUITES), "lora": a_quant_result(1.5), "quant": a_quant_result(1.5)}
    del both["lora"]["peft_fast"]["versions"]["bitsandbytes"]  # type: ignore[index]
    both["lora"]["benchmarks"] = []  # type: ignore[index]
    assert report_pages.headlines(both)[-1].count("some CPU") == 1
