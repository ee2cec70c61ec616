"""``python -m bench run``: the measurements, in a process of their own with one thread, into one JSON file."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from .cases import GPU_STEPS, MIXED_STEPS, PREFIX_STEPS, QUANT_STEPS

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# suite -> stem of its result file; bench_SUITE.py has its tests
SUITES = {"lora": "cpu", "mixed": "cpu-mixed", "prefix": "cpu-prefix", "quant": "cpu-quant"}
_STEPS = {"mixed": MIXED_STEPS, "prefix": PREFIX_STEPS, "quant": QUANT_STEPS}
_CHOICES = ("PEFT_FAST_LORA", "PEFT_FAST_PREFIX", "PEFT_FAST_QUANT")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m bench run``."""
    parser.add_argument("--quick", action="store_true", help="few cases and a small model: does everything work?")
    parser.add_argument(
        "--suite", choices=SUITES, default="lora",
        help="single adapters (default); mixed: batches that mix adapters, and the management of adapters; "
        "prefix: attention with learned prefixes; quant: bases quantized by bitsandbytes",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: bench/results/cpu.json, cpu-SUITE.json, or gpu-STEP.json"
    )
    parser.add_argument("--only", metavar="WORDS", help="only cases that match, as pytest -k")
    parser.add_argument(
        "--gpu", choices=GPU_STEPS, metavar="STEP", help=f"one step of the GPU campaign: {', '.join(GPU_STEPS)}"
    )
    parser.add_argument("--dry", action="store_true", help="try a --gpu step on the CPU with tiny sizes")


def run(args: argparse.Namespace) -> int:
    """Run pytest on bench_SUITE.py; non-zero if a result was wrong or anything failed."""
    suite = args.suite
    if args.gpu:
        suite = next((name for name, steps in _STEPS.items() if args.gpu in steps), "lora")
    stem = f"gpu-{args.gpu}" if args.gpu else SUITES[suite] + "-quick" * args.quick
    out = args.out or RESULTS / f"{stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    environment = dict(os.environ)
    if not args.gpu or args.dry:
        environment |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    for name in _CHOICES:  # a developer's choice must not decide what is measured
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", str(HERE / f"bench_{suite}.py"), "-q", "-p", "no:cacheprovider"]
    command += [f"--benchmark-json={out}", "--benchmark-disable-gc", "--benchmark-columns=median,iqr,rounds"]
    command += ["--benchmark-group-by=group", "--benchmark-sort=name", "-W", "ignore", "--benchmark-warmup=off"]
    command += ["--suite", suite] + ["--quick"] * args.quick + ["--dry"] * args.dry
    command += ["--gpu-step", args.gpu] if args.gpu else []
    command += ["-k", args.only] if args.only else []
    status = subprocess.run(command, cwd=HERE.parent, env=environment).returncode
    if status == 0:
        print(f"wrote {out}; `python -m bench report {out}` shows it side by side")
    return status
