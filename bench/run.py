"""``python -m bench run``: suites, each in a process of its own with one thread, into one folder; then the report."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from peft_fast.cli import bench as command

from .cases.suites import GPU_STEPS, SUITES
from .report import command as report

HERE = Path(__file__).parent
_CHOICES = ("PEFT_FAST_LORA", "PEFT_FAST_PREFIX", "PEFT_FAST_QUANT")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``peft-fast bench``, and what developers need besides."""
    command.add_to(parser)
    parser.add_argument(
        "--step", choices=GPU_STEPS, metavar="STEP", help=f"one of the campaign: {', '.join(GPU_STEPS)}"
    )
    parser.add_argument(
        "--dry", action="store_true", help="tiny sizes on the CPU: does a suite's or step's script work?"
    )
    parser.add_argument("--only", metavar="WORDS", help="only cases that match, as pytest -k")


def run(args: argparse.Namespace) -> int:
    """Measure, then report; 1 if a result was wrong or anything failed, 130 if stopped."""
    out: Path = args.out.resolve()
    if args.show:
        return report.report(out, args.compare)
    if args.compare is not None:  # before measuring: a wrong path is found at once
        try:
            report.load(args.compare)
        except (FileNotFoundError, ValueError) as error:
            print(f"error: --compare: {error}", file=sys.stderr)
            return 2
    out.mkdir(parents=True, exist_ok=True)
    device = _device(args)
    names = [args.step] if args.step else list(SUITES) if args.suite == "all" else [args.suite]
    failed = []
    for name in names:
        try:
            status = _measure(name, args, device, out / f"{name}.json")
        except KeyboardInterrupt:
            print(f"stopped in {name}; finished files stay in {out}", file=sys.stderr)
            return 130
        failed += [name] * (status != 0)
    told = report.report(out, args.compare, names) if any(out.glob("*.json")) else 1
    if failed:
        print(f"failed, or wrong results: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else told


def _device(args: argparse.Namespace) -> str:
    if args.dry:
        return "cpu"
    if args.step:
        return "cuda"
    if args.device == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(args.device)


def _measure(name: str, args: argparse.Namespace, device: str, out: Path) -> int:
    """One suite or step. The file appears when it is complete; an older one is replaced then, not before."""
    environment = dict(os.environ)
    if device == "cpu":
        environment |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        environment |= dict(TORCHINDUCTOR_COMPILE_THREADS="1")
    for variable in _CHOICES:  # a developer's choice must not decide what is measured
        environment.pop(variable, None)
    part = out.with_name(f".{out.name}.part")
    command = [sys.executable, "-m", "pytest", str(HERE / "bench_suites.py"), "-q", "-p", "no:cacheprovider"]
    command += [f"--benchmark-json={part}", "--benchmark-disable-gc", "--benchmark-columns=median,iqr,rounds"]
    command += ["--benchmark-group-by=group", "--benchmark-sort=name", "-W", "ignore", "--benchmark-warmup=off"]
    command += ["--suite", GPU_STEPS[name][0] if args.step else name, "--on", device]
    command += ["--quick"] * args.quick + ["--dry"] * args.dry
    command += ["--gpu-step", name] if args.step else []
    command += ["-k", args.only] if args.only else []
    part.unlink(missing_ok=True)
    try:
        print(f"measuring: {name}", flush=True)
        log = out.with_suffix(".log")
        with log.open("w") as text:
            status = subprocess.run(command, cwd=HERE.parent, env=environment, stdout=text, stderr=text).returncode
        if status != 0:
            print(f"{name} failed:\n" + "\n".join(log.read_text().splitlines()[-40:]), file=sys.stderr)
        else:
            log.unlink()
        if part.exists() and part.stat().st_size:
            os.replace(part, out)
        return status
    finally:
        part.unlink(missing_ok=True)
