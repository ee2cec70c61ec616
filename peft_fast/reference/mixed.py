"""The specification of a batch that mixes adapters, in plain torch: the tests' oracle and the CPU implementation.

    x (M, K)   y (M, N) the base's output   slots (M,) which adapter each row takes, outside [0, L): none
    A_slot (r, K) contiguous, B_slot (N, r) with rows ``padded(r)`` elements apart, any float dtype, r differs by slot

    y[m] += scales[slot] * B_slot @ (A_slot @ x[m]),  slot = slots[m]

``lora_mixed`` does it for rows that are grouped already; the op's functions group them, reading the tables on the host.
Hu et al. 2021, arXiv:2106.09685.
"""

import ctypes
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu import slow_on_cpu

Group = tuple[slice, Tensor, Tensor, float]
FewGroup = tuple[slice, npt.NDArray[Any], npt.NDArray[Any], float]
# Up to this many rows to an adapter, on average, the products are numpy's, in fp32: see ``add_few``.
_FEW_ROWS = 16
# and up to this many 16-bit rows torch's in fp32: 2 times faster at 32 rows, equal from 64 (one thread, r 4 to 64).
_FEW_NARROW_ROWS = 32


def padded(rank: int) -> int:
    """Elements between the rows of B: the rank, rounded up so that rows start at 16 bytes."""
    return (rank + 7) // 8 * 8


def lora_mixed(y: Tensor, x: Tensor, groups: Sequence[Group], order: Tensor | None = None) -> Tensor:
    """Return y (M, N) + scaling * x[rows] @ a.T @ b.T in the rows of each group (rows, a, b, scaling).

    rows is a slice of the rows of x and y, or of ``order``, the numbers of their rows, each at most once. No row is in
    two groups. Differentiable in y, x, a and b; where no gradient is asked for, y itself is updated and returned.
    """
    if not groups:
        return y
    few = few_rows(x, len(groups))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *(t for g in groups for t in g[1:3]))):
        return _with_gradients(y, x.float() if x.element_size() == 2 and (few or _slow(x)) else x, groups, order)
    if few:
        return add_few(y, x, [(rows, as_array(a), as_array(b), scaling) for rows, a, b, scaling in groups], order)
    if x.is_cpu and x.element_size() == 2 and (x.shape[0] <= _FEW_NARROW_ROWS * len(groups) or _slow(x)):
        return y.copy_(lora_mixed(y.float(), x.float(), groups, order))
    if order is None:
        return _add_groups(y, x, groups)
    order = order.to(x.device)
    return y.index_copy_(0, order, _add_groups(y[order], x[order], groups))


def few_rows(x: Tensor, groups: int) -> bool:
    """Whether so few rows of x (M, K) share an adapter that ``add_few`` is faster."""
    return x.is_cpu and x.shape[0] <= _FEW_ROWS * groups


def _slow(x: Tensor) -> bool:
    return x.is_cpu and slow_on_cpu(x.dtype)


def add_few(y: Tensor, x: Tensor, groups: Iterable[FewGroup], order: Tensor | None = None) -> Tensor:
    """``lora_mixed`` for few rows to a group, without gradients, by numpy: a call costs a third of torch's, and its
    BLAS reads a matrix faster that is used for a few rows only (one thread, r 4 to 64, K and N 512 to 1408, from
    memory: one row 11 us instead of 18, four rows 16 instead of 26, 32 rows 68 instead of 63).
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    target = y if y.dtype == wide else y.to(wide)
    out, rows_in = target.numpy(), x.to(wide).numpy()
    rows_out = out
    if order is not None:
        at = order.numpy()
        rows_in = rows_in[at]
        rows_out = np.zeros((len(at), out.shape[1]), out.dtype)
    for rows, a, b, scaling in groups:
        start, stop = rows.start, rows.stop
        if stop - start == 1:
            s = a.dot(rows_in[start])
            s *= scaling
            rows_out[start] += b.dot(s)
        else:
            s = a.dot(rows_in[start:stop].T)
            s *= scaling
            rows_out[start:stop] += b.dot(s).T
    if order is not None:
        out[at] += rows_out
    return y if target is y else y.copy_(target)


def as_array(matrix: Tensor) -> npt.NDArray[Any]:
    """A matrix for ``add_few``: a view, or a copy in fp32 of 16 bits."""
    matrix = matrix.detach()
    return (matrix if matrix.dtype.itemsize >= 4 else matrix.float()).numpy()


def lora_linear_mixed(
    x: Tensor, w: Tensor, bias: Tensor | None, addresses: Tensor, ranks: Tensor, scales: Tensor, dtype: torch.dtype,
    max_rank: int, index: int, slots: Tensor, order: Tensor, blocks: Tensor, counters: Tensor, block_rows: int,
) -> Tensor:  # fmt: skip
    """Return y (M, N) in x.dtype. Of the plan only slots is read."""
    y = F.linear(x, w, bias)
    return lora_mixed(y, x, *_groups(addresses, ranks, scales, dtype, slots, x.shape[1], w.shape[0]))


def lora_update_mixed(
    base: Tensor, x: Tensor, addresses: Tensor, ranks: Tensor, scales: Tensor, dtype: torch.dtype,
    max_rank: int, index: int, slots: Tensor, order: Tensor, blocks: Tensor, counters: Tensor, block_rows: int,
) -> Tensor:  # fmt: skip
    """Return base + the update, a new tensor (M, N) in base.dtype."""
    y = base.clone(memory_format=torch.contiguous_format)
    return lora_mixed(y, x, *_groups(addresses, ranks, scales, dtype, slots, x.shape[1], base.shape[1]))


def lora_embedding_mixed(
    base: Tensor, ids: Tensor, addresses: Tensor, ranks: Tensor, scales: Tensor, dtype: torch.dtype,
    max_rank: int, index: int, slots: Tensor, order: Tensor, blocks: Tensor, counters: Tensor, block_rows: int, V: int,
) -> Tensor:  # fmt: skip
    """Return base (M, D) + scale * A_slot[:, ids].T @ B_slot.T, A_slot (r, V); ids outside [0, V) add nothing."""
    y = base.clone(memory_format=torch.contiguous_format)
    slots = torch.where((ids >= 0) & (ids < V), slots, -1)
    groups, order = _groups(addresses, ranks, scales, dtype, slots, V, base.shape[1])
    for rows, a, b, scaling in groups:
        y[order[rows]] += F.linear(a.index_select(1, ids[order[rows]]).T, b) * scaling
    return y


def _add_groups(y: Tensor, x: Tensor, groups: Iterable[Group]) -> Tensor:
    """Update y in place: for each group a product into its rows."""
    for rows, a, b, scaling in groups:
        s = F.linear(x[rows], a.to(x.dtype)).to(y.dtype)
        y[rows].addmm_(s, b.to(y.dtype).T, alpha=scaling)
    return y


def _with_gradients(y: Tensor, x: Tensor, groups: Sequence[Group], order: Tensor | None) -> Tensor:
    """The same as one sum: a backward per group would touch all of y each time."""
    order = torch.arange(x.shape[0]) if order is None else order
    every = torch.cat([order[rows] for rows, *_ in groups]).to(x.device)
    inputs = torch.split_with_sizes(x[every], [rows.stop - rows.start for rows, *_ in groups])
    parts = [
        F.linear(F.linear(part, a.to(x.dtype)) * scaling, b.to(x.dtype))
        for part, (_, a, b, scaling) in zip(inputs, groups, strict=True)
    ]
    return y.index_add(0, every, torch.cat(parts).to(y.dtype))


def _groups(
    addresses: Tensor, ranks: Tensor, scales: Tensor, dtype: torch.dtype, slots: Tensor, K: int, N: int
) -> tuple[list[Group], Tensor]:
    """The groups of the slots, and the order that makes the rows of each neighbours."""
    sizes, of_slot = ranks.tolist(), dict[int, list[int]]()
    for row, slot in enumerate(slots.tolist()):
        if 0 <= slot < len(sizes) and sizes[slot] > 0:
            of_slot.setdefault(slot, []).append(row)
    where, scale = addresses.tolist(), scales.tolist()
    groups: list[Group] = []
    order: list[int] = []
    for slot, rows in of_slot.items():
        rank, (a, b) = sizes[slot], where[slot]
        views = _view(a, rank, K, K, dtype), _view(b, N, rank, padded(rank), dtype)
        groups.append((slice(len(order), len(order) + len(rows)), *views, scale[slot]))
        order += rows
    return groups, torch.tensor(order, dtype=torch.int64)


@functools.lru_cache(maxsize=1 << 15)
def _view(address: int, rows: int, cols: int, stride: int, dtype: torch.dtype) -> Tensor:
    """The memory at an address as a tensor (rows, cols) that owns nothing.

    Safe while the adapter bank, which wrote the address into its table, keeps the memory: the table of a freed slot
    says rank 0. A kept view is as good as a new one, being nothing but the address.
    """
    if rows * cols == 0:
        return torch.empty((rows, cols), dtype=dtype)
    count = (rows - 1) * stride + cols
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=count).as_strided((rows, cols), (stride, 1))
