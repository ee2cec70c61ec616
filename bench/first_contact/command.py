"""``python -m bench first-contact --out DIR``: all phases within ten minutes, DIR/gpu.json and DIR/log.txt, a table."""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets gpu.json and log.txt")
    parser.add_argument("--seconds", type=float, help="of wall time, whatever happens (580; of a second run 150)")
    parser.add_argument("--second-run", type=Path, metavar="FILE", help="the JSON of a first run: profile some kernels"
                        " and run the tests again that failed, into DIR/second.json")  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="PHASE", help="these phases alone, with all of the time")
    parser.add_argument("--rehearse", action="store_true", help="try everything without a GPU: tiny sizes, the "
                        "interpreter; times mean nothing")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """As a command of ``python -m bench``: in a new process, for what bench imported may have looked at the GPU."""
    return subprocess.call([sys.executable, "-m", "bench.first_contact", *sys.argv[2:]])


def main(args: argparse.Namespace) -> int:
    """Do it; 0 when the machine answered, whatever was found on it."""
    start = time.time()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # children are killed then too
    args.out.mkdir(parents=True, exist_ok=True)
    _environment(args.rehearse)
    if args.rehearse and args.second_run is None:
        for name in ("peft", "transformers.masking_utils", "transformers.models.llama.modeling_llama"):
            importlib.import_module(name)  # on a GPU children import them: they look at it
        start = time.time()
    from . import phases, tables
    from .here import Here
    from .runner import Document, Runner

    second = args.second_run is not None
    plan = [p for p in (phases.SECOND if second else phases.PHASES) if not args.only or p.name in args.only]
    if not plan:
        known = ", ".join(p.name for p in (phases.SECOND if second else phases.PHASES))
        raise SystemExit(f"--only: there is no phase {' '.join(args.only)}; phases: {known}")
    if not second:
        (args.out / "log.txt").unlink(missing_ok=True)
    document = Document(args.out / ("second.json" if second else "gpu.json"))
    options: dict[str, Any] = {"rehearse": args.rehearse, "folder": str(args.out.resolve())}
    options["first"] = str(args.second_run.resolve()) if second else ""
    here = Here(_device("cpu"), **options)

    def names(phase: str) -> list[str]:
        return [case.name for case in phases.cases_of(phase, here)]

    from .child import main as child

    seconds = args.seconds or (150.0 if second else 580.0)
    runner = Runner(document, seconds - 5, child, names, options)  # what ending and the table take
    runner.start = start
    runner.run(plan)
    print(tables.overview({"about": document.about, "phases": document.phases, "rows": document.rows}))
    return 0 if any(row["ok"] for row in document.rows) else 1


def _device(name: str) -> Any:
    import torch

    return torch.device(name)


def _environment(rehearse: bool) -> None:
    """Before torch and triton are imported: one cache of kernels for all children, and no look at the GPU from here."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "first-contact-kernels"))
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
