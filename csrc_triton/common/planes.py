"""Sum of partial results in a fixed order, hence deterministic: out = scale * (planes[0] + planes[1] + ...).

fp32, one rounding.

    planes (P, rows, cols) fp32, cols contiguous      out (rows, cols), cols contiguous

Traffic: P * rows * cols * 4 bytes + the output.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .launch import launch
from .tuning import ARCHS, cdiv

_BLOCK, _WARPS = 512, 4


@triton.jit
def _sum_planes_kernel(
    planes_ptr, out_ptr, scale, P, rows, cols, stride_pp, stride_pr, stride_or, BLOCK: tl.constexpr
):  # fmt: skip
    """One program sums BLOCK elements over all planes."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, col = offs // cols, offs % cols
    mask = row < rows
    ptrs = planes_ptr + row * stride_pr + col
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(P):
        acc += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += stride_pp
    out = acc * tl.cast(scale, tl.float32)
    tl.store(out_ptr + row * stride_or + col, out.to(out_ptr.dtype.element_ty), mask=mask)


def sum_planes(planes: Tensor, out: Tensor, scale: float) -> Tensor:
    """out (rows, cols) = scale * planes (P, rows, cols).sum(0); returns out."""
    P, rows, cols = planes.shape
    if out.numel() == 0:
        return out
    launch(
        _sum_planes_kernel, (cdiv(rows * cols, _BLOCK),), (
            planes, out, scale, P, rows, cols, planes.stride(0), planes.stride(1), out.stride(0),
        ), dict(num_warps=_WARPS), BLOCK=_BLOCK,
    )  # fmt: skip
    return out


def aot_cases() -> Iterator[AotCase]:
    """The kernel to bf16 (s, ds) and to fp32 (da, db)."""
    for out in ("bf16", "fp32"):
        yield AotCase(
            kernel=_sum_planes_kernel,
            name="sum_planes",
            label=f"to-{out}",
            archs=ARCHS,
            signature=dict(
                planes_ptr="*fp32", out_ptr=f"*{out}", scale="fp32", P="i32", rows="i32", cols="i32",
                stride_pp="i64", stride_pr="i32", stride_or="i32", BLOCK="constexpr",
            ),
            constexprs=dict(BLOCK=_BLOCK),
            options=dict(num_warps=_WARPS, num_stages=2),
            matmul=False,
        )  # fmt: skip
