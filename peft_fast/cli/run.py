"""`peft-fast run`: a program that uses peft, as it is, with peft_fast in peft's place."""

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence

import peft_fast

from ..jobs.errors import UsageError


def run(target: str, arguments: Sequence[str], is_module: bool) -> int:
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
