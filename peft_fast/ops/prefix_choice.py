"""Which implementation attention with a learned prefix takes, and why: argument, environment variable, then what the
call and the GPU allow. flash where a gradient is wanted and it can express the call, the kernels otherwise; a matrix of
scores where neither can run.
"""

import functools
from typing import Any

import torch

from ..reference.prefix_calls import flash_fails
from .choice import Choice, check_kernel, forced, gpu_name, kernels_lack, requested, triton_failure
from .operators import OPERATORS

MAX_HEAD_DIM = 256  # a program holds whole rows of q, k and v
# What a block of the kernels takes at most on chips without candidates of their own.
_SHARED_BYTES = 80 * 1024
_OP = OPERATORS["prefix_attention"]


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
    name = requested(_OP.name, implementation)
    if name != "auto":
        _check_runs(name, device, dtype, D, beyond_flash)
        return forced(_OP, name, implementation)
    if device.type != "cuda":
        return Choice("torch", f"{device.type} tensors {_OP.elsewhere}")
    choice = _automatic(device, dtype, D, training, beyond_flash, "")
    if choice.name == "kernel" and (failure := triton_failure(device)):
        return _automatic(device, dtype, D, training, beyond_flash, failure)
    return choice


def forget() -> None:
    """Ask again what runs, after what is installed has changed."""
    _automatic.cache_clear()


@functools.lru_cache(maxsize=256)
def _automatic(
    device: torch.device, dtype: torch.dtype, D: int, training: bool, beyond_flash: str, triton_fails: str
) -> Choice:
    """What "auto" means on a GPU."""
    no_flash = beyond_flash or flash_fails(device, dtype, D)
    if training and not no_flash:
        return Choice("flash", "the vendor's attention of the prefix and of the keys, merged")
    no_kernel = triton_fails or _kernel_fails(device, dtype, D)
    if not no_kernel:
        why = f"; not 'flash': {no_flash}" if training else ""
        return Choice("kernel", f"{_OP.gpu.reason}{why}")
    if not no_flash:
        return Choice("flash", f"not 'kernel': {no_kernel}")
    return Choice("torch", f"a matrix of scores; not 'kernel': {no_kernel}; not 'flash': {no_flash}")


def _check_runs(name: str, device: torch.device, dtype: torch.dtype, D: int, beyond_flash: str) -> None:
    instead = f"leave the argument implementation= (or {_OP.variable}) at 'auto', or force 'torch'"
    if name == "flash":
        fails = beyond_flash or (flash_fails(device, dtype, D) if device.type == "cuda" else "")
        if fails:
            raise ValueError(f"{_OP.name}: implementation 'flash' cannot run on {device}: {fails}: {instead}")
    if name == "kernel":
        check_kernel(_OP, name, device, dtype)
        if D > MAX_HEAD_DIM:
            raise ValueError(
                f"{_OP.name}: implementation 'kernel' is for heads of at most {MAX_HEAD_DIM} elements, got {D}: "
                f"{instead}"
            )
        if device.type == "cuda" and (fails := _kernel_fails(device, dtype, D)):
            raise RuntimeError(f"{_OP.name}: implementation 'kernel' cannot run on {device}: {fails}: {instead}")


def _kernel_fails(device: torch.device, dtype: torch.dtype, D: int) -> str:
    """Why the kernels do not run on a GPU, Triton's own failures aside, or ""."""
    if lacks := kernels_lack(dtype):
        return lacks
    if D > MAX_HEAD_DIM:
        return f"no kernels for heads of {D} elements, only up to {MAX_HEAD_DIM}"
    chip: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        known = chip.gcnArchName.split(":")[0] == "gfx942"
        return "" if known else f"kernels are checked for gfx942 only, and this is {gpu_name(device)}"
    has = chip.shared_memory_per_block_optin
    if has < _SHARED_BYTES:
        return f"kernels need {_SHARED_BYTES} bytes of shared memory in a block, and {gpu_name(device)} has {has}"
    return ""
