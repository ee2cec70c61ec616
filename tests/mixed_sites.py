"""Sites with many adapters for the tests of mixed batches, and the formula, row by row."""

import torch
from torch import Tensor

from peft_fast.ops.functional import MixedSite
from peft_fast.reference.mixed import padded

RANKS = (1, 4, 0, 64, 7, 16, 33, 8)


class Adapters:
    """A (rank, K) and B (N, rank) of each slot, in memory as the bank keeps them; all around them is NaN."""

    def __init__(self, K, N, dtype, ranks=RANKS, device="cpu", index=0):
        self.ranks, self.keep, self.ab, addresses = ranks, [], [], []
        self.scales = [0.5 + 0.25 * slot for slot in range(len(ranks))]
        for rank in ranks:
            stride = padded(rank)
            a_memory = torch.full((rank * K + 64,), float("nan"), dtype=dtype, device=device)
            b_memory = torch.full((N * stride + 64,), float("nan"), dtype=dtype, device=device)
            a, b = a_memory[: rank * K].view(rank, K), b_memory[: N * stride].view(N, stride)[:, :rank]
            a.copy_(torch.randn(rank, K) / K**0.5)
            b.copy_(torch.randn(N, rank) / max(rank, 1) ** 0.5)
            self.keep += [a_memory, b_memory]
            self.ab.append((a, b))
            addresses.append([a_memory.data_ptr(), b_memory.data_ptr()] if rank else [0, 0])
        largest = max(16, 1 << (max(ranks) - 1).bit_length())
        self.site = MixedSite(
            torch.tensor(addresses, dtype=torch.int64, device=device),
            torch.tensor(ranks, dtype=torch.int32, device=device),
            torch.tensor(self.scales, dtype=torch.float32, device=device),
            dtype, largest, index,
        )  # fmt: skip

    def used(self, slot: int) -> bool:
        return 0 <= slot < len(self.ranks) and self.ranks[slot] > 0


def in_double(adapters: Adapters) -> Adapters:
    """The same adapters in fp64."""
    twin = Adapters.__new__(Adapters)
    twin.__dict__ |= adapters.__dict__ | {"ab": [(a.double(), b.double()) for a, b in adapters.ab]}
    return twin


def update(adapters: Adapters, slots: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """y + the update of each row, in y's and x's dtypes."""
    y = y.clone()
    for row, slot in enumerate(slots.tolist()):
        if adapters.used(slot):
            a, b = adapters.ab[slot]
            y[row] += adapters.scales[slot] * (x[row] @ a.to(x.dtype).T).to(y.dtype) @ b.to(y.dtype).T
    return y


def embedding_update(adapters: Adapters, slots: Tensor, ids: Tensor, y: Tensor) -> Tensor:
    """y + the update of each row for the column ids[row] of A, none where there is no such column."""
    y = y.clone()
    for row, (slot, column) in enumerate(zip(slots.tolist(), ids.tolist(), strict=True)):
        if adapters.used(slot) and 0 <= column < adapters.ab[slot][0].shape[1]:
            a, b = adapters.ab[slot]
            y[row] += adapters.scales[slot] * a[:, column].to(y.dtype) @ b.to(y.dtype).T
    return y


def mixes(M: int, capacity: int) -> dict[str, Tensor]:
    """What slots a batch may hold: names for test ids, and the slots (M,) int64."""
    every = torch.arange(M) % capacity
    outside = torch.tensor([-1, -7, capacity, 2**31 - 1, 2**31 + 1, 2**62, -(2**31)])
    shuffled = torch.randint(0, capacity, (M,))
    with_none = torch.where(torch.rand(M) < 0.3, outside[torch.arange(M) % len(outside)], shuffled)
    return {
        "mixed": with_none,
        "none": outside[torch.arange(M) % len(outside)],
        "one": torch.full((M,), 3),
        "distinct": every,
        "runs": every.sort().values,
    }
