"""A CUDA driver that is not there: launches specialise and compile exactly as on a GPU, and run nothing.

``install()`` puts it under Triton for the whole process, so tests use it in processes of their own (``run``).
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def install(arch: int = 90, shared_bytes: int = 227 * 1024, launcher: Any = None) -> list[str]:
    """Return the list that the name of every launched kernel is added to."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.compiler import compiler
    from triton.runtime.driver import driver

    launched: list[str] = []

    class Utils:
        def load_binary(self, *args: Any) -> tuple[int, ...]:
            return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads of a block

        def get_device_properties(self, device: int) -> dict[str, int]:
            return dict(max_shared_mem=shared_bytes, multiprocessor_count=132, warpSize=32)

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.name = metadata.name

        def __call__(self, *args: Any) -> None:
            launched.append(self.name)

    class Absent(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils, self.launcher_cls = Utils(), launcher or Launcher

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

    driver.set_active(Absent())
    compiler.max_shared_mem = lambda device: shared_bytes
    return launched


def run(code: str, **environment: str) -> str:
    """What a program prints in a process in which Triton is not interpreted. Raises: AssertionError if it fails."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CC")}
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    program = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, cwd=ROOT, env=kept | {"PYTHONPATH": paths} | environment,
    )  # fmt: skip
    assert program.returncode == 0, program.stderr[-3000:]
    return program.stdout
