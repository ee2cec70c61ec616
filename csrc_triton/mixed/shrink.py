"""Shrink of a mixed batch: planes = x @ A_slot.T for every row's own adapter, in one launch.

    x (M, K)   planes (P, M, max_rank) fp32: s of each part of K, columns up to the row's rank   others: table.py

    planes[p, m, r] = sum_k x[m, k] * A[slot[m]][r, k] over the k of part p

One program takes rows of one adapter (a block, gathered through ``order``) and one part of K; where few rows cannot
fill the GPU, K has several parts. The reader adds the planes in a fixed order and scales (no atomics). What is not
asked for is not written: rows without an adapter, columns beyond the rank. A row's s depends on x's row and its
adapter only. Accumulates in fp32; A of another dtype is converted in the load.
Traffic: M*K + sum of the live ranks * K elements + planes. arXiv:2106.09685; grouped as in Punica, arXiv:2310.18547.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase, case, ranks, x_type
from ..common.launch import launch
from ..common.tuning import ALWAYS, ARCHS, CUDA, SMALL, Candidate, block_r, candidates, cdiv, config_for
from .table import DTYPES, adapter, block_rows

# PROGRAMS: how many programs to aim at when K is split. LARGEST_R: ranks beyond it take several passes over x's rows.
CANDIDATES = candidates("mixed_shrink", [
    Candidate(dict(BLOCK_M=16, BLOCK_K=128, LARGEST_R=32, PROGRAMS=256), 4, 3, CUDA, default_to=512),
    Candidate(dict(BLOCK_M=16, BLOCK_K=256, LARGEST_R=16, PROGRAMS=512), 8, 3, CUDA),
    Candidate(dict(BLOCK_M=64, BLOCK_K=64, LARGEST_R=32, PROGRAMS=256), 4, 3, CUDA, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_K=64, LARGEST_R=32, PROGRAMS=256), 4, 2, SMALL, default_to=512),
    Candidate(dict(BLOCK_M=32, BLOCK_K=64, LARGEST_R=32, PROGRAMS=256), 4, 2, SMALL, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_K=32, LARGEST_R=32, PROGRAMS=256), 8, 2, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip


@triton.jit
def _mixed_shrink_kernel(
    x_ptr, blocks_ptr, order_ptr, addresses_ptr, ranks_ptr, planes_ptr,
    K, k_per_program, stride_xm, stride_xk, stride_pp, stride_pm,
    DTYPE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program sums k_per_program columns of x for up to BLOCK_M rows of one adapter, BLOCK_R ranks at a time."""
    pid_k = tl.program_id(1)
    slot, rank, rows, mask_m = block_rows(blocks_ptr, order_ptr, ranks_ptr, tl.program_id(0), PARTS, BLOCK_M)
    a_ptr = adapter(addresses_ptr, slot, 0, DTYPE)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    first = pid_k * k_per_program
    columns = (first + offs_k).to(tl.int64)
    planes_ptrs = planes_ptr + pid_k.to(tl.int64) * stride_pp + rows[:, None] * stride_pm + offs_r[None, :]

    for r in range(0, rank, BLOCK_R):
        mask_r = (r + offs_r < rank)[None, :]
        x_ptrs = x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xk
        a_ptrs = a_ptr + columns[:, None] + (r + offs_r).to(tl.int64)[None, :] * K
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k in range(first, min(first + k_per_program, K), BLOCK_K):
            mask_k = k + offs_k < K
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
            a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r, other=0.0).to(x.dtype)  # (BLOCK_K, BLOCK_R)
            acc = tl.dot(x, a, acc, input_precision="ieee")
            x_ptrs += BLOCK_K * stride_xk
            a_ptrs += BLOCK_K
        tl.store(planes_ptrs + r, acc, mask=mask_m[:, None] & mask_r)


def mixed_shrink(
    x: Tensor, addresses: Tensor, ranks: Tensor, dtype: torch.dtype, max_rank: int,
    order: Tensor, blocks: Tensor, rows_per_block: int,
) -> Tensor:  # fmt: skip
    """Return planes (P, M, max_rank), written for the rows in blocks and up to their ranks. Trusts its caller."""
    M, K = x.shape
    config = config_for("mixed_shrink", x, M, 0, K, max_rank)
    BLOCK_M, BLOCK_K, BLOCK_R = config["BLOCK_M"], config["BLOCK_K"], block_r(max_rank, config["LARGEST_R"])
    PARTS = cdiv(rows_per_block, BLOCK_M)
    steps = cdiv(K, BLOCK_K)
    # at least two steps per part: a plane has to be worth its traffic
    splits = max(1, min(steps // 2, config["PROGRAMS"] // max(blocks.shape[0] * PARTS, 1)))
    steps_per_program = max(1, cdiv(steps, splits))
    splits = max(1, cdiv(steps, steps_per_program))
    planes = x.new_empty((splits, M, max_rank), dtype=torch.float32)
    if blocks.shape[0]:
        launch(
            _mixed_shrink_kernel, (blocks.shape[0] * PARTS, splits), (
                x, blocks, order, addresses, ranks, planes, K, steps_per_program * BLOCK_K,
                *x.stride(), planes.stride(0), planes.stride(1),
            ), config, DTYPE=DTYPES[dtype], PARTS=PARTS, BLOCK_R=BLOCK_R,
        )  # fmt: skip
    return planes


def aot_cases() -> Iterator[AotCase]:
    """Every candidate for each rank, with adapters of x's dtype and of fp32."""
    for candidate in CANDIDATES:
        x = x_type(candidate)
        types = dict(
            x_ptr=x, blocks_ptr="*i32", order_ptr="*i32", addresses_ptr="*i64", ranks_ptr="*i32", planes_ptr="*fp32",
            K="i32", k_per_program="i32", stride_xm="i32", stride_pp="i32", stride_pm="i32",
        )  # fmt: skip
        for BLOCK_R in ranks(candidate):
            for name in dict.fromkeys((x[1:], "fp32")):
                constants = dict(BLOCK_R=BLOCK_R, DTYPE=tl.dtype(name), PARTS=1, stride_xk=1)
                yield case(_mixed_shrink_kernel, "mixed_shrink", f"r{BLOCK_R}-{name}", candidate, types, **constants)
