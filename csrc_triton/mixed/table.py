"""What the kernels of mixed batches read before their data: which rows, which adapter, where it is in memory.

    blocks    (n, 3) int32: slot, first position in order, number of rows; unused ones (-1, 0, 0). One adapter per block
    order     (M,) int32: rows of x sorted by slot            slots (M,) int32, -1: no adapter
    addresses (L, 2) int64: where A (rank, K) and B (N, rank) of a slot are, 16-byte aligned
    ranks     (L,) int32, 0: no adapter                       scales (L,) fp32

A's rows are K elements apart, B's the rank rounded up to 8: with the alignment, loads are of 16 bytes (K a multiple of
8). What fills B's rows up is read and thrown away. Rank 0 makes a program's loops empty and its masks false, so that
unused blocks need no branch.

A block's entry says all that these reads depend on: rows, rank, scale and addresses are asked for at once, also where
the rank turns out to be 0. A program so waits for memory three times: for its entry, for these, for its data.
"""

import torch
import triton
import triton.language as tl

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def block_rows(blocks_ptr, order_ptr, ranks_ptr, pid, PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(slot, rank, rows (BLOCK_M,), their mask) of one of the PARTS of a block; rank 0: no work, slot -1: no rows."""
    entry = blocks_ptr + (pid // PARTS) * 3
    done = pid % PARTS * BLOCK_M
    slot, first, count = tl.load(entry), tl.load(entry + 1) + done, tl.load(entry + 2) - done
    slot = tl.where(count > 0, slot, -1)
    rank = tl.load(ranks_ptr + slot, mask=slot >= 0, other=0)
    offs = tl.arange(0, BLOCK_M)
    rows = tl.load(order_ptr + first + offs, mask=offs < count, other=0).to(tl.int64)
    return slot, rank, rows, offs < tl.where(rank > 0, count, 0)


@triton.jit
def adapter(addresses_ptr, slot, WHICH: tl.constexpr, DTYPE: tl.constexpr):
    """Pointer to A (WHICH 0) or B (WHICH 1) of a slot; not to be followed where the rank is 0."""
    address = tl.load(addresses_ptr + slot * 2 + WHICH, mask=slot >= 0, other=0)
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def padded(rank):
    """Elements between the rows of B."""
    return tl.multiple_of((rank + 7) // 8 * 8, 8)


@triton.jit
def load_b(b_ptrs, offs_r, rank, stride_bn, mask_n):
    """A tile of B.T (BLOCK_R, BLOCK_N), 0 beyond the rank. The load's own mask keeps 16 bytes together."""
    b = tl.load(b_ptrs, mask=(offs_r < stride_bn)[:, None] & mask_n[None, :], other=0.0)
    return tl.where((offs_r < rank)[:, None], b, tl.zeros_like(b))


@triton.jit
def load_s(planes_ptrs, mask_m, offs_r, rank, stride_bn, P, stride_pp, scale, DTYPE: tl.constexpr):
    """scale * (planes[0] + planes[1] + ...) in this fixed order, rounded once; (BLOCK_M, BLOCK_R), 0 where masked."""
    mask = mask_m[:, None] & (offs_r < stride_bn)[None, :]
    total = tl.load(planes_ptrs, mask=mask, other=0.0)
    for _ in range(1, P):
        planes_ptrs += stride_pp
        total += tl.load(planes_ptrs, mask=mask, other=0.0)
    return tl.where((offs_r < rank)[None, :], total * scale, 0.0).to(DTYPE)
