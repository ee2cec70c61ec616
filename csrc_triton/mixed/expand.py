"""Expand of a mixed batch: y += s @ B_slot.T in place for every row's own adapter, in one launch.

    planes (P, M, max_rank) fp32 of shrink.py or embedding.py    y (M, N)    others: table.py

    s[m] = scales[slot[m]] * sum_p planes[p, m]      y[m] += B[slot[m]] @ s[m]

One program takes rows of one adapter and BLOCK_N columns of y; rows without an adapter are not touched. The planes are
added in a fixed order; s is rounded to the dtype of x before it meets B. Accumulates in fp32; one rounding of y.
Traffic: 2*M*N + sum of the live ranks * N elements + planes. arXiv:2106.09685.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase, case, ranks as aot_ranks, x_type
from ..common.launch import launch
from ..common.tuning import ALWAYS, ARCHS, CUDA, HOPPER, SMALL, Candidate, block_r, candidates, cdiv, config_for
from .table import DTYPES, adapter, block_rows, load_b, load_s, padded

CANDIDATES = candidates("mixed_expand", [
    Candidate(dict(BLOCK_M=16, BLOCK_N=128, LARGEST_R=32), 8, 2, CUDA, default_to=512),
    Candidate(dict(BLOCK_M=16, BLOCK_N=64, LARGEST_R=32), 8, 2, HOPPER),
    Candidate(dict(BLOCK_M=64, BLOCK_N=128, LARGEST_R=32), 8, 2, ("sm_80", "sm_90"), default_to=ALWAYS),
    Candidate(dict(BLOCK_M=64, BLOCK_N=64, LARGEST_R=32), 8, 2, ("sm_100",), default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=64, LARGEST_R=32), 4, 2, SMALL, default_to=512),
    Candidate(dict(BLOCK_M=64, BLOCK_N=64, LARGEST_R=32), 4, 2, SMALL, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=64, LARGEST_R=32), 4, 2, ARCHS, 4, default_to=512),
    Candidate(dict(BLOCK_M=64, BLOCK_N=64, LARGEST_R=16), 8, 2, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip


@triton.jit(do_not_specialize=["P"])
def _mixed_expand_kernel(
    planes_ptr, blocks_ptr, order_ptr, addresses_ptr, ranks_ptr, scales_ptr, y_ptr,
    P, N, stride_pp, stride_pm, stride_ym,
    DTYPE: tl.constexpr, X_DTYPE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program adds to up to BLOCK_M rows of one adapter, BLOCK_N columns."""
    slot, rank, rows, mask_m = block_rows(blocks_ptr, order_ptr, ranks_ptr, tl.program_id(0), PARTS, BLOCK_M)
    b_ptr, stride_bn = adapter(addresses_ptr, slot, 1, DTYPE), padded(rank)
    scale = tl.load(scales_ptr + slot, mask=slot >= 0, other=0.0)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    planes_ptrs = planes_ptr + rows[:, None] * stride_pm + offs_r[None, :]
    b_ptrs = b_ptr + offs_r[:, None] + offs_n[None, :] * stride_bn
    y_ptrs = y_ptr + rows[:, None] * stride_ym + offs_n[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    y = tl.load(y_ptrs, mask=mask_y, other=0.0)  # before the products, so that all data is waited for at once

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, rank, BLOCK_R):
        # (BLOCK_M, BLOCK_R) and (BLOCK_R, BLOCK_N)
        s = load_s(planes_ptrs + r, mask_m, r + offs_r, rank, stride_bn, P, stride_pp, scale, X_DTYPE)
        b = load_b(b_ptrs + r, r + offs_r, rank, stride_bn, mask_n).to(X_DTYPE)
        acc = tl.dot(s, b, acc, input_precision="ieee")
    tl.store(y_ptrs, (acc + y.to(tl.float32)).to(y_ptr.dtype.element_ty), mask=mask_y)


def mixed_expand(
    planes: Tensor, addresses: Tensor, ranks: Tensor, scales: Tensor, dtype: torch.dtype, x_dtype: torch.dtype,
    order: Tensor, blocks: Tensor, rows_per_block: int, y: Tensor,
) -> Tensor:  # fmt: skip
    """Update y (M, N), rows contiguous, in place and return it. Trusts its caller."""
    (P, M, max_rank), N = planes.shape, y.shape[1]
    if y.numel() == 0 or blocks.shape[0] == 0:
        return y
    config = config_for("mixed_expand", y.new_empty(0, dtype=x_dtype), M, N, 0, max_rank)
    BLOCK_R, PARTS = block_r(max_rank, config["LARGEST_R"]), cdiv(rows_per_block, config["BLOCK_M"])
    launch(
        _mixed_expand_kernel, (blocks.shape[0] * PARTS, cdiv(N, config["BLOCK_N"])), (
            planes, blocks, order, addresses, ranks, scales, y, P, N, planes.stride(0), planes.stride(1), y.stride(0),
        ), config, DTYPE=DTYPES[dtype], X_DTYPE=DTYPES[x_dtype], PARTS=PARTS, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    return y


def aot_cases() -> Iterator[AotCase]:
    """Every candidate for each rank, with adapters of x's dtype and of fp32."""
    for candidate in CANDIDATES:
        x = x_type(candidate)
        types = dict(
            planes_ptr="*fp32", blocks_ptr="*i32", order_ptr="*i32", addresses_ptr="*i64", ranks_ptr="*i32",
            scales_ptr="*fp32", y_ptr=x, P="i32", N="i32", stride_pp="i32", stride_pm="i32", stride_ym="i32",
        )  # fmt: skip
        for BLOCK_R in aot_ranks(candidate):
            for name in dict.fromkeys((x[1:], "fp32")):
                dtypes = dict(DTYPE=tl.dtype(name), X_DTYPE=tl.dtype(x[1:]))
                constants = dict(BLOCK_R=BLOCK_R, PARTS=1, **dtypes)
                yield case(_mixed_expand_kernel, "mixed_expand", f"r{BLOCK_R}-{name}", candidate, types, **constants)
