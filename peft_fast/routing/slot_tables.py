"""`SlotTables`: the tables on the device in which kernels look adapters up by their slot ids.

    addresses (sites, slots, 2) int64   of A and B        ranks (sites, slots) int32   0: no adapter at this site
    scales    (sites, slots) fp32

A table points at an adapter's parameters themselves wherever kernels can read them there, so an adapter that is trained
and then served is in memory once. Where they cannot (another dtype, another device, a rank that is no multiple of 8),
at a copy: all of one adapter in one block. Nothing is padded to a largest rank, and nothing that is in use ever moves.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.functional import MixedSite

__all__ = ["SlotTables"]

_ALIGNMENT = 16  # bytes: what a vector load needs

Entry = tuple[Tensor, Tensor, float]  # A (R, K), B (N, R), scaling


class _Chunk(NamedTuple):
    """The tables of sites on one device that came together; later sites get a chunk of their own, so none moves."""

    layers: list[Any]
    addresses: Tensor
    ranks: Tensor
    scales: Tensor


class SlotTables:
    """Tables for the sites of one model. Not safe to use from several threads at a time.

    Attributes: capacity: slots there are. max_rank: no rank is larger; a power of two. layers: by site; each has
        `mixed_site` (its number here), `mixed_device` and `mixed_dtype`. sites: what the operators take, by site.
    """

    def __init__(self, capacity: int, max_rank: int) -> None:
        self.capacity = capacity
        self.max_rank = max_rank
        self.layers: list[Any] = []
        self.sites: list[MixedSite] = []
        self._chunks: list[_Chunk] = []

    @property
    def devices(self) -> set[torch.device]:
        """The GPUs that tables are on."""
        return {chunk.ranks.device for chunk in self._chunks if chunk.ranks.is_cuda}

    def add(self, layers: Iterable[Any]) -> bool:
        """Give the layers that have no site one; whether there were any."""
        new = [layer for layer in layers if not self._knows(layer)]
        for layer in new:
            layer.mixed_site = len(self.layers)
            self.layers.append(layer)
        self._add_chunks(new)
        return bool(new)

    def _knows(self, layer: Any) -> bool:
        return 0 <= layer.mixed_site < len(self.layers) and self.layers[layer.mixed_site] is layer

    def _add_chunks(self, layers: Sequence[Any]) -> None:
        for device, run in itertools.groupby(layers, lambda layer: layer.mixed_device):
            members = list(run)
            S, L = len(members), self.capacity
            addresses = torch.zeros(S, L, 2, dtype=torch.int64, device=device)
            ranks = torch.zeros(S, L, dtype=torch.int32, device=device)
            scales = torch.zeros(S, L, dtype=torch.float32, device=device)
            self._chunks.append(_Chunk(members, addresses, ranks, scales))
            for i, layer in enumerate(members):
                site = (addresses[i], ranks[i], scales[i], layer.mixed_dtype, self.max_rank, layer.mixed_site)
                self.sites.append(MixedSite(*site))

    def outdated(self) -> bool:
        """Whether layers changed their device or dtype since."""
        return any(
            (layer.mixed_device, layer.mixed_dtype) != (site.ranks.device, site.dtype)
            for layer, site in zip(self.layers, self.sites, strict=True)
        )

    def renew(self, capacity: int) -> None:
        """Make empty tables, for the devices and dtypes that the layers have now."""
        self.synchronize()
        self.capacity, self._chunks, self.sites = capacity, [], []
        self._add_chunks(self.layers)

    def grow(self, max_rank: int) -> None:
        """Allow ranks up to this. The tables stay: kernels are told the largest rank beside them."""
        self.max_rank = max(16, 1 << (max_rank - 1).bit_length())
        self.sites = [site._replace(max_rank=self.max_rank) for site in self.sites]

    def write(self, slot: int, entries: Sequence[Entry | None], blocks: dict[Any, Tensor]) -> list[Tensor]:
        """Point a slot at an adapter, and return what it points at now, which has to be kept alive.

        Args: entries: by site, None where the adapter is not. blocks: its copies, changed in place.
        """
        served = _served(entries, self.layers, blocks)
        for chunk in self._chunks:
            places = [layer.mixed_site for layer in chunk.layers]
            addresses, ranks, scales = [], [], []
            for found, entry in ((served[place], entries[place]) for place in places):
                addresses.append((0, 0) if found is None else (found[0].data_ptr(), found[1].data_ptr()))
                ranks.append(0 if found is None else found[0].shape[0])
                scales.append(0.0 if entry is None else float(entry[2]))
            device = chunk.ranks.device
            chunk.addresses[:, slot] = torch.tensor(addresses, dtype=torch.int64).to(device)
            chunk.scales[:, slot] = torch.tensor(scales, dtype=torch.float32).to(device)
            chunk.ranks[:, slot] = torch.tensor(ranks, dtype=torch.int32).to(device)
        self._finish()
        return [tensor for found in served if found is not None for tensor in found]

    def clear(self, slot: int) -> None:
        """Let a slot mean no adapter."""
        for chunk in self._chunks:
            chunk.ranks[:, slot] = 0
        self._finish()

    def _finish(self) -> None:
        """What was written can be seen from every stream."""
        for device in self.devices:
            torch.cuda.current_stream(device).synchronize()

    def synchronize(self) -> None:
        """Wait for everything that was queued on the GPUs that tables are on."""
        for device in self.devices:
            torch.cuda.synchronize(device)


def _served(
    entries: Sequence[Entry | None], layers: Sequence[Any], blocks: dict[Any, Tensor]
) -> list[tuple[Tensor, Tensor] | None]:
    """A (R, K) and B (N, R) of each site as kernels read them.

    A contiguous, B with rows of R rounded up to a multiple of 8, both in the site's dtype and aligned. Copies of one
    adapter for one device and dtype are parts of one block in `blocks`; one that is large enough is written again, so
    that what is being read is overwritten with the same, or with newer values, and does not vanish.
    """
    served: list[tuple[Tensor, Tensor] | None] = [None if entry is None else (entry[0], entry[1]) for entry in entries]
    to_copy: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, found in enumerate(served):
        if found is not None and not _usable(*found, layers[i]):
            to_copy.setdefault((layers[i].mixed_device, layers[i].mixed_dtype), []).append(i)
    for key in [key for key in blocks if key not in to_copy]:
        del blocks[key]
    for (device, dtype), places in to_copy.items():
        originals = [found for i in places if (found := served[i]) is not None]
        sizes = [size for a, b in originals for size in _sizes(a, b, dtype)]
        block = blocks.get((device, dtype))
        if block is None or block.numel() != sum(sizes):
            block = blocks[device, dtype] = torch.empty(sum(sizes), dtype=dtype, device=device)
        parts = iter(block.split(sizes))  # type: ignore[no-untyped-call]
        for i, (a, b) in zip(places, originals, strict=True):
            own_a = next(parts)[: a.numel()].view(a.shape)
            own_b = next(parts)[: b.shape[0] * _row(b)].view(b.shape[0], _row(b))[:, : b.shape[1]]
            own_a.copy_(a.detach())
            own_b.copy_(b.detach())
            served[i] = own_a, own_b
    return served


def _sizes(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Elements of a block that A and B take, each of which starts aligned."""
    step = max(1, _ALIGNMENT // dtype.itemsize)
    return -(-a.numel() // step) * step, -(-b.shape[0] * _row(b) // step) * step


def _row(b: Tensor) -> int:
    """Elements between two rows of B."""
    return -(-b.shape[1] // 8) * 8


def _usable(a: Tensor, b: Tensor, layer: Any) -> bool:
    return (
        a.dtype == b.dtype == layer.mixed_dtype
        and a.device == b.device == layer.mixed_device
        and a.is_contiguous()
        and b.stride() == (_row(b), 1)
        and a.data_ptr() % _ALIGNMENT == 0
        and b.data_ptr() % _ALIGNMENT == 0
    )
