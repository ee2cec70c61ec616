"""Options of the measurements, the ceilings of the machine, and what every result file says about where it was made."""

import datetime
import importlib.metadata
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from . import cases, measure, providers


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peft_fast measurements")
    group.addoption("--quick", action="store_true", help="few cases, small models, few rounds")
    group.addoption("--gpu-step", choices=cases.GPU_STEPS, help="one step of the GPU campaign instead of the CPU cases")
    group.addoption("--suite", default="lora", help="which one it is: written into the result")
    group.addoption("--dry", action="store_true", help="a GPU step on the CPU with tiny sizes: does the script work?")


class Session:
    """What all measurements of a run share: device, ceilings, and the results found wrong."""

    def __init__(self, config: pytest.Config) -> None:
        self.quick: bool = config.getoption("--quick")
        self.step: str | None = config.getoption("--gpu-step")
        self.dry: bool = config.getoption("--dry")
        self.suite: str = config.getoption("--suite")
        on_gpu = self.step is not None and not self.dry
        if on_gpu and not torch.cuda.is_available():
            raise pytest.UsageError("--gpu-step needs a GPU and torch sees none; --dry tries the script on the CPU")
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.seconds = 0.2 if self.dry else 3.0 if on_gpu else 1.0 if self.quick else 2.5
        self.model_seconds = 5.0 if self.quick else 30.0
        self.mixed_seconds = 0.5 if self.quick else 4.0
        self.prefix_seconds = 0.5 if self.quick or self.dry else 12.0
        self.quant_seconds = 0.5 if self.quick or self.dry else 10.0
        self.wrong: list[dict[str, Any]] = []
        self.started = time.time()
        self.load = os.getloadavg()[0]
        self._ceilings: dict[str, float] | None = None

    @property
    def op_providers(self) -> list[str]:
        """On a GPU also each implementation by force: that is what the table of choices is made from."""
        return [*providers.PROVIDERS, *(providers.KERNELS if self.device.type == "cuda" else ())]

    @property
    def cache_bytes(self) -> int:
        """What a repeated call may find in the cache."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        return 1 << 25

    def ceilings(self) -> dict[str, float]:
        """Measured once, before the first case."""
        if self._ceilings is None:
            self._ceilings = measure.ceilings(self.device, tiny=self.dry)
        return self._ceilings

    def describe(self) -> dict[str, Any]:
        """Where and with what this was measured."""
        versions = {}
        for name in ("torch", "triton", "transformers", "peft", *["bitsandbytes"] * (self.suite == "quant")):
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "not installed"
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else _cpu_name(),
            "driver": _driver() if self.device.type == "cuda" else "",
            "threads": torch.get_num_threads(),
            "ceilings": self.ceilings(),
            "versions": versions,
            "commit": measure.commit(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "quick": self.quick,
            "dry": self.dry,
            "step": self.step or "",
            "suite": self.suite,
            "load_at_start": round(self.load, 2),
        }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.exists() else ""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SESSION] = Session(config)


_SESSION = pytest.StashKey[Session]()


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    return pytestconfig.stash[_SESSION]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases are data: the options say which."""
    session = metafunc.config.stash[_SESSION]
    if "op_case" in metafunc.fixturenames:
        ops = list(cases.gpu_ops(session.step) if session.step else cases.cpu_ops(session.quick))
        if session.dry:
            ops = sorted(set(map(_tiny, ops)), key=str)
        metafunc.parametrize("op_case", ops, ids=str, scope="module")
        metafunc.parametrize("provider", session.op_providers)
    if "model_case" in metafunc.fixturenames:
        found_models = [] if session.step else list(cases.cpu_models(session.quick))
        metafunc.parametrize("model_case", found_models, ids=str, scope="module")
    for name, found in (_mixed(session) | _prefix(session) | _quant(session)).items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, found, ids=str, scope="module")


def _mixed(session: Session) -> dict[str, list[Any]]:
    """By fixture: the cases of bench_mixed."""
    step = session.step
    found: dict[str, list[Any]] = {
        "mixed_case": [] if step else list(cases.cpu_mixed(session.quick)),
        "manage_case": [] if step else list(cases.cpu_manage(session.quick)),
        "mixed_op_case": [c for c in cases.gpu_mixed(step or "") if isinstance(c, cases.MixedOpCase)],
        "decode_case": [c for c in cases.gpu_mixed(step or "") if isinstance(c, cases.MixedDecodeCase)],
    }
    if session.dry:
        found["mixed_op_case"] = sorted(
            {replace(c, K=c.K // 64, N=c.N // 64, adapters=min(c.adapters, 8)) for c in found["mixed_op_case"]}, key=str
        )
        found["decode_case"] = [
            replace(c, rows=min(c.rows, 8), distinct=min(c.distinct, 4), loaded=6) for c in found["decode_case"][:2]
        ]
    return found


def _prefix(session: Session) -> dict[str, list[Any]]:
    """By fixture: the cases of bench_prefix."""
    found = list(cases.gpu_prefix(session.step) if session.step else cases.cpu_prefix(session.quick))
    if session.dry:
        tiny = dict(rows=8, prefix=20)
        site = tiny | dict(tokens=24, heads=4, kv_heads=2, head_size=16)
        sizes: dict[type, Any] = {cases.PrefixSiteCase: site, cases.PrefixModelCase: tiny | dict(tokens=16)}
        found = list(dict.fromkeys(replace(c, **sizes.get(type(c), tiny)) for c in found))
    kinds = {
        "prefix_site_case": cases.PrefixSiteCase,
        "prefix_prompt_case": cases.PrefixPromptCase,
        "prefix_model_case": cases.PrefixModelCase,
        "prefix_decode_case": cases.PrefixDecodeCase,
    }
    return {name: [c for c in found if isinstance(c, kind)] for name, kind in kinds.items()}


def _quant(session: Session) -> dict[str, list[Any]]:
    """By fixture: the cases of bench_quant."""
    found = list(cases.gpu_quant(session.step) if session.step else cases.cpu_quant(session.quick))
    if session.dry:
        found = list(dict.fromkeys(map(_tiny_quant, found)))
    kinds = {
        "quant_weight_case": cases.QuantWeightCase,
        "quant_site_case": cases.QuantSiteCase,
        "quant_model_case": cases.QuantModelCase,
    }
    return {name: [c for c in found if isinstance(c, kind)] for name, kind in kinds.items()}


def _tiny_quant(case: cases.QuantCase) -> cases.QuantCase:
    if isinstance(case, cases.QuantModelCase):
        return replace(case, rows=min(case.rows, 2), tokens=min(case.tokens, 16))
    sizes: dict[str, Any] = dict(K=max(64, case.K // 32), N=max(32, case.N // 32))  # whole blocks
    if isinstance(case, cases.QuantSiteCase):
        sizes |= dict(M=min(case.M, 64), mode=case.mode.replace("graph", "fwd"))
    return replace(case, **sizes)


def _tiny(case: cases.OpCase) -> cases.OpCase:
    K, N, M = case.K // 64, case.N // 64, min(case.M, 64)
    mode = "fwd" if case.mode == "graph" else case.mode
    return cases.OpCase(case.site, K, N, M, min(case.R, 16), mode, case.dtype, case.adapters, case.dropout)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Add what pytest-benchmark cannot know: ceilings, versions, commit, results that were wrong and so not timed."""
    session = config.stash[_SESSION]
    output_json["peft_fast"] = {**session.describe(), "seconds": round(time.time() - session.started)}
    output_json["wrong"] = session.wrong
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # the ratios per round are in extra_info
    json.dumps(output_json["peft_fast"])
