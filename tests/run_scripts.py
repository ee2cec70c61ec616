"""Runs Python programs in processes of their own, with peft or peft_fast in its place, and reads what they print."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parent / "scripts"


def python(*arguments: str, code: int = 0, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """What a fresh interpreter prints, after it ended with this exit code; with its errors if that is not 0."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=550, env=environment, cwd=cwd
    )
    assert done.returncode == code, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr if code else done.stdout


def script(name: str, out: Path, *arguments: str, peft: bool = False, processes: int = 0) -> Any:
    """The result that a script of tests/scripts prints, run with peft_fast as peft, or with peft itself.

    Args:
        name: without ".py". out: its first argument, a directory that is made.
        processes: how many torchrun starts; 0 runs the script without torchrun.
    """
    out.mkdir(parents=True)
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = ["-m", *torchrun] if processes else []
    if not peft:
        command = ["-m", "peft_fast", "run", *command]
    printed = python(*command, str(SCRIPTS / f"{name}.py"), str(out), *arguments)
    (result,) = [line.partition("RESULT ")[2] for line in printed.splitlines() if "RESULT " in line]
    return json.loads(result)


def same(ours: Any, theirs: Any, where: str) -> None:
    """Fail unless both are equal: numbers to 1e-5, everything else exactly."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs), where
        for key, value in theirs.items():
            same(ours[key], value, f"{where}: {key}")
    elif isinstance(theirs, list):
        assert isinstance(ours, list) and len(ours) == len(theirs), where
        for one, other in zip(ours, theirs, strict=True):
            same(one, other, where)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), where
    else:
        assert ours == theirs, where
