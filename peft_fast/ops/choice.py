"""Which implementation an operator takes, and why: argument, environment variable, measured table, safe path, in this
order. What there is to choose from: operators.py.

A kernel is chosen only where a measured row says that it wins: the user's own, else one that comes with the library
(``csrc_triton.tables`` says which rows speak for what). Attention with a learned prefix has no rows: prefix_choice.py.
"""

import functools
import importlib.util
import os
import warnings
from typing import Any, NamedTuple

import torch

from .operators import OPERATORS, Implementation, Operator

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Choice(NamedTuple):
    """An implementation's name and the reason for taking it, for people."""

    name: str
    reason: str


# os.environ's own dictionary: a look-up through os.environ encodes and decodes, which takes 1 us, and this is asked in
# every call of every layer
_ENVIRONMENT: Any = getattr(os.environ, "_data", os.environ)
_KEYS: dict[str, Any] = {
    op.variable: op.variable if _ENVIRONMENT is os.environ else os.environ.encodekey(op.variable)
    for op in OPERATORS.values()
}


def requested(op: str, implementation: str | None, like: str = "") -> str:
    """Return what the caller or the environment asks for, one of the names of the operator, or of the one that it is
    ``like``; "auto" when neither does, or the environment's is another operator's.

    Raises: ValueError on another name.
    """
    known = OPERATORS[like or op]
    name = implementation or (_KEYS[known.variable] in _ENVIRONMENT and os.environ[known.variable]) or "auto"
    if name in known.names:
        return name
    if implementation is None and any(name in other.names for other in OPERATORS.values() if _shares(other, known)):
        return "auto"  # the variable forces another operator
    raise ValueError(f"{op}: implementation must be one of {known.names}, got {name!r}")


def _shares(one: Operator, other: Operator) -> bool:
    return one.variable == other.variable


def choose(
    op: str, device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, R: int,
    *, p: float = 0.0, implementation: str | None = None,
) -> Choice:  # fmt: skip
    """Return the implementation for one call of ``op`` on x (M, K), w (N, K), rank R, with dropout p.

    Training changes nothing: every implementation returns what the backward needs.
    Raises: ValueError on an unknown name, or when one is forced beyond its bound; RuntimeError when what is forced, or
        the only thing that there is, cannot run on ``device``; TypeError when it has no version for ``dtype``.
    """
    known = OPERATORS[op]
    name = requested(op, implementation)
    if name != "auto":
        _check_runs(known, known[name], device, dtype, M, R)
        return forced(known, name, implementation)
    if device.type == "cuda":
        choice = _automatic(op, device, dtype, _rows(M), N, K, _bucket(R), p > 0)
        if not known[choice.name].kernel or known["torch"].cpu_only or not (failure := triton_failure(device)):
            return choice
        return Choice("torch", failure)
    if known["torch"].cpu_only and device.type != "cpu":
        _check_runs(known, known[known.gpu.implementation], device, dtype, M, R)  # raises, but in the interpreter
        return Choice(*known.gpu)
    return Choice("torch", f"{device.type} tensors {known.elsewhere}")


def forced(op: Operator, name: str, implementation: str | None) -> Choice:
    """The choice of a name that was asked for."""
    return Choice(name, "forced by the argument" if implementation == name else f"forced by {op.variable}")


@functools.lru_cache(maxsize=4096)
def _automatic(
    op: str, device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, R: int, dropout: bool
) -> Choice:
    """What "auto" means on a GPU; M and R count up to the next power of two."""
    known = OPERATORS[op]
    default = (dropout and known.gpu_dropout) or known.gpu
    if lacks := kernels_lack(dtype):
        if known["torch"].cpu_only:
            _check_runs(known, known[default.implementation], device, dtype, M, R)
        return Choice("torch", lacks)
    if measured := _measured(op, device, dtype, M, N, K, R, dropout):
        return measured
    where = f"{gpu_name(device)} at {dtype_name(dtype)} M={M} N={N} K={K} R={R}{' with dropout' if dropout else ''}"
    return Choice(default.implementation, f"no measured entry for {where}; {default.reason}")


@functools.lru_cache(maxsize=4096)
def _measured(
    op: str, device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, R: int, dropout: bool
) -> Choice | None:
    """What the row says that speaks for this; M and R count up to the next power of two."""
    from csrc_triton import tables

    what = dict(op=op, dtype=dtype_name(dtype), dropout=dropout)
    row = tables.find(tables.CHOICES, what, tables.gpu_of(device), tables.Sizes(M, N, K, R))
    if row is None or not OPERATORS[op][row["implementation"]].holds(M, R):
        return None
    sizes = f"M up to {row['M']}, N near {row['N']}, K near {row['K']}, R near {row['R']}"
    return Choice(
        row["implementation"],
        f"measured on {row['gpu']} with triton {row['triton']}, {row['date']}, {row['commit']}, for {sizes}: "
        f"{row['gain']:.2f} times as fast as without",
    )


def forget() -> None:
    """Look the tables up again, after they have changed."""
    _automatic.cache_clear()
    _measured.cache_clear()


def _check_runs(op: Operator, it: Implementation, device: torch.device, dtype: torch.dtype, M: int, R: int) -> None:
    """Raise where an implementation cannot run, with what the caller can do instead."""
    auto = f"leave the argument implementation= (or {op.variable}) at 'auto'"
    if it.cpu_only and device.type != "cpu":
        raise RuntimeError(
            f"{op.name}: implementation {it.name!r} {it.cpu_only} {device}: {auto}, or force {op.instead!r}"
        )
    if it.kernel:
        check_kernel(op, it.name, device, dtype)
    if not it.holds(M, R):
        instead = auto if op["torch"].cpu_only else f"{auto}, or force 'torch'"
        raise ValueError(
            f"{op.name}: implementation {it.name!r} is for {it.bound}, got M = {M} and R = {R}: force {op.instead!r}, "
            f"or {instead}"
        )


def check_kernel(op: Operator, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise where no kernel can run: RuntimeError, or TypeError for a dtype that none has."""
    what = f"{op.name}: implementation {name!r}"
    instead = f"leave the argument implementation= (or {op.variable}) at 'auto'"
    if not op["torch"].cpu_only:
        instead += ", or force 'torch'"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"{what} is a GPU kernel and x is on {device}: move x to a GPU; or {instead}")
    if not has_triton():
        raise RuntimeError(f"{what} needs triton, which is not installed: pip install triton; or {instead}")
    if dtype not in _KERNEL_DTYPES:
        raise TypeError(f"{what} has no kernel for {dtype_name(dtype)}, only for fp16, bf16 and fp32; {instead}")


def kernels_lack(dtype: torch.dtype) -> str:
    """Why no kernel runs on any GPU, or ""."""
    if dtype not in _KERNEL_DTYPES:
        return f"no kernels for {dtype_name(dtype)}"
    return "" if has_triton() else "triton is not installed"


def triton_failure(device: torch.device) -> str:
    """Why Triton cannot run a kernel on this GPU, or "" where it can. Tried once, by a tiny launch, and said in one
    warning: PEFT works there, so plain torch takes over.

    Causes are outside of the library: no C compiler or no headers of Python for Triton's launcher, a cache directory
    that cannot be written, a chip that this Triton does not know.
    """
    if not has_triton():
        return "triton is not installed"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return ""  # nothing may be loaded now; a launch that then fails says so itself
    return _triton_failure(device)


@functools.cache
def _triton_failure(device: torch.device) -> str:
    try:
        planes = importlib.import_module("csrc_triton.common.planes")
        planes.sum_planes(torch.ones(2, 1, 1, device=device), torch.empty(1, 1, device=device), 1.0)
    except Exception as error:  # whatever it is, it must not stop a program that needs no kernel
        failure = f"Triton cannot run kernels on {device} ({type(error).__name__}: {str(error).strip()[:300]})"
        warnings.warn(
            f"peft_fast: {failure}. Plain torch runs in their place, which is slower. Triton needs a C compiler (gcc "
            "or clang), the headers of Python and a cache directory that can be written (TRITON_CACHE_DIR).",
            stacklevel=2,
        )
        return failure
    return ""


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def gpu_name(device: torch.device) -> str:
    from csrc_triton import tables

    return str(tables.gpu_of(device).name)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bucket(R: int) -> int:
    """The power of two that a kernel rounds the rank up to, at least 16."""
    return max(16, 1 << (R - 1).bit_length())


def _rows(M: int) -> int:
    """M as the tables count it: the next power of two."""
    return 1 << max(0, M - 1).bit_length()
