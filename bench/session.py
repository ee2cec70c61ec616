"""What all measurements of a run share: device, ceilings, how long to measure, results found wrong, costly models."""

import datetime
import gc
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from . import measure
from .cases import suites
from .subjects.registry import SUBJECTS
from .subjects.subject import Measured, measure_case

T = TypeVar("T")
_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")


class Session:
    """A run of one suite, or of one step of the GPU campaign.

    Raises: pytest.UsageError if there is no GPU and one is asked for.
    """

    def __init__(self, suite: str, step: str | None, device: str, quick: bool, dry: bool) -> None:
        self.suite, self.step, self.quick, self.dry = suite, step, quick, dry
        if device == "cuda" and not torch.cuda.is_available():
            raise pytest.UsageError("this needs a GPU and torch sees none; --dry tries a step's script on the CPU")
        self.device = torch.device("cpu" if dry else device)
        self.wrong: list[dict[str, Any]] = []
        self.started, self.load = time.time(), os.getloadavg()[0]
        self._ceilings: dict[str, float] | None = None
        self._shared: dict[Any, Any] = {}
        self._measured: tuple[str, Measured] | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the GPU's cases are measured (or tried, in a dry run)."""
        return self.step is not None or self.device.type == "cuda"

    @property
    def cases(self) -> list[Any]:
        """What to measure, in this order."""
        if self.step is not None:
            found = suites.GPU_STEPS[self.step][1]
        else:
            found = (suites.gpu_cases if self.on_gpu else suites.cpu_cases)(self.suite, self.quick)
        return list({str(tiny): tiny for tiny in (case.tiny() for case in found)}.values()) if self.dry else list(found)

    def sweeps_of(self, case: Any) -> dict[str, tuple[str, float]]:
        """The curves that a case is a point of: title -> (what grows, how much of it)."""
        sweeps = suites.gpu_sweeps(self.suite) if self.on_gpu else suites.cpu_sweeps(self.suite, self.quick)
        return {s.title: (s.axis, x) for s in sweeps for x, point in s.points.items() if str(point) == str(case)}

    @property
    def cache_bytes(self) -> int:
        """What a repeated call may find in the cache."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        return 1 << 25

    @property
    def tiny_models(self) -> bool:
        return self.quick or self.dry

    def budget(self, seconds: float) -> float:
        """How long to measure a case that wants ``seconds``."""
        return min(seconds, 0.1 if self.dry else 0.4 if self.quick else seconds)

    def ceilings(self) -> dict[str, float]:
        """Measured once, before the first case."""
        if self._ceilings is None:
            self._ceilings = measure.ceilings(self.device, tiny=self.dry)
        return self._ceilings

    def shared(self, key: Any, make: Callable[[], T]) -> T:
        """Something costly that several cases use; made at the first."""
        if key not in self._shared:
            self._shared[key] = make()
        found: T = self._shared[key]
        return found

    def measured(self, case: Any) -> Measured:
        """The case's results: the tests of its providers follow each other, so the last one is kept."""
        if self._measured is None or self._measured[0] != str(case):
            self.ceilings()
            self._measured = None
            result = measure_case(SUBJECTS[type(case)](case, self), self)
            self._measured = str(case), result
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return self._measured[1]

    def describe(self) -> dict[str, Any]:
        """Where and with what this was measured."""
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
            "driver": _driver() if cuda else "",
            "instructions": "" if cuda else instructions(),
            "threads": torch.get_num_threads(),
            "ceilings": self.ceilings(),
            "versions": {name: _version(name) for name in _PACKAGES},
            "commit": measure.commit(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "quick": self.quick,
            "dry": self.dry,
            "step": self.step or "",
            "suite": self.suite,
            "load_at_start": round(self.load, 2),
            "seconds": round(time.time() - self.started),
        }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def instructions() -> str:
    """What the CPU has for 16-bit products, by the names of the kernel's list; "" where there is no list."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split(":", 1)[1].split()}
    found = [name for name in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16") if name in flags]
    return ", ".join(found)


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.exists() else ""
