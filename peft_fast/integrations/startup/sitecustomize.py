"""Python imports this as it starts, where `run_as_peft` put this folder on PYTHONPATH: there too peft is peft_fast.

Imports nothing heavy, takes its folder off `sys.path` again, and runs the `sitecustomize` that it stands in front of.
"""

import importlib.util
import os
import sys


def _run_the_next() -> None:
    """Import the machine's own sitecustomize, where there is one, in place of this module."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    own = sys.modules.pop("sitecustomize")
    try:
        importlib.import_module("sitecustomize")
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", own)


def _start() -> None:
    # another environment's Python, or one whose parent took the variable away, is left alone
    if os.environ.get("PEFT_FAST_RUN_AS_PEFT") != sys.prefix:
        return
    if importlib.util.find_spec("peft_fast") is None:  # the parent found it in its working directory
        sys.path.append(os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 3)))
    importlib.import_module("peft_fast.integrations.run_as_peft").run_as_peft()


if __name__ == "sitecustomize":
    try:
        _run_the_next()
    finally:
        _start()
