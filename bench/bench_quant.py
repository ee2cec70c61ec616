"""Quantized bases: bitsandbytes alone, peft and peft_fast on it (``python -m bench run --suite quant``).

As ``bench_lora``: all providers are checked, then timed in interleaved rounds; a wrong result is never timed.
"""

from typing import Any

import pytest

from . import measure, quant_models, quant_sites
from .bench_lora import CLOCK, Measured, add_memory, hand_over
from .cases import QuantModelCase, QuantSiteCase, QuantWeightCase
from .conftest import Session


def right(result: Measured, session: Session, info: dict[str, Any], error: float, share: float) -> bool:
    """Note what is known of a provider before it is timed; False, and noted in the file too, if it is wrong."""
    result.info[info["provider"]] = {**info, "error": error, "error_over_budget": share}
    if share > 1:
        session.wrong.append(result.info[info["provider"]])
    return share <= 1


def add_shares(result: Measured) -> None:
    """Of the roofline, from the least time that each provider's work takes."""
    for name, times in result.samples.items():
        result.info[name]["share_of_roofline"] = result.info[name]["roofline_seconds"] / sorted(times)[len(times) // 2]


@pytest.fixture(scope="module")
def measured_weight(quant_weight_case: QuantWeightCase, session: Session) -> Measured:
    case, result, functions = quant_weight_case, Measured(), {}
    layers = quant_sites.weights(case, session.device, session.cache_bytes)
    exact = quant_sites.exact_weight(layers[0])
    moved = case.bytes()
    floor = moved / session.ceilings()["bytes"]
    forced = quant_sites.WEIGHT_KERNELS if session.device.type == "cuda" else {}
    for name, dequantize in (quant_sites.DEQUANTIZERS | forced).items():
        info = {"case": str(case), "group": "quant weight", "provider": name, "bytes": moved, "roofline_seconds": floor}
        if right(result, session, info, *quant_sites.error_in_bits(dequantize(layers[0]), exact)):
            functions[name] = lambda i, dequantize=dequantize: dequantize(layers[i % len(layers)])
    del exact
    result.samples = measure.interleaved(functions, session.device, session.seconds)
    add_shares(result)
    result.add_ratios("bitsandbytes")
    result.add_strongest(("bitsandbytes", "plain torch"))
    return result


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", [*quant_sites.DEQUANTIZERS, *quant_sites.WEIGHT_KERNELS])
def test_weight(quant_weight_case: QuantWeightCase, provider: str, measured_weight: Measured, benchmark: Any) -> None:
    hand_over(measured_weight, provider, benchmark, f"quant weight {quant_weight_case}")


@pytest.fixture(scope="module")
def measured_site(quant_site_case: QuantSiteCase, session: Session) -> Measured:
    case, result, functions = quant_site_case, Measured(), {}
    site = quant_sites.make_site(case, session.device, session.cache_bytes)
    truth = {lora: quant_sites.exact(site, lora) for lora in (False, True)}
    plain = quant_sites.outputs("peft", site)
    ceilings = session.ceilings()
    for name in quant_sites.providers(case, session.device):
        lora = name != "base"
        try:
            out = quant_sites.outputs(name, site)
        except ValueError as error:
            if name in quant_sites.KERNELS and "implementation" in str(error):
                continue  # a forced kernel says that it is not for this size
            raise
        flops, moved = case.flops(lora), case.bytes(lora)
        floor = max(flops / ceilings[case.dtype], moved / ceilings["bytes"])
        info = {"case": str(case), "group": "quant site", "provider": name, "flops": flops, "bytes": moved}
        found = measure.error_over_budget(out, plain if lora else out, truth[lora])
        if not right(result, session, {**info, "roofline_seconds": floor}, *found):
            continue
        functions[name] = quant_sites.runner(name, site)
        if session.device.type == "cuda":
            functions[name](0)
            with measure.PeakMemory(session.device) as memory:
                functions[name](0)
            result.info[name]["peak_bytes"] = memory.bytes
    replays = 1
    if case.mode == "graph" and session.device.type == "cuda":
        replays = max(4, site.copies)
        functions = {name: measure.graphed(function, replays) for name, function in functions.items()}
    samples = measure.interleaved(functions, session.device, session.seconds)
    result.samples = {name: [t / replays for t in times] for name, times in samples.items()}
    add_shares(result)
    result.add_ratios("base")
    return result


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", [*quant_sites.PROVIDERS, *quant_sites.KERNELS])
def test_site(quant_site_case: QuantSiteCase, provider: str, measured_site: Measured, benchmark: Any) -> None:
    hand_over(measured_site, provider, benchmark, f"quant site {quant_site_case}")


@pytest.fixture(scope="module")
def measured_quant_model(quant_model_case: QuantModelCase, session: Session) -> Measured:
    case, result, functions = quant_model_case, Measured(), {}
    models = quant_models.QuantModels(case, session.device, tiny=session.quick or session.dry)
    for name in quant_models.NAMES:
        info = {"case": str(case), "group": "quant model", "provider": name, "size": case.size}
        if right(result, session, info, *measure.error_over_budget(*models.checked(name), norm=2)):
            functions[name] = models.runner(name)
    models.forget()
    if case.mode == "train":
        losses = {name: lambda name=name: models.loss(name) for name in functions}
        add_memory(functions, losses, models.models, result, session.device)
    result.samples = measure.interleaved(functions, session.device, session.quant_seconds, min_rounds=7)
    result.add_ratios("base")
    return result


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", quant_models.NAMES)
def test_model(quant_model_case: QuantModelCase, provider: str, measured_quant_model: Measured, benchmark: Any) -> None:
    hand_over(measured_quant_model, provider, benchmark, f"quant model {quant_model_case}")
