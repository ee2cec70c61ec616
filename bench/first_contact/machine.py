"""What the machine is and gives: versions, bandwidth, the host's time of a call; and the tests of the kernels on it."""

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from .. import measure
from ..cases.kinds import OpCase
from ..subjects import lora_sites
from .here import Here, Row, in_short, in_us

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "pytest", "pytest-xdist")


def machine_rows(here: Here) -> Iterator[Row]:
    """What it is, as "about"."""
    about: dict[str, Any] = {
        "device": platform.machine(), "arch": "none", "rehearsal": here.rehearse, "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES}, "cores": os.cpu_count(),
    }  # fmt: skip
    if here.on_gpu:
        from csrc_triton.common.tuning import arch_of

        chip: Any = torch.cuda.get_device_properties(here.device)
        about |= {"device": chip.name, "arch": arch_of(here.device), "memory": chip.total_memory}
        about |= {"l2_bytes": chip.L2_cache_size, "processors": chip.multi_processor_count}
        driver = Path("/proc/driver/nvidia/version")
        about["driver"] = driver.read_text().splitlines()[0] if driver.exists() else ""
    yield {"about": about}
    yield {"op": "machine", "impl": about["device"]}


def commit() -> str:
    """The checkout's commit; of a tree without git what the variable COMMIT says."""
    return os.environ.get("COMMIT") or measure.commit()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def ceiling_rows(here: Here) -> Iterator[Row]:
    """Copy and products as ``measure.ceilings``; reading from L2."""
    found = measure.ceilings(here.device, tiny=here.rehearse)
    source = torch.randn(1 << (12 if here.rehearse else 23), device=here.device)  # 32 MB: in the cache with its copy
    target = torch.empty_like(source)
    found["l2_bytes"] = 2 * source.nbytes / measure._best(lambda i: target.copy_(source), here.device)
    yield {"about": {"ceilings": found}}
    yield {"op": "ceilings", "impl": "torch", "gbps": found["bytes"] / 1e9, "tflops": found["bf16"] / 1e12}


def host_rows(here: Here) -> Iterator[Row]:
    """Time of the host alone: calls one after another, synchronised once."""
    case = OpCase("host", 256, 256, 1, 16, adapters="bf16")
    site = lora_sites.make_site(case, here.device, 0)
    (w, a, b), x = site.copies[0], site.x
    calls: dict[str, Callable[[], Callable[[], Any]]] = {
        "triton launch": lambda: _noop(here, direct=False),
        "our launch": lambda: _noop(here, direct=True),
        "F.linear": lambda: lambda: F.linear(x, w),
        "operator torch": lambda: _operator(x, w, a, b, "torch"),
        "operator one_launch": lambda: _operator(x, w, a, b, "one_launch"),
        "layer of peft_fast": lambda: _layer("peft_fast", site),
        "layer of peft": lambda: _layer("peft", site),  # last: importing peft takes seconds
    }
    for name, make in calls.items():
        row = {"op": "host", "impl": name, "dtype": "bfloat16", "M": 1, "N": case.N, "K": case.K, "R": case.R}
        try:
            with torch.no_grad():
                yield {**row, **in_us(_host_seconds(make(), here))}
        except Exception as error:
            here.synchronize()
            yield {**row, "ok": isinstance(error, ImportError), "note": in_short(error)}


def _host_seconds(call: Callable[[], Any], here: Here) -> list[float]:
    calls, rounds = (2, 2) if here.rehearse else (200, 7)
    for _ in range(2 if here.rehearse else 20):
        call()
    times = []
    for _ in range(rounds):
        here.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls)
    return times


def _noop(here: Here, direct: bool) -> Callable[[], Any]:
    """The smallest kernel, launched by Triton or by us."""
    from csrc_triton.common import planes

    source, out = torch.ones(1, 1, 64, device=here.device), torch.empty(1, 64, device=here.device)
    if direct:
        return lambda: planes.sum_planes(source, out, 1.0)
    args = (source, out, 1.0, 1, 1, 64, 64, 64, 64)
    return lambda: planes._sum_planes_kernel[(1,)](*args, BLOCK=planes._BLOCK, num_warps=planes._WARPS)


def _operator(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, impl: str) -> Callable[[], Any]:
    from peft_fast.ops.lora_linear import linear_fwd

    return lambda: linear_fwd(x, w, None, a, b, 2.0, 0.0, None, impl)


def _layer(library: str, site: lora_sites.Site) -> Callable[[], Any]:
    layer = lora_sites.layers(library, site)[0].eval()
    return lambda: layer(site.x)


# --------------------------------------------------------------------------------------------------------- the tests
def pytest_rows(here: Here) -> Iterator[Row]:
    """tests/interpreter on the device, on all cores but one; stopped in time to write what it found."""
    workers = 0 if here.rehearse else max(1, len(os.sched_getaffinity(0)) - 1)
    path, only = "tests/interpreter", "not traffic"
    if here.rehearse:
        path, only = "tests/interpreter/test_kernels.py", "test_without_bias"
    spread = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
    results = Path(here.folder) / "tests.xml"
    yield from run_pytest([path, *spread, "-q", "-k", only, "--maxfail=40", f"--junitxml={results}"], results, here)


def run_pytest(arguments: Sequence[str], results: Path, here: Here) -> Iterator[Row]:
    """Run pytest; a row that sums up its junit file, and the names of what failed as "about"."""
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider"]
    program = subprocess.Popen(command, cwd=ROOT)
    try:
        program.wait(max(1.0, here.left - 12))
    except subprocess.TimeoutExpired:
        program.send_signal(signal.SIGINT)  # it writes its file
        try:
            program.wait(10)
        except subprocess.TimeoutExpired:
            program.kill()
    row: Row = {"op": "tests", "impl": "pytest"}
    if not results.exists():
        yield {**row, "ok": False, "note": f"no results, exit status {program.returncode}: log.txt says why"}
        return
    counts, failed = in_junit(results)
    yield {"about": {"tests": counts | {"status": program.returncode, "failed": failed}}}
    ok = not failed and program.returncode in (0, 5)  # 5: nothing selected
    yield {**row, "ok": ok, "note": ", ".join(f"{name} {count}" for name, count in counts.items())}


def in_junit(results: Path) -> tuple[dict[str, int], list[str]]:
    """How many of each kind, and the names of the failed tests as pytest takes them."""
    suites = list(ElementTree.parse(results).getroot().iter("testsuite"))
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors")}
    failed = []
    for case in (case for suite in suites for case in suite.iter("testcase")):
        if case.find("failure") is not None or case.find("error") is not None:
            path, _, group = (case.get("classname") or "").partition(".Test")
            names = [path.replace(".", "/") + ".py", *(["Test" + group] if group else []), case.get("name") or ""]
            failed.append("::".join(names))
    return counts, failed
