"""LoRA beside plain torch and peft: single sites and whole models, for pytest-benchmark (``python -m bench run``).

All providers of a case are checked against fp64, then timed in interleaved rounds, once; each test then hands the
samples of its provider to pytest-benchmark, which makes the statistics and the file. A wrong result is never timed.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from . import measure, model_cases, providers
from .cases import ModelCase, OpCase
from .conftest import Session


class ReplayClock:
    """A clock by which the n-th thing timed took the n-th of the samples loaded."""

    def load(self, samples: list[float]) -> None:
        self._times = itertools.accumulate(itertools.chain.from_iterable((0.0, s) for s in samples))

    def __call__(self) -> float:
        return next(self._times)


CLOCK = ReplayClock()


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("what", ["bytes", "bf16", "fp32"])
def test_ceiling(what: str, session: Session, benchmark: Any) -> None:
    """The best of a copy and of square products: what every share of the roofline refers to."""
    rate = session.ceilings()[what]
    benchmark.group, benchmark.name = "ceilings", f"1e9 {what}"
    benchmark.extra_info.update({"group": "ceilings", "provider": "torch", "case": what, "per_second": rate})
    CLOCK.load([1e9 / rate])
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)


@dataclass
class Measured:
    """Everything known about a case: per provider its samples and what the file should say beside them."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    info: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add_ratios(self, base: str) -> None:
        """Per provider: its time over the base's and over peft's in the same round."""
        for name in self.samples:
            for to in (base, "peft"):
                if to in self.samples and to != name:
                    self.info[name][f"ratio_to_{to.replace(' ', '_')}"] = measure.ratio(self.samples, name, to)

    def add_strongest(self, rivals: Sequence[str]) -> None:
        """Of peft_fast: its time over that of the rival with the least median, in the same round."""
        found = [name for name in rivals if name in self.samples]
        if "peft_fast" in self.samples and found:
            best = min(found, key=lambda name: statistics.median(self.samples[name]))
            self.info["peft_fast"] |= {
                "strongest": best, "ratio_to_strongest": measure.ratio(self.samples, "peft_fast", best),
            }  # fmt: skip


@pytest.fixture(scope="module")
def measured_op(op_case: OpCase, session: Session) -> Measured:
    site = providers.make_site(op_case, session.device, session.cache_bytes)
    result, functions = Measured(), {}
    plain = providers.outputs(providers.layers("plain torch", site)[0], site)
    truth = {lora: providers.exact(site, lora) for lora in (False, True)}
    ceilings = session.ceilings()
    for name in session.op_providers:
        lora = name != "base"
        try:
            out = providers.outputs(providers.layers(name, site)[0], site)
        except ValueError as error:
            if name in providers.KERNELS and name.split(":")[1] in str(error):
                continue  # a forced kernel says that it is not for this size
            raise
        error, share = measure.error_over_budget(out, plain if lora else out, truth[lora])
        flops, moved = op_case.flops(lora), op_case.bytes(lora)
        floor = max(flops / ceilings[op_case.dtype], moved / ceilings["bytes"])
        info = {"case": str(op_case), "group": "op", "provider": name, "flops": flops, "bytes": moved}
        result.info[name] = {**info, "error": error, "error_over_budget": share, "roofline_seconds": floor}
        if share > 1:
            session.wrong.append(result.info[name])
            continue
        functions[name] = providers.runner(name, site)
        if session.device.type == "cuda":
            with measure.PeakMemory(session.device) as memory:
                functions[name](0)
            result.info[name]["peak_bytes"] = memory.bytes
    replays = 1
    if op_case.mode == "graph":
        replays = max(4, len(site.copies))
        functions = {name: measure.graphed(function, replays) for name, function in functions.items()}
    samples = measure.interleaved(functions, session.device, session.seconds)
    result.samples = {name: [t / replays for t in times] for name, times in samples.items()}
    for name, times in result.samples.items():
        result.info[name]["share_of_roofline"] = result.info[name]["roofline_seconds"] / sorted(times)[len(times) // 2]
    result.add_ratios("base")
    return result


@pytest.mark.benchmark(timer=CLOCK)
def test_op(op_case: OpCase, provider: str, measured_op: Measured, benchmark: Any) -> None:
    hand_over(measured_op, provider, benchmark, f"op {op_case}")


@pytest.fixture(scope="module")
def measured_model(model_case: ModelCase, session: Session) -> Measured:
    session.ceilings()
    models = model_cases.make_models(model_case, small=session.quick)
    result, functions = Measured(), {}
    out = {name: model_cases.outputs(model_case, name, model) for name, model in models.items()}
    truth = {name: model_cases.exact(model_case, models[name]) for name in ("base", "peft")}
    for name, model in models.items():
        own = "base" if name == "base" else "peft"  # peft in fp64 is the truth, peft in this dtype sets the budget
        error, share = measure.error_over_budget(out[name], out[own], truth[own], norm=2)
        result.info[name] = {
            "case": str(model_case), "group": "model", "provider": name, "error": error, "error_over_budget": share,
            **model_work(model_case, model),
        }  # fmt: skip
        if share > 1:
            session.wrong.append(result.info[name])
            continue
        functions[name] = model_cases.runner(model_case, model)
    if model_case.mode == "train":
        given = {name: model_cases.inputs(model_case, model) for name, model in models.items()}
        losses = {name: lambda m=model, name=name: m(**given[name]).loss for name, model in models.items()}
        add_memory(functions, losses, models, result, session.device)
    result.samples = measure.interleaved(functions, session.device, session.model_seconds, min_rounds=5)
    result.add_ratios("base")
    return result


def model_work(case: ModelCase, model: Any) -> dict[str, float]:
    """Products with weights only; attention's own are a few per cent at these lengths."""
    weights = [w for name, w in model.named_parameters() if "embed" not in name and w.ndim == 2]
    passes = 2 if case.mode == "train" else 1
    flops = sum(2 * w.numel() * (passes + w.requires_grad * (passes - 1)) for w in weights) * case.batch * case.tokens
    return {"flops": flops, "bytes": sum(w.nbytes for w in weights) * passes}


def add_memory(
    steps: dict[str, Callable[[int], Any]],
    losses: Mapping[str, Callable[..., Any]],
    models: dict[str, Any],
    result: Measured,
    device: torch.device,
) -> None:
    """Growth of memory over a step: at its peak, and what autograd keeps between forward and backward."""
    for name, step in steps.items():
        step(0)
        with measure.PeakMemory(device) as memory:
            step(0)
        kept = measure.saved_bytes(losses[name], list(models[name].parameters()))
        result.info[name] |= {"peak_bytes": memory.bytes, "saved_bytes": kept}
    for name in steps:
        for what in ("peak_bytes", "saved_bytes"):
            result.info[name][f"{what}_to_base"] = round(result.info[name][what] / result.info["base"][what], 4)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", model_cases.NAMES)
def test_model(model_case: ModelCase, provider: str, measured_model: Measured, benchmark: Any) -> None:
    hand_over(measured_model, provider, benchmark, f"model {model_case}")


def hand_over(measured: Measured, provider: str, benchmark: Any, group: str) -> None:
    """Give a provider's samples to pytest-benchmark: its clock replays them."""
    if provider not in measured.info:
        pytest.skip(f"{provider} does not take part here")
    if provider not in measured.samples:
        info = measured.info[provider]
        pytest.fail(f"{provider} is wrong, error {info['error']:.2e}, {info['error_over_budget']:.1f} times its budget")
    samples = measured.samples[provider]
    benchmark.group, benchmark.name = group, f"{group} [{provider}]"
    benchmark.extra_info.update(measured.info[provider])
    CLOCK.load(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)
