"""The measurements of quantized bases and of generated text: right results are timed, wrong ones are flagged."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_bench import CPU, dry_session

from bench import measure
from bench.cases import kinds as cases, suites
from bench.subjects import generate_models, quant_models, quant_sites
from bench.subjects.lora_models import adapters
from bench.subjects.lora_sites import DTYPES
from bench.subjects.subject import TakesNoPart, measure_case

QUICK = [case for suite in ("quant", "train") for case in suites.cpu_cases(suite, quick=True)]
SITES = [case for case in QUICK if isinstance(case, cases.QuantSiteCase)]
SITES += [replace(SITES[-1], kind="nf4"), cases.QuantSiteCase("o", 64, 96, 8, "train", dtype="fp32")]
MODELS = [case for case in QUICK if isinstance(case, cases.QuantModelCase)]
MODELS += [
    cases.QuantModelCase("train", 2, 16, "int8", "fp32", must=1.0),
    cases.QuantModelCase("train", 2, 8, dropout=0.05, size="8b"),
]
TEXTS = [
    cases.GenerateCase(3, 6, 1, new=3), cases.GenerateCase(3, 6, 2, "bf16", new=3),
    cases.GenerateCase(2, 6, 1, "bf16", "nf4", new=3),
]  # fmt: skip
SESSION = dry_session("quant")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


@pytest.fixture
def with_one_wrong(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """peft_fast's weights are rounded once more, its layers doubled, its loss a little off."""
    ours, build = quant_sites.DEQUANTIZERS["peft_fast"], quant_sites.PROVIDERS["peft_fast"]
    called = quant_models.QuantModel.called

    def doubled(site: quant_sites.QuantSite, dropout: float) -> torch.nn.Module:
        layer = build(site, dropout)
        layer.register_forward_hook(lambda module, args, y: y * 2)
        return layer

    def off(self: Any, name: str, given: Any) -> Any:
        output = called(self, name, given)
        output.loss = output.loss * (1.001 if name == "peft_fast" else 1)
        return output

    monkeypatch.setitem(quant_sites.DEQUANTIZERS, "peft_fast", lambda layer: ours(layer).bfloat16().float())
    monkeypatch.setitem(quant_sites.PROVIDERS, "peft_fast", doubled)
    monkeypatch.setattr(quant_models.QuantModel, "called", off)
    yield


def test_wrong_results_are_flagged_and_never_timed(with_one_wrong: None) -> None:
    session = dry_session("quant")
    weight = measure_case(quant_sites.Dequantizing(cases.QuantWeightCase(64, 128, "fp32"), session), session)
    layer = measure_case(quant_sites.QuantLayer(SITES[0], session), session)
    model = measure_case(quant_models.QuantModel(MODELS[-2], session), session)
    assert [(row["group"], row["provider"]) for row in session.wrong] == [
        (group, "peft_fast") for group in ("dequantizing", "quantized layer", "training step")
    ]
    assert set(weight.samples) == {"bitsandbytes", "plain torch"}
    assert set(layer.samples) == set(model.samples) == {"base", "peft"}
    assert all("peft_fast" in measured.info for measured in (weight, layer, model))
    assert model.info["peft"]["peak_bytes_to_base"] > 1 and model.info["peft"]["saved_bytes_to_base"] > 1


def test_what_the_cases_of_quantized_bases_tell() -> None:
    session = dry_session("quant")
    weight = measure_case(quant_sites.Dequantizing(cases.QuantWeightCase(64, 128, "fp32"), session), session)
    info = weight.info["peft_fast"]
    assert info["ratio_to_base"]["median"] > 0 and info["strongest"] in ("bitsandbytes", "plain torch")
    assert info["bytes"] == cases.QuantWeightCase(64, 128, "fp32").bytes() and info["flops"] == 0
    layer = measure_case(quant_sites.QuantLayer(SITES[0], session), session)
    info = layer.info["peft_fast"]
    assert info["strongest"] == "peft" and info["flops"] == SITES[0].flops(True) and "peak_bytes" not in info
    model = measure_case(quant_models.QuantModel(MODELS[0], session), session)
    assert model.info["peft_fast"]["group"] == "model" and model.info["peft_fast"]["size"] == "small"
    text = measure_case(generate_models.LoraGeneration(TEXTS[1], session), session)
    info = text.info["peft_fast"]
    assert info["group"] == "generation" and info["strongest"] == "peft" and info["tokens_per_second"] > 0
    assert set(text.samples) == {"base", "peft", "peft_fast"} and not session.wrong


def test_a_kernel_that_is_not_for_this_size_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = quant_sites.QuantLayer(SITES[0], SESSION)
    said = "the implementation kernel is not for this size"

    def build(site: Any, dropout: float) -> torch.nn.Module:
        raise ValueError(said)

    monkeypatch.setitem(quant_sites.KERNELS, "peft_fast:kernel", build)
    with pytest.raises(TakesNoPart, match="not for this size"):
        subject.compared("peft_fast:kernel")
    said = "another mistake"
    with pytest.raises(ValueError, match="another mistake"):
        subject.compared("peft_fast:kernel")


def test_who_takes_part_and_what_is_captured() -> None:
    cuda, layer = torch.device("cuda"), quant_sites.QuantLayer
    assert "peft_fast:kernel" in layer.providers(SITES[0], cuda) and "kernel" in str(
        quant_sites.Dequantizing.providers(cases.QuantWeightCase(64, 128, "fp32"), cuda)
    )
    for case, captured in (
        (SITES[0], True), (replace(SITES[0], kind="int8"), False), (replace(SITES[0], M=65), False),
        (replace(SITES[0], mode="train"), False),
    ):  # fmt: skip
        assert bool(layer(case, SESSION).capturable("peft")) == captured
    assert len(layer.providers(replace(SITES[0], mode="train"), cuda)) == len(layer.providers(SITES[0], CPU)) == 3


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
    for name in quant_sites.QuantLayer.providers(case, CPU):
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
    subject = quant_models.QuantModel(case, SESSION)
    for name in subject.providers(case, CPU):
        found = subject.compared(name)
        assert len(found.out) == (1 if case.mode != "train" else 2 if name == "base" else 2 + 2 * 14)
        error, share = subject.error(name)
        assert 0 < error < 0.1 and share <= 1
    subject.runner("peft_fast")(0)
    assert torch.equal(subject.outputs("peft_fast")[0], found.out[0]), "dropout stays out, and models as they were"
    with torch.no_grad():
        for weight in adapters(subject.models["peft_fast"])[::2]:
            weight[0] += 0.1
    assert subject.error("peft_fast")[1] > 1
    subject.checked()
    assert subject.truth is None and not subject._known
    loss = subject.loss("peft_fast")
    assert (loss is not None and loss[0]().requires_grad) == (case.mode == "train")


@pytest.mark.parametrize("case", TEXTS, ids=str)
def test_generated_text_agrees_with_fp64_and_another_adapter_is_noticed(case: cases.GenerateCase) -> None:
    subject = generate_models.LoraGeneration(case, SESSION)
    for name in subject.providers(case, CPU):
        found = subject.compared(name)
        assert len(found.out) == case.rows and all(1 <= len(row) <= case.new for row in found.exact)
        error, share = subject.error(name)
        assert 0 < error < 0.1 and share <= 1
        tokens = subject.runner(name)(0)
        assert torch.equal(tokens[:, case.tokens :], subject.outputs(name).tokens)
    with torch.no_grad():
        *_, (_, layer) = generate_models.lora_sites_of(subject.models["peft_fast"])
        layer.lora_B[subject.adapters[-1]].weight.mul_(2)
    out, same, exact = subject.compared("peft_fast")
    rows = [measure.error_over_budget([o], [s], [e], norm=2)[1] > 1 for o, s, e in zip(out, same, exact, strict=True)]
    assert rows == [name == subject.adapters[-1] for name in case.names], "only the rows that have this adapter"
    assert measure.error_over_budget(*subject.compared("base"), norm=2)[1] <= 1, "the truth is as it was"


def test_a_row_with_anothers_adapter_is_noticed() -> None:
    subject = generate_models.LoraGeneration(TEXTS[1], SESSION)
    names, subject.named = subject.case.names, lambda name: {"adapter_names": names[1:] + names[:1]}  # type: ignore
    ours = subject.outputs("peft_fast")
    del subject.named
    found = generate_models.up_to_another_choice(ours, subject.outputs("peft"), subject.exact(lora=True))
    assert measure.error_over_budget(*found, norm=2)[1] > 1


def test_the_active_adapter_is_that_of_one_and_names_are_those_of_several() -> None:
    subject = generate_models.LoraGeneration(TEXTS[0], SESSION)
    assert subject.named("peft_fast") == {} and subject.adapters == ["a0"]
    subject.case = TEXTS[1]
    assert subject.named("peft") == {"adapter_names": ["a0", "a1", "a0"]} and subject.named("base") == {}
