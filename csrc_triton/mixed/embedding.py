"""Shrink of a mixed batch for an embedding: planes = A_slot[:, id] for every row's own adapter, in one launch.

    ids (M,) integers   A_slot (rank, V)   planes (1, M, max_rank) fp32, for expand.py   others: table.py

A gather: nothing is summed or rounded. An id outside [0, V) gives zeros and reads nothing.
Traffic: 32 bytes (a sector) per live rank and row, + planes. arXiv:2106.09685.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import RANKS, AotCase
from ..common.launch import launch
from ..common.tuning import ARCHS, block_r, cdiv
from .table import DTYPES, adapter, block_rows

_BLOCK_M, _LARGEST_R, _WARPS = 16, 64, 4


@triton.jit
def _mixed_embedding_kernel(
    ids_ptr, blocks_ptr, order_ptr, addresses_ptr, ranks_ptr, planes_ptr,
    V, stride_pm,
    DTYPE: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program gathers up to BLOCK_M rows of one adapter."""
    slot, rank, rows, mask_m = block_rows(blocks_ptr, order_ptr, ranks_ptr, tl.program_id(0), PARTS, BLOCK_M)
    a_ptr = adapter(addresses_ptr, slot, 0, DTYPE)
    ids = tl.load(ids_ptr + rows, mask=mask_m, other=-1).to(tl.int64)
    known = (ids >= 0) & (ids < V)
    offs_r = tl.arange(0, BLOCK_R)
    for r in range(0, rank, BLOCK_R):
        mask_r = (r + offs_r < rank)[None, :]
        a_ptrs = a_ptr + (r + offs_r).to(tl.int64)[None, :] * V + ids[:, None]
        a = tl.load(a_ptrs, mask=known[:, None] & mask_r, other=0.0)  # (BLOCK_M, BLOCK_R)
        planes_ptrs = planes_ptr + rows[:, None] * stride_pm + (r + offs_r)[None, :]
        tl.store(planes_ptrs, a.to(tl.float32), mask=mask_m[:, None] & mask_r)


def mixed_embedding(
    ids: Tensor, addresses: Tensor, ranks: Tensor, dtype: torch.dtype, max_rank: int,
    order: Tensor, blocks: Tensor, rows_per_block: int, V: int,
) -> Tensor:  # fmt: skip
    """Return planes (1, M, max_rank), written for the rows in blocks and up to their ranks. Trusts its caller."""
    planes = ids.new_empty((1, ids.shape[0], max_rank), dtype=torch.float32)
    PARTS = cdiv(rows_per_block, _BLOCK_M)
    if blocks.shape[0]:
        launch(
            _mixed_embedding_kernel, (blocks.shape[0] * PARTS,), (
                ids.contiguous(), blocks, order, addresses, ranks, planes, V, planes.stride(1),
            ), dict(num_warps=_WARPS), DTYPE=DTYPES[dtype], PARTS=PARTS, BLOCK_M=_BLOCK_M,
            BLOCK_R=block_r(max_rank, _LARGEST_R),
        )  # fmt: skip
    return planes


def aot_cases() -> Iterator[AotCase]:
    """Adapters of 16 bits and of fp32, for each rank."""
    types = dict(
        ids_ptr="*i64", blocks_ptr="*i32", order_ptr="*i32", addresses_ptr="*i64", ranks_ptr="*i32",
        planes_ptr="*fp32", V="i32", stride_pm="i32",
    )  # fmt: skip
    for name in ("bf16", "fp32"):
        for BLOCK_R in sorted({min(R, _LARGEST_R) for R in RANKS}):
            constants = dict(DTYPE=tl.dtype(name), PARTS=1, BLOCK_M=_BLOCK_M, BLOCK_R=BLOCK_R)
            yield AotCase(
                kernel=_mixed_embedding_kernel,
                name="mixed_embedding",
                label=f"r{BLOCK_R}-{name}",
                archs=ARCHS,
                signature=types | dict.fromkeys(constants, "constexpr"),
                constexprs=constants,
                options=dict(num_warps=_WARPS, num_stages=2),
                matmul=False,
            )
