"""The kernels' tests, in a process of their own: Triton's interpreter is switched on for a whole process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("file", sorted(path.name for path in (TESTS / "interpreter").glob("test_*.py")))
def test_kernels_in_the_interpreter(file):
    """File by file, so that workers share them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(TESTS / "interpreter" / file), "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert " passed" in run.stdout and " skipped" not in run.stdout, run.stdout
