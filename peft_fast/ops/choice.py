"""Which implementation an op takes, and why: argument, environment variable, measured table, safe path, in this order.

    torch       plain torch: the vendor's GEMMs, addmm into the base's output. The safe path, and what CPU tensors take
    addmm       the same GEMMs, but s and dropout's mask from a kernel: the safe path on a GPU when there is dropout
                and Triton works there (``triton_failure``)
    one_launch  base and update in one kernel, for few rows (``ONE_LAUNCH_MAX_RANK``, ``ONE_LAUNCH_MAX_MR``)
    split       s by one kernel, base and update by a second one
    peft        PEFT's own order of casts, in plain torch

A batch that mixes adapters ("lora_mixed") takes plain torch on a CPU only: on a GPU that would read the slots back.

    grouped     the vendor's base GEMM, then s and the update by two kernels over blocks of rows of one adapter: the
                safe path on a GPU
    one_launch, split   as above; one_launch for at most ``MIXED_ONE_LAUNCH_MAX_M`` rows

Attention with a learned prefix ("prefix_attention"), whose variable is PEFT_FAST_PREFIX:

    kernel      one softmax over prefix and keys: what a GPU takes in inference, and in training where flash cannot
    flash       torch's flash attention of the prefix and of the keys, merged: what a GPU takes in training
    torch       what a CPU takes: the same in full generality; on a GPU a matrix of scores, where neither can run

Ops on quantized weights take bitsandbytes' library ("torch") or ours ("kernel"); their variable is PEFT_FAST_QUANT.

Apart from attention a kernel is chosen only where a measured row says that it wins: the user's own, else one that comes
with the library (``csrc_triton.tables`` says which rows speak for what).
"""

import functools
import importlib.util
import os
import warnings
from typing import Any, NamedTuple

import torch

from ..reference_prefix_calls import flash_fails

IMPLEMENTATIONS = ("auto", "torch", "addmm", "one_launch", "split", "peft")
MIXED_IMPLEMENTATIONS = ("auto", "torch", "grouped", "one_launch", "split")
PREFIX_IMPLEMENTATIONS = ("auto", "torch", "kernel", "flash")
VARIABLE = "PEFT_FAST_LORA"
PREFIX_VARIABLE = "PEFT_FAST_PREFIX"
QUANT_IMPLEMENTATIONS = ("auto", "torch", "kernel")
QUANT_VARIABLE = "PEFT_FAST_QUANT"
ONE_LAUNCH_MAX_RANK = 128  # s of a program's rows stays in registers
ONE_LAUNCH_MAX_MR = 16384  # every program computes s: beyond this, that costs more than a second launch
MIXED_ONE_LAUNCH_MAX_M = 64  # every program holds all rows of x
PREFIX_MAX_HEAD_DIM = 256  # a program holds whole rows of q, k and v
# What a block of the kernels of prefix attention takes at most on chips without candidates of their own.
_PREFIX_SHARED_BYTES = 80 * 1024
_KERNELS = ("addmm", "one_launch", "split", "grouped")
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Choice(NamedTuple):
    """An implementation's name and the reason for taking it, for people."""

    name: str
    reason: str


class Situation(NamedTuple):
    """A line of ``peft-fast info``."""

    op: str
    situation: str
    choice: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op:<16} {self.situation:<48} {self.choice:<11} {self.reason}"

    def in_site(self) -> str:
        """A line below the name of what it is about."""
        return f"{self.op:<23}{self.situation:<35}{self.choice:<11}{self.reason}"


# os.environ's own dictionary: a look-up through os.environ encodes and decodes, which takes 1 us, and this is asked in
# every call of every layer
_ENVIRONMENT: Any = getattr(os.environ, "_data", os.environ)
_KEY: Any = os.environ.encodekey(VARIABLE) if _ENVIRONMENT is not os.environ else VARIABLE


def requested(op: str, implementation: str | None, names: tuple[str, ...] = IMPLEMENTATIONS) -> str:
    """Return what the caller or the environment asks for, one of ``names``; "auto" when neither does, or the
    environment's is none that this op has.

    Raises: ValueError on another name.
    """
    name = implementation or (_KEY in _ENVIRONMENT and os.environ[VARIABLE]) or "auto"
    if implementation is None and name not in names and name in (*IMPLEMENTATIONS, *MIXED_IMPLEMENTATIONS):
        return "auto"  # the variable forces another op
    if name not in names:
        raise ValueError(f"{op}: implementation must be one of {names}, got {name!r}")
    return name


def choose(
    op: str, device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, R: int,
    *, p: float = 0.0, implementation: str | None = None,
) -> Choice:  # fmt: skip
    """Return the implementation for one call of ``op`` on x (M, K), w (N, K), rank R, with dropout p.

    Training changes nothing: every implementation returns what the backward needs.
    Raises: ValueError on an unknown name, or when "one_launch" is forced beyond its bound; RuntimeError when a forced
    kernel cannot
        run on ``device``; TypeError when it has no version for ``dtype``.
    """
    name = requested(op, implementation)
    if name != "auto":
        if name in _KERNELS:
            _check_forced(op, name, device, dtype, M, R)
        return Choice(name, "forced by the argument" if implementation == name else f"forced by {VARIABLE}")
    if device.type != "cuda":
        return Choice("torch", f"{device.type} tensors take plain torch")
    choice = _automatic(op, device, dtype, _rows(M), N, K, _bucket(R), p > 0)
    if choice.name in _KERNELS and (failure := triton_failure(device)):
        return Choice("torch", failure)
    return choice


@functools.lru_cache(maxsize=4096)
def _automatic(
    op: str, device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, R: int, dropout: bool
) -> Choice:
    """What "auto" means on a GPU; M and R count up to the next power of two."""
    if dtype not in _KERNEL_DTYPES:
        return Choice("torch", f"no kernels for {_name(dtype)}")
    if not has_triton():
        return Choice("torch", "triton is not installed")
    if measured := _measured(op, device, dtype, M, N, K, R, dropout):
        return measured
    where = f"{_gpu(device)} at {_name(dtype)} M={M} N={N} K={K} R={R}"
    if dropout:
        return Choice(
            "addmm", f"no measured entry for {where} with dropout; the vendor's GEMMs, the mask from a kernel"
        )
    return Choice("torch", f"no measured entry for {where}; the vendor's GEMMs")


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


def forget() -> None:
    """Look the tables up again, after they have changed."""
    _automatic.cache_clear()
    _automatic_mixed.cache_clear()
    _automatic_prefix.cache_clear()
    _measured.cache_clear()


def choose_mixed(
    device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, R: int, implementation: str | None = None
) -> Choice:
    """Return the implementation of "lora_mixed" for x (M, K), w (N, K) and ranks up to R.

    Raises: ValueError on an unknown name or beyond a kernel's bound; RuntimeError where neither plain torch nor a
        kernel runs, TypeError where no kernel has a version for ``dtype``: there is no other path to fall back to.
    """
    op = "lora_mixed"
    name = requested(op, implementation, MIXED_IMPLEMENTATIONS)
    if device.type == "cpu" and name == "auto":
        return Choice("torch", "cpu tensors take plain torch")
    if name == "auto" and device.type == "cuda" and dtype in _KERNEL_DTYPES and has_triton():
        return _automatic_mixed(device, dtype, _rows(M), N, K, _bucket(R))
    if name == "torch" and device.type != "cpu":
        raise RuntimeError(
            f"{op}: implementation 'torch' would read every row's slot back from {device}: leave the argument "
            f"implementation= (or {VARIABLE}) at 'auto', or force 'grouped'"
        )
    if name != "torch":
        _check_forced(op, "grouped" if name == "auto" else name, device, dtype, M, R)
    return Choice(name, "forced by the argument" if implementation == name else f"forced by {VARIABLE}")


@functools.lru_cache(maxsize=4096)
def _automatic_mixed(device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, R: int) -> Choice:
    if measured := _measured("lora_mixed", device, dtype, M, N, K, R, False):
        return measured
    where = f"{_gpu(device)} at {_name(dtype)} M={M} N={N} K={K} R={R}"
    return Choice("grouped", f"no measured entry for {where}; the vendor's base GEMM")


def choose_prefix(
    device: torch.device, dtype: torch.dtype, D: int, implementation: str | None = None,
    *, training: bool = False, beyond_flash: str = "",
) -> Choice:  # fmt: skip
    """Return the implementation of "prefix_attention" for heads of D elements.

    Args:
        training: a gradient is wanted.
        beyond_flash: what the call has that the flash attention of ``device`` cannot express, or "".
    Raises: ValueError on an unknown name, or when a forced one is beyond its bound; RuntimeError when it cannot run on
        ``device``; TypeError when it has no version for ``dtype``.
    """
    op = "prefix_attention"
    name = implementation or os.environ.get(PREFIX_VARIABLE) or "auto"
    if name not in PREFIX_IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation must be one of {PREFIX_IMPLEMENTATIONS}, got {name!r}")
    if name == "auto":
        if device.type != "cuda":
            return Choice("torch", f"{device.type} tensors take plain torch")
        choice = _automatic_prefix(device, dtype, D, training, beyond_flash, "")
        if choice.name == "kernel" and (failure := triton_failure(device)):
            return _automatic_prefix(device, dtype, D, training, beyond_flash, failure)
        return choice
    instead = f"leave the argument implementation= (or {PREFIX_VARIABLE}) at 'auto', or force 'torch'"
    if name == "flash":
        fails = beyond_flash or (flash_fails(device, dtype, D) if device.type == "cuda" else "")
        if fails:
            raise ValueError(f"{op}: implementation 'flash' cannot run on {device}: {fails}: {instead}")
    if name == "kernel":
        _check_runs(op, name, PREFIX_VARIABLE, ", or force 'torch'", device, dtype)
        if D > PREFIX_MAX_HEAD_DIM:
            raise ValueError(
                f"{op}: implementation 'kernel' is for heads of at most {PREFIX_MAX_HEAD_DIM} elements, got {D}: "
                f"{instead}"
            )
        if device.type == "cuda" and (fails := _kernel_fails(device, dtype, D)):
            raise RuntimeError(f"{op}: implementation 'kernel' cannot run on {device}: {fails}: {instead}")
    return Choice(name, "forced by the argument" if implementation else f"forced by {PREFIX_VARIABLE}")


@functools.lru_cache(maxsize=256)
def _automatic_prefix(
    device: torch.device, dtype: torch.dtype, D: int, training: bool, beyond_flash: str, triton_fails: str
) -> Choice:
    """What "auto" means on a GPU."""
    no_flash = beyond_flash or flash_fails(device, dtype, D)
    if training and not no_flash:
        return Choice("flash", "the vendor's attention of the prefix and of the keys, merged")
    no_kernel = triton_fails or _kernel_fails(device, dtype, D)
    if not no_kernel:
        why = f"; not 'flash': {no_flash}" if training else ""
        return Choice("kernel", f"reads a prefix once for all rows that share it{why}")
    if not no_flash:
        return Choice("flash", f"not 'kernel': {no_kernel}")
    return Choice("torch", f"a matrix of scores; not 'kernel': {no_kernel}; not 'flash': {no_flash}")


def _kernel_fails(device: torch.device, dtype: torch.dtype, D: int) -> str:
    """Why the kernels of prefix attention do not run on a GPU, Triton's own failures aside, or ""."""
    if dtype not in _KERNEL_DTYPES:
        return f"no kernels for {_name(dtype)}"
    if not has_triton():
        return "triton is not installed"
    if D > PREFIX_MAX_HEAD_DIM:
        return f"no kernels for heads of {D} elements, only up to {PREFIX_MAX_HEAD_DIM}"
    chip: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        known = chip.gcnArchName.split(":")[0] == "gfx942"
        return "" if known else f"kernels are checked for gfx942 only, and this is {_gpu(device)}"
    has = chip.shared_memory_per_block_optin
    if has < _PREFIX_SHARED_BYTES:
        return f"kernels need {_PREFIX_SHARED_BYTES} bytes of shared memory in a block, and {_gpu(device)} has {has}"
    return ""


def choose_quantized(
    op: str, device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, R: int, implementation: str | None = None
) -> Choice:
    """Return the implementation of an op on a quantized weight (N, K): "torch", or "kernel".

    "torch" is bitsandbytes' own library where that is right. ops: "dequantize_4bit" (M and R are 1), and for inference
    "lora_linear_4bit", "lora_linear_mixed_4bit", "lora_linear_int8".
    Raises: ValueError on an unknown name; RuntimeError when a forced "kernel" cannot run on ``device``; TypeError when
        it has no version for ``dtype``.
    """
    asked = None if implementation == "auto" else implementation
    name = asked or os.environ.get(QUANT_VARIABLE) or "auto"
    if name not in QUANT_IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation must be one of {QUANT_IMPLEMENTATIONS}, got {name!r}")
    if name == "kernel":
        _check_runs(op, name, QUANT_VARIABLE, ", or force 'torch'", device, dtype)
    if name != "auto":
        return Choice(name, "forced by the argument" if asked else f"forced by {QUANT_VARIABLE}")
    if device.type != "cuda":
        return Choice("torch", f"{device.type} tensors take bitsandbytes' library where it is right, else plain torch")
    if has_triton() and (measured := _measured(op, device, dtype, _rows(M), N, K, _bucket(R), False)):
        return measured
    where = f"{_gpu(device)} at {_name(dtype)} M={M} N={N} K={K} R={R}"
    return Choice("torch", f"no measured entry for {where}; bitsandbytes' library")


def describe() -> list[Situation]:
    """What ``choose`` answers in typical situations on this machine's devices, for ``peft-fast info``."""
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    situations = (
        ("lora_linear", "one token", 1, functools.partial(choose, "lora_linear")),
        ("lora_linear", "2048 tokens", 2048, functools.partial(choose, "lora_linear")),
        ("lora_linear", "2048 tokens, dropout", 2048, functools.partial(choose, "lora_linear", p=0.05)),
        ("lora_mixed", "32 rows", 32, choose_mixed),
        ("lora_mixed", "2048 tokens", 2048, choose_mixed),
    )
    rows = []
    for device in devices:
        where = "cpu" if device.type == "cpu" else f"{device} {_gpu(device)}"
        for op, what, M, ask in situations:
            try:
                choice = ask(device=device, dtype=torch.bfloat16, M=M, N=4096, K=4096, R=16)
            except (RuntimeError, ValueError, TypeError) as error:
                choice = Choice("an error", str(error))
            rows.append(Situation(op, f"{where}, 4096x4096 bf16 r16, {what}", *choice))
        for what, training in (("", False), (", training", True)):
            try:
                choice = choose_prefix(device, torch.bfloat16, 128, training=training)
            except (RuntimeError, ValueError, TypeError) as error:
                choice = Choice("an error", str(error))
            rows.append(Situation("prefix_attention", f"{where}, bf16, heads of 128{what}", *choice))
        try:
            choice = choose_quantized("lora_linear_4bit", device, torch.bfloat16, 1, 4096, 4096, 16)
        except (RuntimeError, ValueError, TypeError) as error:
            choice = Choice("an error", str(error))
        rows.append(Situation("lora_linear_4bit", f"{where}, 4096x4096 bf16 r16, one token", *choice))
    return rows


def _check_forced(op: str, name: str, device: torch.device, dtype: torch.dtype, M: int, R: int) -> None:
    other, instead = ("", "grouped") if op == "lora_mixed" else (", or force 'torch'", "split")
    auto = _check_runs(op, name, VARIABLE, other, device, dtype)
    if bound := _beyond_bound(op, name, M, R):
        raise ValueError(
            f"{op}: implementation {name!r} is for {bound}, got M = {M} and R = {R}: force {instead!r}, or {auto}"
        )


def _beyond_bound(op: str, name: str, M: int, R: int) -> str:
    """The bound of an implementation that M and R are beyond, or ""."""
    if name != "one_launch":
        return ""
    if op == "lora_mixed":
        within = M <= MIXED_ONE_LAUNCH_MAX_M and R <= ONE_LAUNCH_MAX_RANK
        return "" if within else f"M <= {MIXED_ONE_LAUNCH_MAX_M} and ranks <= {ONE_LAUNCH_MAX_RANK}"
    within = R <= ONE_LAUNCH_MAX_RANK and M * R <= ONE_LAUNCH_MAX_MR
    return "" if within else f"R <= {ONE_LAUNCH_MAX_RANK} and M * R <= {ONE_LAUNCH_MAX_MR}"


def _check_runs(op: str, name: str, variable: str, other: str, device: torch.device, dtype: torch.dtype) -> str:
    """Raise where no kernel can run; return what a caller can do instead of forcing it, for other complaints."""
    forced = f"{op}: implementation {name!r}"
    instead = f"leave the argument implementation= (or {variable}) at 'auto'{other}"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"{forced} is a GPU kernel and x is on {device}: move x to a GPU; or {instead}")
    if not has_triton():
        raise RuntimeError(f"{forced} needs triton, which is not installed: pip install triton; or {instead}")
    if dtype not in _KERNEL_DTYPES:
        raise TypeError(f"{forced} has no kernel for {_name(dtype)}, only for fp16, bf16 and fp32; {instead}")
    return instead


@functools.lru_cache(maxsize=4096)
def _measured(
    op: str, device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, R: int, dropout: bool
) -> Choice | None:
    """What the row says that speaks for this; M and R count up to the next power of two."""
    from csrc_triton import tables

    what = dict(op=op, dtype=_name(dtype), dropout=dropout)
    row = tables.find(tables.CHOICES, what, tables.gpu_of(device), tables.Sizes(M, N, K, R))
    if row is None or _beyond_bound(op, row["implementation"], M, R):
        return None
    sizes = f"M up to {row['M']}, N near {row['N']}, K near {row['K']}, R near {row['R']}"
    return Choice(
        row["implementation"],
        f"measured on {row['gpu']} with triton {row['triton']}, {row['date']}, {row['commit']}, for {sizes}: "
        f"{row['gain']:.2f} times as fast as without",
    )


def _gpu(device: torch.device) -> str:
    from csrc_triton import tables

    return str(tables.gpu_of(device).name)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _bucket(R: int) -> int:
    """The power of two that a kernel rounds the rank up to, at least 16."""
    return max(16, 1 << (R - 1).bit_length())


def _rows(M: int) -> int:
    """M as the tables count it: the next power of two."""
    return 1 << max(0, M - 1).bit_length()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
