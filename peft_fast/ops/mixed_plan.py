"""Which adapter each row takes, and the rows of each adapter in blocks: the input of kernels for mixed batches."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._register import register
from .choice import triton_failure


class MixedSite(NamedTuple):
    """One LoRA site's adapters: a table of L slots, on x's device.

    addresses: (L, 2) int64, where A and B of each slot are in memory, 16-byte aligned; 0 where the rank is 0.
        A is (rank, K) contiguous; B is (N, rank), its rows the rank rounded up to a multiple of 8 elements apart.
    ranks: (L,) int32, 0: no adapter here. scales: (L,) fp32.
    dtype: of every A and B; it may differ from x's. max_rank: a power of two >= 16, no rank is larger.
    index: the site's number, its row of ``MixedPlan.counters``.
    """

    addresses: Tensor
    ranks: Tensor
    scales: Tensor
    dtype: torch.dtype
    max_rank: int
    index: int  # type: ignore[assignment]  # tuple.index is of no use here


class MixedPlan(NamedTuple):
    """What all sites share in one forward over M rows; see ``mixed_plan``.

    slots: (M,) int32, any value; outside [0, L): no adapter.
    order: (M,) int32, the rows sorted by slot, those without an adapter last; rows of one slot keep their order.
    blocks: (n, 3) int32: slot, first position in order, number of rows <= block_rows; unused ones are (-1, 0, 0).
    counters: (sites, 4) int32, zero whenever no kernel runs. block_rows: rows in a full block.
    """

    slots: Tensor
    order: Tensor
    blocks: Tensor
    counters: Tensor
    block_rows: int


def mixed_plan(slots: Tensor, capacity: int, sites: int) -> MixedPlan:
    """Sort the rows of a batch by adapter: on a GPU in one launch for up to 1024 rows, else with torch's operators.

    All shapes depend on M, capacity and sites only, and nothing is read back from the device: one compiled or captured
    graph serves every content of slots.

    Args:
        slots: (M,) integer. capacity: L, how many slots the sites' tables have. sites: how many sites there are.
    Raises: ValueError when slots is not a vector; TypeError when it holds no integers.
    """
    if slots.ndim != 1:
        raise ValueError(f"mixed_plan: slots must be (M,), one slot per row of x, got {tuple(slots.shape)}")
    if slots.dtype.is_floating_point or slots.dtype.is_complex or slots.dtype == torch.bool:
        raise TypeError(f"mixed_plan: slots must be integers, got {slots.dtype}")
    rows = 16 if slots.shape[0] <= 512 else 64
    if slots.is_cuda:
        known, order, blocks, counters = _plan(slots, capacity, sites, rows, "auto")
    else:
        known, order, blocks, counters = _on_torch(slots, capacity, sites, rows)
    return MixedPlan(known, order, blocks, counters, rows)


def _on_torch(slots: Tensor, capacity: int, sites: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """slots, order, blocks and counters of the plan."""
    M, device = slots.shape[0], slots.device
    slots = slots.to(torch.int64)  # -1 is no uint8, and narrowing first would wrap a large id into a valid one
    slots = torch.where((slots >= 0) & (slots < capacity), slots, -1).to(torch.int32)
    capacity = max(capacity, 1)
    key, order = torch.sort(torch.where(slots < 0, capacity, slots), stable=True)
    starts = torch.searchsorted(key, torch.arange(capacity + 1, dtype=torch.int32, device=device))
    ends = ((starts.diff() + rows - 1) // rows).cumsum(0)  # blocks of a slot and of those before it
    block = torch.arange((M + rows - 1) // rows + min(M, capacity), device=device)
    slot = torch.searchsorted(ends, block, right=True)
    used, known = slot < capacity, slot.clamp(max=capacity - 1)
    first = starts[known] + (block - torch.where(slot > 0, ends[(known - 1).clamp(min=0)], 0)) * rows
    size = (starts[known + 1] - first).clamp(max=rows)
    columns = torch.where(used, slot, -1), torch.where(used, first, 0), torch.where(used, size, 0)
    blocks = torch.stack(columns, dim=1).to(torch.int32)
    counters = torch.zeros((sites, 4), dtype=torch.int32, device=device)
    return slots, order.to(torch.int32), blocks, counters


def _fake(slots: Tensor, capacity: int, sites: int, rows: int, implementation: str) -> tuple[Tensor, ...]:
    M = slots.shape[0]
    shapes = (M,), (M,), ((M + rows - 1) // rows + min(M, max(capacity, 1)), 3), (sites, 4)
    return tuple(slots.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _resolve(slots: Tensor, capacity: int, sites: int, rows: int, implementation: str) -> str:
    if implementation != "auto":
        return implementation
    fits = 0 < slots.shape[0] <= 1024 and capacity <= 1 << 20
    return "kernel" if fits and slots.is_cuda and not triton_failure(slots.device) else "torch"


_plan = register(
    "mixed_plan(Tensor slots, int capacity, int sites, int block_rows, str implementation) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    kernel="csrc_triton.mixed.plan:mixed_plan",
    reference=_on_torch,
    fake=_fake,
    resolve=_resolve,
)
