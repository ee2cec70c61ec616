"""In this process, and in those that it starts, `import peft` means peft_fast, whether or not peft is installed.

How: a finder in front of `sys.meta_path`. `peft` itself is a small module that looks its names up in peft_fast and has
PEFT's version; `peft.x` is the module object `peft_fast.x`. The finder also answers who asks for the version of the
distribution "peft". Processes that the program starts (multiprocessing, torchrun, subprocess) get the same from a
`sitecustomize` in a folder that is put on PYTHONPATH. Nothing is written to disk, no other process is concerned.
"""

import importlib
import importlib.util
import inspect
import os
import re
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, TracebackType
from typing import Any

import peft_fast.utils.missing as missing

PEFT_VERSION = "0.21.2"  # config.FORMAT_VERSION, which is not imported here: this module is to be light
VARIABLE = "PEFT_FAST_RUN_AS_PEFT"
STARTUP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "startup")

_lock = threading.RLock()
_active: "Alias | None" = None


def run_as_peft(children: bool = True) -> "Alias":
    """From now on `import peft`, `from peft import ...`, `peft.tuners.lora`, ... mean peft_fast, in this process.

    Call it before anything imports peft, or transformers' Trainer, which decides at its import whether there is a peft.
    A second call changes nothing and returns the first one's handle.

    Args:
        children: also in Python processes that this one starts, through PYTHONPATH and PEFT_FAST_RUN_AS_PEFT in
            `os.environ`. A child without that variable is left alone.
    Returns: a handle; `undo()`, or leaving it as a context, takes everything back.
    Raises: RuntimeError if peft is imported already, or a module that works without peft since it found none.
    """
    global _active
    with _lock:
        if _active is None:
            _check_that_nothing_is_decided()
            _active = Alias()
        if children:
            _active._concern_children()
        return _active


class Alias:
    """peft_fast in the place of peft, until `undo()`."""

    def __init__(self) -> None:
        self._finders = (_PeftFinder(), _NoSuchModule())
        self._environment: dict[str, str | None] | None = None
        sys.meta_path.insert(0, self._finders[0])
        sys.meta_path.append(self._finders[1])
        _forget_cached_answers()
        importlib.import_module("peft")

    def _concern_children(self) -> None:
        if self._environment is not None:
            return
        self._environment = {name: os.environ.get(name) for name in ("PYTHONPATH", VARIABLE)}
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != STARTUP]
        os.environ["PYTHONPATH"] = os.pathsep.join([STARTUP, *paths])
        os.environ[VARIABLE] = sys.prefix

    def undo(self) -> None:
        """Take the finder, the modules named peft and the environment variables back. Objects stay as they are."""
        global _active
        with _lock:
            if _active is not self:
                return
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in self._finders]
            for name in [name for name in sys.modules if name == "peft" or name.startswith("peft.")]:
                del sys.modules[name]
            for name, value in (self._environment or {}).items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            _forget_cached_answers()
            _active = None

    def __enter__(self) -> "Alias":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


class _Peft(ModuleType):
    """The module `peft`: PEFT's version, peft_fast's names."""

    __version__ = PEFT_VERSION

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.modules["peft_fast"], name)

    def __dir__(self) -> list[str]:
        return dir(sys.modules["peft_fast"])


class _PeftLoader:
    """Makes the module `peft`."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Peft(spec.name, sys.modules["peft_fast"].__doc__)

    def exec_module(self, module: ModuleType) -> None:
        origin = sys.modules["peft_fast"]
        module.__file__ = origin.__file__
        # what peft_fast adds to peft's names is not peft's
        module.__dict__["__all__"] = [name for name in origin.__all__ if name not in ("__version__", "run_as_peft")]


class _SameModule:
    """Gives a module of peft_fast out under a second name."""

    def __init__(self, real: str) -> None:
        self.real = real
        self.spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.real)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system wrote that of the second name over it


class _PeftFinder:
    """Finds `peft` and `peft.x`, and the distribution "peft"."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        root, _, inside = fullname.partition(".")
        if root != "peft":
            return None
        if not inside:
            package = sys.modules["peft_fast"]
            spec = ModuleSpec("peft", _PeftLoader(), origin=package.__file__, is_package=True)  # type: ignore[arg-type]
            spec.submodule_search_locations = list(package.__path__)
            return spec
        real = importlib.util.find_spec(f"peft_fast.{inside}")
        if real is None:
            _refuse(f"peft_fast.{inside}")
            return None
        is_package = real.submodule_search_locations is not None
        loader: Any = _SameModule(real.name)
        return ModuleSpec(fullname, loader, origin=real.origin, is_package=is_package)

    def find_distributions(self, context: Any = None) -> Iterator[Any]:
        """For importlib.metadata: version("peft"), packages_distributions(), ..."""
        if (getattr(context, "name", None) or "peft").lower() == "peft":
            yield _distribution()


class _NoSuchModule:
    """Stands last and is asked for what nobody found: says what peft_fast has instead."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname.startswith("peft_fast."):
            _refuse(fullname)
        return None


def _refuse(real: str) -> None:
    """The error for a module that is not there, or for a name that the import system took for one.

    Without a `name`: `from peft import X` would swallow the error that has X's. Who only asks whether a module exists
    (`importlib.util.find_spec`) gets None.
    """
    frame = sys._getframe(2)  # of the import system, whose caller asked
    while frame.f_back is not None and frame.f_globals.get("__name__") in ("_frozen_importlib", "importlib._bootstrap"):
        frame = frame.f_back
    if frame.f_globals.get("__name__") == "importlib.util":
        return
    parent, _, name = real.rpartition(".")
    raise ModuleNotFoundError(missing.missing_text(sys.modules[parent], name))


def _distribution() -> Any:
    from importlib.metadata import Distribution  # takes a while, and who asks has imported it

    class PeftDistribution(Distribution):
        def read_text(self, filename: str) -> str | None:
            metadata = (
                f"Metadata-Version: 2.1\nName: peft\nVersion: {PEFT_VERSION}\nSummary: peft_fast, running as peft\n"
            )
            return {"METADATA": metadata, "top_level.txt": "peft\n"}.get(filename)

        def locate_file(self, path: Any) -> Any:
            return os.path.join(os.path.dirname(str(sys.modules["peft_fast"].__file__)), path)

    return PeftDistribution()


def _check_that_nothing_is_decided() -> None:
    """Raise RuntimeError where the alias would come too late. transformers itself may be imported: it asks later."""
    advice = (
        "call peft_fast.run_as_peft() before, as the program's first line, or start it with `python -m peft_fast run`"
    )
    peft = sys.modules.get("peft")
    if peft is not None:
        where = getattr(peft, "__file__", None) or "no file"
        raise RuntimeError(f"peft is imported already ({where}), and its classes may be in use: {advice}")
    late = sorted(name for name, module in list(sys.modules.items()) if _decided(module))
    if late:
        raise RuntimeError(
            f"imported already, and working without peft since there was none: {', '.join(late)}; {advice}"
        )


def _decided(module: ModuleType) -> bool:
    """Whether a module looked for peft as it was imported."""
    names = getattr(module, "__dict__", {})
    if names.get("_peft_available") is False:
        return True
    if "is_peft_available" not in names:
        return False
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return False
    return re.search(r"^if .*\bis_peft_available\(\)", source, re.MULTILINE) is not None


def _forget_cached_answers() -> None:
    """transformers asks once whether peft is there and remembers."""
    asks = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_peft_available", "is_peft_greater_or_equal", "_package_distribution_mapping"):
        clear = getattr(getattr(asks, name, None), "cache_clear", None)
        if clear is not None:
            clear()
    importlib.invalidate_caches()
