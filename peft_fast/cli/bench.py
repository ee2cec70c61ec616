"""``peft-fast bench``: the benchmarks of a checkout, in a process of their own."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import peft_fast

from ..jobs.errors import JobError

SUITES = ("lora", "mixed", "prefix", "quant", "train", "generate", "host", "all")
HELP = "measure this machine: peft_fast beside the base, peft, torch.compile and the roofline (needs a checkout)"
DESCRIPTION = """Measure this machine: what each operator and model costs with peft_fast, beside the base without an
adapter, peft, plain torch, torch.compile, bitsandbytes, and what the hardware allows. Results that are wrong
are never timed: their row says so and the exit code is 1. Needs a checkout, with pip install -e ".[bench]"."""
EPILOG = """suites: lora (single adapters), mixed (many adapters in a batch, and their management), prefix (attention
with learned prefixes), quant (bases quantized by bitsandbytes), train (training steps), generate (generation),
host (what a layer costs the host on a GPU, measured without one).
In --out: SUITE.json (pytest-benchmark's format), results.csv, report.html (tables and plots, needs no network).

examples:
  peft-fast bench --quick                                   # does everything work? under 5 minutes on a CPU
  peft-fast bench --suite lora --out before
  peft-fast bench --suite lora --out after --compare before # what moved beyond the noise"""
_NEEDED = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark", "peft": "peft", "matplotlib": "matplotlib"}


def add_to(parser: argparse.ArgumentParser) -> None:
    """The options, which ``python -m bench run`` has too."""
    add = parser.add_argument
    add("--suite", choices=SUITES, default="all", help="default: all of them, about half an hour on a CPU")
    add("--quick", action="store_true", help="few cases, small models, few rounds")
    add("--out", type=Path, default=Path("peft_fast_bench"), metavar="DIR", help="default: %(default)s")
    add("--compare", type=Path, metavar="DIR", help="results of an earlier run: say what moved beyond the noise")
    add("--show", action="store_true", help="measure nothing: report what --out has")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")


def run(args: argparse.Namespace) -> int:
    """Hand over to ``python -m bench run`` and return its exit code. Raises: JobError without a checkout."""
    root = _checkout()
    lacking = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if lacking:
        raise JobError(f"bench needs {', '.join(lacking)}: pip install -e '{root}[bench]'")
    command = [sys.executable, "-m", "bench", "run", "--suite", args.suite, "--device", args.device]
    command += ["--out", str(args.out.absolute())] + ["--quick"] * args.quick + ["--show"] * args.show
    command += ["--compare", str(args.compare.absolute())] if args.compare else []
    process = subprocess.Popen(command, cwd=root)
    try:
        return process.wait()
    except KeyboardInterrupt:  # Ctrl-C reached it too: it tidies up and says what stays
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        return 130


def _checkout() -> Path:
    """The folder that the package was imported from, else the one we are in or a folder above it."""
    here = Path.cwd()
    for folder in (Path(peft_fast.__file__).resolve().parents[1], here, *here.parents):
        if (folder / "bench" / "bench_suites.py").is_file() and (folder / "csrc_triton").is_dir():
            return folder
    raise JobError(
        "the benchmarks are not in the installed package: run this in a clone of the repository, after "
        "pip install -e '.[bench]' there"
    )
