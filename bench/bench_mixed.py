"""Batches that mix adapters, and the management of adapters, beside peft (``python -m bench run --suite mixed``).

As ``bench_lora``: all providers are checked, then timed in interleaved rounds; a wrong result is never timed.
"""

from pathlib import Path
from typing import Any

import pytest

from . import manage_cases, measure, mixed_cases, mixed_decode, mixed_sites
from .bench_lora import CLOCK, Measured, hand_over
from .cases import ManageCase, MixedCase, MixedDecodeCase, MixedOpCase
from .conftest import Session


@pytest.fixture(scope="module")
def loaded(session: Session) -> mixed_cases.Loaded:
    return mixed_cases.Loaded(small=session.quick)


@pytest.fixture(scope="module")
def measured_mixed(mixed_case: MixedCase, loaded: mixed_cases.Loaded, session: Session) -> Measured:
    loaded.bring(mixed_case)
    result = Measured()
    functions = {name: loaded.runner(mixed_case, name) for name in mixed_cases.providers(mixed_case)}
    out = {name: mixed_cases.by_row(function(0)) for name, function in functions.items()}
    truth = {lora: mixed_cases.by_row(loaded.exact(mixed_case, lora)) for lora in (False, True)}
    for name in list(functions):
        lora = name != "base"
        budget = "peft" if lora else "base"  # peft's arithmetic in this dtype stands for plain torch
        error, share = measure.error_over_budget(out[name], out[budget], truth[lora], norm=2)
        result.info[name] = {
            "case": str(mixed_case), "group": mixed_case.group, "provider": name, "error": error,
            "error_over_budget": share, "loaded": mixed_case.loaded, **loaded.work(mixed_case, lora),
        }  # fmt: skip
        if share > 1:
            session.wrong.append(result.info[name])
            del functions[name]
    few = mixed_case.tokens == 1
    seconds, rounds = (session.mixed_seconds, 11) if few else (2 * session.mixed_seconds, 5)
    result.samples = measure.interleaved(functions, session.device, seconds, min_rounds=rounds)
    result.add_ratios("base")
    loaded.release(mixed_case)
    return result


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", mixed_cases.NAMES)
def test_mixed(mixed_case: MixedCase, provider: str, measured_mixed: Measured, benchmark: Any) -> None:
    hand_over(measured_mixed, provider, benchmark, f"{mixed_case.group} {mixed_case}")


@pytest.fixture(scope="module")
def managed(session: Session, tmp_path_factory: pytest.TempPathFactory) -> manage_cases.Managed:
    folder: Path = tmp_path_factory.mktemp("adapters")
    return manage_cases.Managed(folder, small=session.quick)


@pytest.fixture(scope="module")
def measured_manage(manage_case: ManageCase, managed: manage_cases.Managed, session: Session) -> dict[str, Measured]:
    """By operation; the order of the libraries alternates from round to round."""
    managed.bring(manage_case)
    results = {operation: Measured() for operation in manage_cases.OPERATIONS}
    for name in manage_cases.NAMES:
        wrong = managed.wrong(name)
        for operation, result in results.items():
            info = {"case": f"{operation}-{manage_case}", "group": "manage", "provider": name, "nth": manage_case.nth}
            result.info[name] = {**info, "operation": operation, "error": 0.0}
            if operation in wrong:
                result.info[name] |= {"error": float("inf"), "error_over_budget": float("inf"), "why": wrong[operation]}
                session.wrong.append(result.info[name])
    for done in range(manage_case.rounds):
        for name in manage_cases.NAMES[:: 1 if done % 2 == 0 else -1]:
            for operation, seconds in managed.round(name).items():
                if "why" not in results[operation].info[name]:
                    results[operation].samples.setdefault(name, []).append(seconds)
    for result in results.values():
        result.add_ratios("base")
    return results


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", manage_cases.NAMES)
@pytest.mark.parametrize("operation", manage_cases.OPERATIONS)
def test_manage(
    manage_case: ManageCase, operation: str, provider: str, measured_manage: dict[str, Measured], benchmark: Any
) -> None:
    hand_over(measured_manage[operation], provider, benchmark, f"manage {operation} {manage_case}")


@pytest.fixture(scope="module")
def measured_mixed_op(mixed_op_case: MixedOpCase, session: Session) -> Measured:
    site = mixed_sites.make_site(mixed_op_case, session.device, session.cache_bytes)
    result, functions = Measured(), {}
    plain = mixed_sites.plain(site)
    ceilings = session.ceilings()
    for name in mixed_sites.providers(mixed_op_case, session.device):
        lora = name != "base"
        function = mixed_sites.runner(name, site)
        out = function(0)
        error, share = measure.error_over_budget([out], [plain if lora else out], [mixed_sites.exact(site, lora)])
        flops, moved = mixed_op_case.flops(lora), mixed_op_case.bytes(lora)
        floor = max(flops / ceilings["bf16"], moved / ceilings["bytes"])
        info = {"case": str(mixed_op_case), "group": "mixed site", "provider": name, "flops": flops, "bytes": moved}
        result.info[name] = {**info, "error": error, "error_over_budget": share, "roofline_seconds": floor}
        if share > 1:
            session.wrong.append(result.info[name])
        else:
            functions[name] = function
    replays = 1
    if mixed_op_case.mode == "graph" and session.device.type == "cuda":
        replays = max(4, len(site.copies))
        functions = {name: measure.graphed(function, replays) for name, function in functions.items()}
    samples = measure.interleaved(functions, session.device, session.seconds)
    result.samples = {name: [t / replays for t in times] for name, times in samples.items()}
    for name, times in result.samples.items():
        result.info[name]["share_of_roofline"] = result.info[name]["roofline_seconds"] / sorted(times)[len(times) // 2]
    result.add_ratios("base")
    return result


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", mixed_sites.NAMES)
def test_mixed_op(mixed_op_case: MixedOpCase, provider: str, measured_mixed_op: Measured, benchmark: Any) -> None:
    hand_over(measured_mixed_op, provider, benchmark, f"mixed site {mixed_op_case}")


@pytest.fixture(scope="module")
def decoder(session: Session) -> mixed_decode.Decoder:
    return mixed_decode.Decoder(session.device, tiny=session.dry)


@pytest.fixture(scope="module")
def measured_decode(decode_case: MixedDecodeCase, decoder: mixed_decode.Decoder, session: Session) -> Measured:
    result, functions = Measured(), {}
    decoder.bring(decode_case)
    outputs = {name: decoder.runner(name, decode_case) for name in decoder.providers}
    out = {name: function(0).clone() for name, function in outputs.items()}
    truth = {lora: decoder.exact(decode_case, lora) for lora in (False, True)}
    for name, function in outputs.items():
        lora = not name.startswith("base")
        error, share = measure.error_over_budget(
            list(out[name]), list(out["peft" if lora else "base"]), list(truth[lora]), norm=2
        )
        info = {"case": str(decode_case), "group": "decode", "provider": name, "layers": decoder.layers}
        result.info[name] = {**info, "error": error, "error_over_budget": share}
        if share > 1:
            session.wrong.append(result.info[name])
        else:
            functions[name] = function
    result.samples = measure.interleaved(functions, session.device, 2 * session.seconds, min_rounds=5)
    for name, times in result.samples.items():
        result.info[name]["tokens_per_second"] = round(decode_case.rows / sorted(times)[len(times) // 2], 1)
    result.add_ratios("base")
    decoder.release(decode_case)
    return result


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", mixed_decode.NAMES)
def test_decode(decode_case: MixedDecodeCase, provider: str, measured_decode: Measured, benchmark: Any) -> None:
    hand_over(measured_decode, provider, benchmark, f"decode {decode_case}")
