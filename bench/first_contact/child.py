"""A child process of first contact: takes the numbers of cases, runs them, sends what they found to the parent.

A fault of a kernel spoils the whole process: after it the child ends, and the parent starts another for the next case.
"""

import gc
import importlib.util
import os
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def main(phase: str, options: dict[str, Any], log: str, connection: Connection) -> None:
    """Run what the parent asks for. Messages: ("row" | "about", dict), then ("done", whether the process is sound)."""
    parent = os.getppid()
    os.setsid()  # what a case starts is killed with it
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    here = _here(options)
    from . import phases

    cases = phases.cases_of(phase, here)
    while True:
        while not connection.poll(1.0):
            if os.getppid() != parent:  # it was killed, and what holds the other end open is another child
                return
        case = cases[connection.recv()]
        print(f"-- {phase}: {case.name}", flush=True)
        try:
            for row in case.rows(here):
                kind = "about" if "about" in row else "row"
                connection.send((kind, row["about"] if kind == "about" else {**row, "case": case.name}))
            here.synchronize()
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            note = f"{type(error).__name__}: {str(error).strip()[:300]}"
            connection.send(("row", {"op": case.op, "case": case.name, "ok": False, "note": note}))
        sound = _cleaned(here)
        connection.send(("done", sound))
        if not sound:
            os._exit(3)


def _here(options: dict[str, Any]) -> Any:
    import torch

    from .here import Here

    if options["rehearse"]:
        interpreted()
        torch.set_num_threads(1)
    return Here(torch.device("cpu" if options["rehearse"] else "cuda"), **options)


def interpreted() -> None:
    """Have kernels run in Triton's interpreter as the tests do, with what they mend in it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("a rehearsal needs TRITON_INTERPRET=1 from the start of the process")
    path = ROOT / "tests" / "interpreter" / "conftest.py"
    spec = importlib.util.spec_from_file_location("interpreter_conftest", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} is not there: a rehearsal needs a checkout")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._mend_interpreter()


def _cleaned(here: Any) -> bool:
    """Give memory back; whether the GPU still answers."""
    import torch

    gc.collect()
    try:
        here.synchronize()
        if here.on_gpu:
            torch.cuda.empty_cache()
    except RuntimeError:
        traceback.print_exc()
        sys.stderr.flush()
        return False
    return True
