"""What this CPU is fast at, measured once: the reference's products follow from it."""

import functools
import time

import torch

# A CPU is slow at a 16-bit dtype if a product takes this many times as long as in fp32. Those with units for it take
# less than half of fp32's time, the others 7 to 17 times as long: no noise moves a CPU from one kind to the other.
_SLOW = 2.5
_REPEATS = 5


def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether low-rank products in ``dtype`` (bf16 or fp16) are better made in fp32: 2 milliseconds, at the first call.

    A CPU without AVX512-BF16 or AMX emulates bf16. In a compiled graph the answer is a constant.
    """
    return _is_slow(dtype)


# What torch.compiler.assume_constant_result sets. To call that imports the compiler, which takes a second.
slow_on_cpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _is_slow(dtype: torch.dtype) -> bool:
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    return _seconds(dtype) > _SLOW * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """Of one product with a low-rank matrix, the fastest of a few."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, a = (torch.ones(rows, 512, dtype=dtype) for rows in (256, 16))
        times = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            torch.nn.functional.linear(x, a)
            times.append(time.perf_counter() - start)
    return min(times)


def describe() -> str:
    """The instruction set that torch sees, and how the two 16-bit dtypes are taken, for people."""
    how = {dtype: "in fp32" if slow_on_cpu(dtype) else "natively" for dtype in (torch.bfloat16, torch.float16)}
    return (
        f"{torch.backends.cpu.get_cpu_capability()}, low-rank products of bf16 {how[torch.bfloat16]}, "
        f"of fp16 {how[torch.float16]}"
    )
