"""Set-up of the kernels' own test process: ``python -m pytest tests/interpreter``.

Without a GPU the real kernels run in Triton's interpreter. It is switched on for a whole process, in which CPU tensors
can take kernels, so these tests are kept out of every other run (pyproject: norecursedirs); test_interpreter.py in
tests/kernels starts them. On a machine with a GPU the same tests run on it.
"""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module imports triton."""
    alone = all(Path(arg.split("::")[0]).resolve().is_relative_to(HERE) for arg in config.args)
    if torch.cuda.is_available() or not alone:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    _mend_interpreter()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Collect nothing in a process that also runs other tests, and on a GPU nothing that patches the interpreter."""
    if torch.cuda.is_available():
        return collection_path.name.startswith("test_traffic") or None
    return None if os.environ.get("TRITON_INTERPRET") == "1" else True


def _mend_interpreter() -> None:
    """Make Triton 3.9's interpreter compute what a GPU does.

    It multiplies the bit patterns of bf16 operands in tl.dot, and cuts fp32 off to bf16 where a GPU rounds to nearest.
    It also wraps triton.language anew at every call of a device function, which the launch has done already.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = Builder.create_dot, Builder.cast_impl

    def upcast(t):
        if t.dtype.scalar != tl.bfloat16:
            return t
        return Handle((t.data.astype("uint32") << 16).view("float32"), tl.float32)

    def rounding_cast(self, source, to):
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, to)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16)
        return Handle(rounded.numpy(), tl.bfloat16)

    Builder.create_dot = lambda self, a, b, *rest: dot(self, upcast(a), upcast(b), *rest)
    Builder.cast_impl = rounding_cast
    call = interpreter.InterpretedFunction.__call__

    def call_ours_directly(self, *args, **kwargs):
        if self.fn.__module__.startswith("csrc_triton."):
            return self.rewrite()(*args, **kwargs)
        return call(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_ours_directly


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (or 127): an element that no kernel writes shows."""

    def poisoned(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else 127)

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched so far."""
    from csrc_triton.common import launch

    names: list[str] = []

    def count(kernel):
        names.append(kernel.fn.__name__.removeprefix("_").removesuffix("_kernel"))

    monkeypatch.setattr(launch, "LISTENERS", [count])
    return names


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch):
    """force(kernel, config): run this kernel with that configuration, or with its own changed by those entries."""
    from csrc_triton.common import tuning

    lookup = tuning._lookup
    forced: dict[str, dict[str, int]] = {}
    monkeypatch.setattr(tuning, "_lookup", lambda kernel, *key: lookup(kernel, *key) | forced.get(kernel, {}))
    return forced.__setitem__
