"""A second run of 150 seconds: NVIDIA's profiler on five kernels, and once more the tests that failed in the first."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..cases.kinds import OpCase, PrefixSiteCase
from . import attention, layers, machine, quantized
from .here import Here, Row

# a part of the kernel's name -> (who is called, the case)
PROFILED: dict[str, tuple[str, Any]] = {
    "_lora_one_launch": ("peft_fast:one_launch", OpCase("q", 4096, 4096, 1, 16)),
    "_lora_gemm": ("peft_fast:split", OpCase("q", 4096, 4096, 8192, 16)),
    "_mixed_one_launch": ("peft_fast:one_launch", layers.MixedRank16("q", 4096, 4096, 32, 8)),
    "_fourbit_linear": ("peft_fast:kernel", quantized.QuantCase("lora_linear_4bit", 4096, 4096)),
    "_prefix_dkv": (
        "peft_fast:kernel", PrefixSiteCase("train", 8, 512, 128, "bf16", heads=32, kv_heads=8, head_size=128),
    ),
}  # fmt: skip
_SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "LaunchStats")


def called(kernel: str, here: Here) -> None:
    """What the profiler watches: the kernel's call, twice."""
    provider, case = PROFILED[kernel]
    kinds = {OpCase: layers.Lora, layers.MixedRank16: layers.Mixed, PrefixSiteCase: attention.Attention}
    session: Any = here
    subject: Any = kinds.get(type(case), quantized.Product)(case.tiny() if here.rehearse else case, session)
    call = subject.runner(provider)
    for _ in range(2):
        call(0)
    here.synchronize()


def profile_rows(kernel: str, here: Here) -> Iterator[Row]:
    """What ncu says of a kernel, as text; a row that says so where it is not here or may not count."""
    row: Row = {"op": "profile", "impl": kernel}
    if here.rehearse:
        called(kernel, here)
    program = shutil.which("ncu")
    if program is None:
        yield {**row, "note": "ncu is not installed"}
        return
    sections = [word for section in _SECTIONS for word in ("--section", section)]
    command = [program, "--clock-control", "none", *sections, "-c", "1", "-k", f"regex:{kernel}"]
    command += [sys.executable, "-m", "bench.first_contact.second", kernel]
    try:
        ran = subprocess.run(
            command, cwd=machine.ROOT, capture_output=True, text=True, timeout=max(1.0, min(22.0, here.left - 1))
        )
        said = (ran.stdout + ran.stderr)[-6000:]
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    yield {**row, "note": "report" if kernel in said and "Metric" in said else "no report", "report": said}


def failed_rows(here: Here) -> Iterator[Row]:
    """The tests that failed in the first run, one process, until one fails, with all that it says in log.txt."""
    failed = json.loads(Path(here.first).read_text())["about"].get("tests", {}).get("failed", [])
    if not failed:
        yield {"op": "tests", "impl": "pytest", "note": "none failed in the first run"}
        return
    results = Path(here.folder) / "failed-tests.xml"
    yield from machine.run_pytest([*failed, "-x", "-vv", f"--junitxml={results}"], results, here)


if __name__ == "__main__":
    called(sys.argv[1], Here(torch.device("cuda"), timed=False))
