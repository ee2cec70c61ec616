"""The measurements of prefixes: right results are timed, wrong ones are flagged; what is compared is what is timed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_bench import CPU, dry_session

from bench import measure
from bench.cases import kinds as cases, suites
from bench.subjects import prefix_decode, prefix_models, prefix_sites
from bench.subjects.generate_models import Generated
from bench.subjects.subject import Measured, measure_case

QUICK = [case for suite in ("prefix", "train", "generate") for case in suites.cpu_cases(suite, quick=True)]
SITES = [replace(case, prefixes=n) for case in QUICK if isinstance(case, cases.PrefixSiteCase)
         for n in {case.prefixes, 2} if case.prefix == 20]  # fmt: skip
MODELS = [case for case in QUICK if isinstance(case, cases.PrefixModelCase)]
PROMPT = next(case for case in QUICK if isinstance(case, cases.PrefixPromptCase))
SESSION = dry_session("prefix")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def test_wrong_prefixes_are_flagged_and_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention reads values one slot too far, keys and values change places, a loss is a thousandth too large."""
    ours, made = prefix_sites.PROVIDERS["peft_fast"], prefix_models.Prompt.made
    called = prefix_models.PrefixModel.called

    def spoiled(self: Any, name: str, model: Any) -> Any:
        output, wanted = called(self, name, model)
        output.loss = output.loss * (1.001 if name == "peft_fast" else 1)
        return output, wanted

    monkeypatch.setitem(
        prefix_sites.PROVIDERS, "peft_fast", lambda case, t: ours(case, replace(t, prefix_v=t.prefix_v.roll(1, 0)))
    )
    monkeypatch.setattr(
        prefix_models.Prompt, "made", lambda self, name: made(self, name)[:: -1 if name == "peft_fast" else 1]
    )
    monkeypatch.setattr(prefix_models.PrefixModel, "called", spoiled)
    session = dry_session("prefix")
    found = [
        measure_case(prefix_sites.PrefixAttention(SITES[0], session), session),
        measure_case(prefix_models.Prompt(PROMPT, session), session),
        measure_case(prefix_models.PrefixModel(MODELS[0], session), session),
    ]
    assert [(row["group"], row["provider"]) for row in session.wrong] == [
        (group, "peft_fast") for group in ("attention", "prompt", "training step")
    ]
    for measured in found:
        assert "peft_fast" in measured.info and "peft_fast" not in measured.samples and "peft" in measured.samples


def test_what_the_cases_of_prefixes_tell() -> None:
    session = dry_session("prefix")
    site = measure_case(prefix_sites.PrefixAttention(SITES[0], session), session)
    assert set(site.samples) == {"base", "peft", "two calls", "peft_fast"} and not site.absent
    info = site.info["peft_fast"]
    assert info["strongest"] in ("peft", "two calls") and "ratio_to_peft" in info and 0 < info["share_of_roofline"]
    assert info["flops"] == SITES[0].flops(True) and site.info["base"]["bytes"] == SITES[0].bytes(False)
    prompt = measure_case(prefix_models.Prompt(PROMPT, session), session)
    assert "ratio_to_peft" in prompt.info["peft_fast"] and "ratio_to_base" not in prompt.info["peft_fast"]
    train, generate = (
        measure_case(prefix_models.PrefixModel(next(c for c in MODELS if c.mode == mode), session), session)
        for mode in ("train", "generate")
    )
    info = train.info["peft_fast"]
    assert info["group"] == "training step" and info["peak_bytes_to_base"] > 0 and info["saved_bytes_to_base"] > 0
    assert info["must"] == 1.0 and info["size"] == "small" and info["flops"] > 0
    info = generate.info["peft_fast"]
    assert info["group"] == "generation" and info["strongest"] == "peft" and "peak_bytes" not in info
    assert info["tokens_per_second"] > 0 and "flops" not in info
    case = cases.PrefixDecodeCase(4, 6)
    step = measure_case(prefix_decode.PrefixStep(case, session), session)
    assert set(step.samples) == {"base", "peft", "peft_fast"} and step.info["peft"]["group"] == "decode step"
    assert not session.wrong


@pytest.mark.parametrize("case", SITES, ids=str)
def test_attention_agrees_with_fp64_and_a_wrong_one_does_not(case: cases.PrefixSiteCase) -> None:
    site = prefix_sites.make_site(case, CPU, 0)
    plain = prefix_sites.outputs(prefix_sites.PROVIDERS["concatenated"], case, site.copies[0])
    for name in prefix_sites.PrefixAttention.providers(case, CPU):
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


def share(subject: Any, name: str, change: Any = None) -> float:
    """Of the error budget, when one of the tensors compared is changed."""
    out, same, exact = subject.compared(name)
    return measure.error_over_budget(change(out) if change else out, same, exact, subject.norm)[1]


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_models_agree_with_fp64_and_another_prefix_does_not(case: cases.PrefixModelCase) -> None:
    subject = prefix_models.PrefixModel(case, SESSION)
    for name in subject.providers(case, CPU):
        assert subject.error(name)[1] <= 1
    encoders = subject.models["peft_fast"].prompt_encoder
    if case.prefixes == 1:
        with torch.no_grad():
            for weight in encoders.parameters():
                weight[0] += 0.5
    else:  # every row has another one's
        encoders["a0"], encoders["a1"] = encoders["a1"], encoders["a0"]
    assert subject.error("peft_fast")[1] > 1
    subject.checked()
    assert not subject._known


def test_steps_after_another_choice_of_a_token_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in MODELS if case.mode == "generate" and case.prefixes == 1)
    subject = prefix_models.PrefixModel(case, SESSION)
    made = subject.generated

    def one_chose_otherwise(name: str, model: Any) -> Generated:
        found = made(name, model)
        if name == "peft_fast":
            found.tokens[0, 1] += 1
        return found

    monkeypatch.setattr(subject, "generated", one_chose_otherwise)
    for found in subject.compared("peft_fast"):
        assert [len(row) for row in found] == [2, *[case.new] * (case.rows - 1)]


@pytest.mark.parametrize("mode", ["fwd", "train"])
def test_all_prompts_are_those_of_the_formula(mode: str) -> None:
    case = replace(PROMPT, mode=mode)
    subject = prefix_models.Prompt(case, SESSION)
    for name in subject.providers(case, CPU):
        assert len(subject.outputs(name)) == 2 * subject.layers + 5 * (mode == "train")
        assert share(subject, name) <= 1

        def wrong(out: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [*out[:-1], out[-1] * 1.1]

        assert share(subject, name, wrong) > 1


def test_a_training_step_needs_less_memory_than_peft() -> None:
    session = dry_session("train")
    subject = prefix_models.PrefixModel(cases.PrefixModelCase("train", 8, 16, 64), session)
    info = measure_case(subject, session).info
    for what in ("peak_bytes", "saved_bytes"):
        assert info["peft_fast"][what] < info["peft"][what]
    assert all(w.grad is None for w in subject.models["peft_fast"].parameters())


@pytest.mark.parametrize("prefixes", [1, 2])
def test_a_decode_step_with_other_prefixes_is_wrong(prefixes: int) -> None:
    case = cases.PrefixDecodeCase(4, 6, prefixes)
    subject = prefix_decode.PrefixStep(case, SESSION)
    step = subject.runner("peft_fast")
    assert torch.equal(step(0), step(1)), "a call is the same step again"
    assert all(subject.error(name)[1] <= 1 for name in subject.providers(case, CPU))
    assert {name: subject.capturable(name) for name in subject.steps} == {
        "base": 1, "peft": 0, "peft_fast": int(prefixes == 1)
    }  # fmt: skip
    plain, exact = (list(subject.runner("peft")(0)), list(subject.decoder.exact(case, True)))
    static = list(subject.captured_runner("peft_fast")(0))
    assert (measure.error_over_budget(static, plain, exact, norm=2)[1] <= 1) == (prefixes == 1)
    assert measure.error_over_budget(list(subject.runner("base")(0)), plain, exact, norm=2)[1] > 1


def test_a_wrong_step_on_a_static_cache_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = prefix_decode.PrefixStep(cases.PrefixDecodeCase(4, 6), SESSION)
    static = subject.captured_runner("peft_fast")
    monkeypatch.setattr(subject, "captured_runner", lambda name: lambda i: static(i) * 1.2)
    assert subject.error("peft_fast")[1] > 1


def test_the_strongest_rival_is_the_fastest() -> None:
    times = {"base": [0.1] * 3, "peft": [3.0, 2.0, 1.0], "two calls": [1.5, 1.5, 1.5], "peft_fast": [1.2, 1.2, 1.8]}
    measured = Measured(times, {name: {} for name in times})
    measured.add_strongest(("peft", "two calls", "flex"))
    assert measured.info["peft_fast"]["strongest"] == "two calls"
    assert measured.info["peft_fast"]["ratio_to_strongest"]["median"] == 0.8
