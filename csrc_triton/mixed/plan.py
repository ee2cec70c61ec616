"""The plan of a mixed batch, in one launch of one program: rows sorted by slot, and their blocks. M <= 1024.

    slots (M,) integers   known (M,), order (M,), blocks (n, 3) int32: table.py   counters (sites, 4) int32, set to 0

    known[m] = slots[m] if 0 <= slots[m] < capacity else -1
    order: the rows by known, -1 last, rows of one slot in their order

A row's place is the number of rows before it, counted: M * M comparisons, which for the rows of a decode step is
nothing beside a launch, and depends on no timing. What follows looks at the sorted rows: a block begins where the slot
changes, and after every ROWS rows of one slot; it ends before the next. The order passes through memory, and a barrier.
Traffic: slots, known, order and blocks, a few times from the caches.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase
from ..common.launch import launch
from ..common.tuning import ARCHS, cdiv

_SIZES = {64: (64, 4), 256: (32, 4), 1024: (16, 8)}  # rows of a program: CHUNK, warps


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _known(slots_ptr, offs, M, capacity, stride_s):
    """The slots of rows, -1 for none and beyond M. Compared before they are narrowed, which would wrap large ones."""
    slots = tl.load(slots_ptr + offs * stride_s, mask=offs < M, other=-1).to(tl.int64)
    return tl.where((slots >= 0) & (slots < capacity), slots, -1).to(tl.int32)


@triton.jit
def _slot_at(known_ptr, order_ptr, position, M):
    """The slots of sorted rows, -1 outside of them."""
    mask = (position >= 0) & (position < M)
    row = tl.load(order_ptr + position, mask=mask, other=0)
    return tl.load(known_ptr + row, mask=mask, other=-1)


@triton.jit(do_not_specialize=["M", "capacity", "n_blocks", "n_counters"])
def _mixed_plan_kernel(
    slots_ptr, known_ptr, order_ptr, blocks_ptr, counters_ptr,
    M, capacity, n_blocks, n_counters, stride_s,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The one program; it has all rows, BLOCK of them at most."""
    offs = tl.arange(0, BLOCK)
    mask = offs < M
    known = _known(slots_ptr, offs, M, capacity, stride_s)
    tl.store(known_ptr + offs, known, mask=mask)
    place = tl.where(known < 0, capacity, known) * BLOCK + offs  # no two are equal
    position = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, M, CHUNK):
        others = first + tl.arange(0, CHUNK)
        other = _known(slots_ptr, others, M, capacity, stride_s)
        other = tl.where(other < 0, capacity, other) * BLOCK + others  # those beyond M come after all rows
        position += tl.sum((other[:, None] < place[None, :]).to(tl.int32), axis=0)  # over registers
    tl.store(order_ptr + position, offs, mask=mask)
    tl.debug_barrier()

    slot = _slot_at(known_ptr, order_ptr, offs, M)
    starts = slot != _slot_at(known_ptr, order_ptr, offs - 1, M)
    within = (offs - tl.associative_scan(tl.where(starts, offs, 0), 0, _larger)) % ROWS
    begins = (slot >= 0) & (within == 0)
    ends = (slot >= 0) & ((within == ROWS - 1) | (slot != _slot_at(known_ptr, order_ptr, offs + 1, M)))
    entry = blocks_ptr + (tl.cumsum(begins.to(tl.int32), axis=0) - 1) * 3
    tl.store(entry, slot, mask=begins)
    tl.store(entry + 1, offs, mask=begins)
    tl.store(entry + 2, within + 1, mask=ends)
    used = tl.sum(begins.to(tl.int32), axis=0)
    for first in range(0, n_blocks, BLOCK):
        block = first + offs
        unused = (block >= used) & (block < n_blocks)
        tl.store(blocks_ptr + block * 3, tl.full((BLOCK,), -1, tl.int32), mask=unused)
        tl.store(blocks_ptr + block * 3 + 1, tl.zeros((BLOCK,), tl.int32), mask=unused)
        tl.store(blocks_ptr + block * 3 + 2, tl.zeros((BLOCK,), tl.int32), mask=unused)
    for first in range(0, n_counters, BLOCK):
        tl.store(counters_ptr + first + offs, tl.zeros((BLOCK,), tl.int32), mask=first + offs < n_counters)


def mixed_plan(
    slots: Tensor, capacity: int, sites: int, block_rows: int, implementation: str = "kernel"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return known, order, blocks and counters; 0 < M <= 1024 and capacity <= 2^20. Trusts its caller."""
    M = slots.shape[0]
    n_blocks = cdiv(M, block_rows) + min(M, max(capacity, 1))
    known, order, blocks, counters = (
        slots.new_empty(shape, dtype=torch.int32) for shape in ((M,), (M,), (n_blocks, 3), (sites, 4))
    )
    BLOCK = next(size for size in _SIZES if M <= size)
    CHUNK, warps = _SIZES[BLOCK]
    launch(
        _mixed_plan_kernel, (1,), (
            slots, known, order, blocks, counters, M, capacity, n_blocks, sites * 4, slots.stride(0),
        ), dict(num_warps=warps), ROWS=block_rows, BLOCK=BLOCK, CHUNK=CHUNK,
    )  # fmt: skip
    return known, order, blocks, counters


def aot_cases() -> Iterator[AotCase]:
    """Every size, for slot ids as the library and as users have them."""
    for BLOCK, (CHUNK, warps) in _SIZES.items():
        for name in ("i32", "i64"):
            constants = dict(stride_s=1, ROWS=16 if BLOCK <= 512 else 64, BLOCK=BLOCK, CHUNK=CHUNK)
            types = dict(slots_ptr=f"*{name}", known_ptr="*i32", order_ptr="*i32", blocks_ptr="*i32",
                         counters_ptr="*i32", M="i32", capacity="i32", n_blocks="i32", n_counters="i32")  # fmt: skip
            yield AotCase(
                kernel=_mixed_plan_kernel,
                name="mixed_plan",
                label=f"{BLOCK}-{name}",
                archs=ARCHS,
                signature=types | dict.fromkeys(constants, "constexpr"),
                constexprs=constants,
                options=dict(num_warps=warps, num_stages=2),
                matmul=False,
            )
