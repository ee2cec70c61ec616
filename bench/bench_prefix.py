"""Prefixes beside peft and beside what torch's own attention can do (``python -m bench run --suite prefix``).

As ``bench_lora``: all providers are checked, then timed in interleaved rounds; a wrong result is never timed.
"""

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from . import measure, prefix_decode, prefix_models, prefix_sites
from .bench_lora import CLOCK, Measured, add_memory, hand_over
from .cases import PrefixDecodeCase, PrefixModelCase, PrefixPromptCase, PrefixSiteCase
from .conftest import Session


def right(
    result: Measured, session: Session, info: dict[str, Any], tensors: Sequence[Sequence[Tensor]], norm: float
) -> bool:
    """Note what is known of a provider before it is timed; False, and noted in the file too, if it is wrong."""
    out, same, exact = tensors
    error, share = measure.error_over_budget(out, same, exact, norm)
    result.info[info["provider"]] = {**info, "error": error, "error_over_budget": share}
    if share > 1:
        session.wrong.append(result.info[info["provider"]])
    return share <= 1


@pytest.fixture(scope="module")
def measured_site(prefix_site_case: PrefixSiteCase, session: Session) -> Measured:
    case, result, functions = prefix_site_case, Measured(), {}
    site = prefix_sites.make_site(case, session.device, session.cache_bytes)
    plain = prefix_sites.outputs(prefix_sites.PROVIDERS["concatenated"], case, site.copies[0])
    ceilings = session.ceilings()
    for name in prefix_sites.providers(case, session.device):
        prefix = name != "base"
        out = prefix_sites.outputs(prefix_sites.PROVIDERS[name], case, site.copies[0], prefix)
        flops, moved = case.flops(prefix), case.bytes(prefix)
        floor = max(flops / ceilings[case.dtype], moved / ceilings["bytes"])
        info = {"case": str(case), "group": "prefix attention", "provider": name, "flops": flops, "bytes": moved}
        tensors = out, plain if prefix else out, prefix_sites.exact(site, prefix)
        if not right(result, session, {**info, "roofline_seconds": floor}, tensors, float("inf")):
            continue
        functions[name] = prefix_sites.runner(name, site)
        if session.device.type == "cuda":
            with measure.PeakMemory(session.device) as memory:
                functions[name](0)
            result.info[name]["peak_bytes"] = memory.bytes
    replays = 1
    if case.mode == "graph" and session.device.type == "cuda":
        replays = max(4, len(site.copies))
        functions = {name: measure.graphed(function, replays) for name, function in functions.items()}
    samples = measure.interleaved(functions, session.device, session.seconds)
    result.samples = {name: [t / replays for t in times] for name, times in samples.items()}
    for name, times in result.samples.items():
        result.info[name]["share_of_roofline"] = result.info[name]["roofline_seconds"] / sorted(times)[len(times) // 2]
    result.add_ratios("base")
    result.add_strongest(prefix_sites.RIVALS)
    return result


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", prefix_sites.NAMES)
def test_site(prefix_site_case: PrefixSiteCase, provider: str, measured_site: Measured, benchmark: Any) -> None:
    hand_over(measured_site, provider, benchmark, f"prefix attention {prefix_site_case}")


@pytest.fixture(scope="module")
def measured_prompt(prefix_prompt_case: PrefixPromptCase, session: Session) -> Measured:
    result, functions = Measured(), {}
    prompt = prefix_models.PrefixPrompt(prefix_prompt_case, tiny=session.quick)
    plain, exact = prompt.outputs("peft"), prompt.exact()
    for name in prefix_models.PROMPT_NAMES:
        info = {"case": str(prefix_prompt_case), "group": "prefix prompt", "provider": name}
        if right(result, session, info, (prompt.outputs(name), plain, exact), float("inf")):
            functions[name] = prompt.runner(name)
    result.samples = measure.interleaved(functions, session.device, session.seconds)
    result.add_ratios("base")
    return result


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", prefix_models.PROMPT_NAMES)
def test_prompt(prefix_prompt_case: PrefixPromptCase, provider: str, measured_prompt: Measured, benchmark: Any) -> None:
    hand_over(measured_prompt, provider, benchmark, f"prefix prompt {prefix_prompt_case}")


@pytest.fixture(scope="module")
def measured_prefix_model(prefix_model_case: PrefixModelCase, session: Session) -> Measured:
    case, result, functions = prefix_model_case, Measured(), {}
    models = prefix_models.PrefixModels(case, session.device, tiny=session.quick or session.dry)
    for name in prefix_models.NAMES:
        info = {"case": str(case), "group": "prefix model", "provider": name, "size": case.size}
        if right(result, session, info, models.checked(name), 2):
            functions[name] = models.runner(name)
    if case.mode == "train":
        losses = {name: lambda name=name: models.loss(name, models.models[name])[0].loss for name in functions}
        add_memory(functions, losses, models.models, result, session.device)
    result.samples = measure.interleaved(functions, session.device, session.prefix_seconds, min_rounds=7)
    result.add_ratios("base")
    return result


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", prefix_models.NAMES)
def test_model(
    prefix_model_case: PrefixModelCase, provider: str, measured_prefix_model: Measured, benchmark: Any
) -> None:
    hand_over(measured_prefix_model, provider, benchmark, f"prefix model {prefix_model_case}")


@pytest.fixture(scope="module")
def prefix_decoder(session: Session) -> prefix_decode.PrefixDecoder:
    return prefix_decode.PrefixDecoder(session.device, tiny=session.dry)


@pytest.fixture(scope="module")
def measured_prefix_decode(
    prefix_decode_case: PrefixDecodeCase, prefix_decoder: prefix_decode.PrefixDecoder, session: Session
) -> Measured:
    case, result, functions = prefix_decode_case, Measured(), {}
    prefix_decoder.bring(case)
    steps = {name: prefix_decoder.runner(name, case) for name in prefix_decoder.providers(case)}
    out = {name: list(step(0).clone()) for name, step in steps.items()}
    truth = {prefix: list(prefix_decoder.exact(case, prefix)) for prefix in (False, True)}
    for name, step in steps.items():
        prefix = not name.startswith("base")
        info = {"case": str(case), "group": "prefix decode", "provider": name, "layers": prefix_decoder.layers}
        if right(result, session, info, (out[name], out["peft" if prefix else "base"], truth[prefix]), 2):
            functions[name] = step
    result.samples = measure.interleaved(functions, session.device, 2 * session.seconds, min_rounds=5)
    for name, times in result.samples.items():
        result.info[name]["tokens_per_second"] = round(case.rows / sorted(times)[len(times) // 2], 1)
    result.add_ratios("base")
    return result


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", prefix_decode.NAMES)
def test_prefix_decode(
    prefix_decode_case: PrefixDecodeCase, provider: str, measured_prefix_decode: Measured, benchmark: Any
) -> None:
    hand_over(measured_prefix_decode, provider, benchmark, f"prefix decode {prefix_decode_case}")
