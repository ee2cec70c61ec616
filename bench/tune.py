"""Fill csrc_triton's own tables on this GPU, at the sizes of Llama-3-8B: what `peft-fast tune` does for one model.

Every finished row is written at once; the same command goes on with what is missing for this GPU and triton.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from csrc_triton import tables
from peft_fast.tuning.case import Setting
from peft_fast.tuning.shapes import LLAMA_8B, TINY
from peft_fast.tuning.table import Provenance
from peft_fast.tuning.work import CHOICES, CONFIGS, Task, Work, gpu_setting, provenance, tasks, triton_version

from .measure import commit

FILES = {"configs": CONFIGS, "choices": CHOICES}
INTERPRETER = "interpreter"  # the GPU's name in a dry run's rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m bench tune``."""
    parser.epilog = (
        "Every finished row is written at once, and the same command goes on with what is missing for this GPU and "
        "triton. Exit status: 0, also when the time was over; 1: a result was wrong; 2: it cannot run; 130: Ctrl-C."
    )
    parser.add_argument("--only", choices=tuple(FILES), help="only this table; default: both")
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="only these kernels and ops, such as lora_gemm")
    parser.add_argument("--again", action="store_true", help="measure also what is there, the oldest rows first")
    parser.add_argument(
        "--seconds", type=float, metavar="BUDGET", help="start nothing after this time; the same command goes on"
    )
    parser.add_argument(
        "--tables", type=Path, metavar="DIR", help="read and write the tables here; default: csrc_triton/tables"
    )
    parser.add_argument(
        "--dry", action="store_true", help="try it without a GPU: tiny sizes in Triton's interpreter; needs --tables"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0; 1 if a result was wrong; 2 if it cannot run; 130 after Ctrl-C. What was finished is in the tables."""
    problem = _cannot_run(args)
    if problem:
        print(f"python -m bench tune: {problem}", file=sys.stderr)
        return 2
    setting, where = _setting(args.dry)
    found = [task for task in _tasks(setting) if args.only is None or task.file == FILES[args.only]]
    known = list(dict.fromkeys(task.of for task in found))
    if unknown := sorted(set(args.kernel or ()) - set(known)):
        print(f"python -m bench tune: unknown {', '.join(unknown)}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    found = [task for task in found if not args.kernel or task.of in args.kernel]
    work = Work(
        setting, args.tables or tables.SHIPPED, where, found, args.again, say=lambda line: print(line, flush=True)
    )
    print(f"tune: {len(work.todo)} of {len(found)} shapes left for {where.gpu}, triton {where.triton}", flush=True)
    try:
        if not args.dry:
            work.compile(os.cpu_count() or 1, None if args.seconds is None else args.seconds / 2)
        work.go_on(args.seconds)
    except KeyboardInterrupt:
        print(f"tune: interrupted; {work.summary()}", flush=True)
        return 130
    print(f"tune: {work.summary()}")
    return 1 if work.faults else 0


def _cannot_run(args: argparse.Namespace) -> str | None:
    if args.dry and (args.tables is None or args.tables.resolve() == tables.SHIPPED.resolve()):
        return "--dry writes rows of no use: give it --tables DIR, another folder than csrc_triton/tables"
    if args.dry and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton
    except ImportError:
        return "needs triton: pip install triton"
    if args.dry and not triton.knobs.runtime.interpret:
        return "--dry needs Triton's interpreter: set TRITON_INTERPRET=1"
    if not args.dry and not torch.cuda.is_available():
        return "needs a GPU, and torch sees none; --dry --tables DIR tries it in Triton's interpreter"
    return None


def _setting(dry: bool) -> tuple[Setting, Provenance]:
    from csrc_triton.common.tuning import arch_of

    if dry:
        device = torch.device("cpu")
        # fp16: the interpreter's tl.dot multiplies the bit patterns of bf16
        setting = Setting(INTERPRETER, device, torch.float16, arch_of(device), 0, 0.0, 2, dry=True, heads=TINY.heads)
        return setting, Provenance(INTERPRETER, INTERPRETER, torch.__version__, triton_version(), commit())
    device = torch.device("cuda", torch.cuda.current_device())
    return gpu_setting(device, torch.bfloat16, 0.2, 11, heads=LLAMA_8B.heads), provenance(device, commit())


def _tasks(setting: Setting) -> list[Task]:
    return tasks(TINY if setting.dry else LLAMA_8B, setting.dtype_name)
