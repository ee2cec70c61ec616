"""`peft-fast run`: a program that uses peft, as it is, with peft_fast in peft's place."""

import argparse
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence

import peft_fast

from ..jobs.errors import UsageError

HELP = "run a program that uses peft, unchanged, with peft_fast in peft's place"
DESCRIPTION = """Run a script, or with -m a module, as python would, where `import peft` means peft_fast: for the
program, the libraries it uses (transformers, accelerate, trl, ...) and the Python processes it starts.
Whether peft is installed does not matter. A name of peft that peft_fast does not have is an ImportError
that says what there is. Exit code: the program's own; 2 if there is no such program."""
EPILOG = """examples: peft-fast run train.py --lr 1e-4
          peft-fast run -m torch.distributed.run --nproc-per-node 2 train.py --lr 1e-4"""


def add_to(parser: argparse.ArgumentParser) -> None:
    """The command's options, and the program with its own."""
    add = parser.add_argument
    parser.usage = "peft-fast run [-h] [-m] SCRIPT [ARGUMENT ...]"
    add("-m", action="store_true", dest="is_module", help="SCRIPT is the name of a module")
    add("target", metavar="SCRIPT", help="the program")
    add("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="what the program gets")


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the program came to its end; what it raises, `SystemExit` included, goes to the caller."""
    return run_program(args.target, args.arguments, args.is_module)


def run_program(target: str, arguments: Sequence[str], is_module: bool) -> int:
    """Run a script (or a folder or zip file with a `__main__.py`), or a module, as `python` and `python -m` would.

    What it raises, `SystemExit` included, goes to the caller.
    Returns: 0. Raises: UsageError if there is no such file or module.
    """
    if not is_module and not os.path.exists(target):
        raise UsageError(f"no such file: {target}")
    _stay_findable()
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd() if is_module else _folder(target)
    try:
        peft_fast.run_as_peft()
    except RuntimeError as error:  # only where Python itself, or a sitecustomize, imported peft
        raise UsageError(str(error)) from error
    if is_module:
        _check_module(target)
    sys.argv = [target, *arguments]
    if is_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(os.path.abspath(target), run_name="__main__")
    return 0


def _folder(script: str) -> str:
    """What Python puts first on `sys.path`."""
    whole = os.path.realpath(script)
    return whole if os.path.isdir(whole) else os.path.dirname(whole)


def _stay_findable() -> None:
    """A clone that is not installed was found in the working directory, which leaves `sys.path` now."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(str(peft_fast.__file__))))
    if os.path.abspath(sys.path[0] or ".") == root:
        sys.path.append(root)


def _check_module(name: str) -> None:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{name}.".startswith(f"{error.name}."):  # raised inside of a package's own code
            raise
        found = None
    if found is None:
        raise UsageError(f"no module named {name}")
