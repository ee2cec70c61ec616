"""What an `AdapterBank` knows of one adapter, and what it tells of all."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from .watch import AdapterWatch

__all__ = ["AdapterRecord", "BankStats"]


class BankStats(NamedTuple):
    """Counts since the bank was made, and what it holds now.

    hits: uses of an adapter that was ready. loads: registered adapters read, and adapters given a slot.
    evictions: slots taken away, and adapters dropped from memory. slots_used of slots, loaded and registered: adapters.
    bytes_served: of the weights that the tables point at. bytes_copied: the part of it that is a second copy.
    """

    hits: int
    loads: int
    evictions: int
    slots: int
    slots_used: int
    loaded: int
    registered: int
    bytes_served: int
    bytes_copied: int


@dataclass
class AdapterRecord:
    """The bank's record of one adapter."""

    source: Any = None  # registered: read from here when needed
    users: list[int] = field(default_factory=list)  # a thread's id for each call that uses it now
    handed_out: int = 0  # ids given to a caller and not released
    pinned: bool = False
    closed: int = 0  # how many are about to delete, read or write it: new calls wait
    tick: int = 0  # of the last use
    slot: int | None = None
    served: list[Tensor] = field(default_factory=list)  # what the tables point at, kept alive
    blocks: dict[Any, Tensor] = field(default_factory=dict)  # the copies, by device and dtype
    kept: Any = None  # see `AdapterBank.kept`
    retired: list[Tensor] = field(default_factory=list)  # served before, and perhaps still read by calls that run
    watch: AdapterWatch | None = None  # how it looked when the tables were written
    events: dict[int, Any] = field(default_factory=dict)  # last use by stream, on CUDA

    @property
    def copied(self) -> int:
        """Bytes that are in memory a second time for its sake."""
        return sum(block.nbytes for block in self.blocks.values()) + (self.kept.copied if self.kept else 0)

    @property
    def busy(self) -> bool:
        return bool(self.users) or self.handed_out > 0

    def look_at_all(self) -> None:
        """Let its next use look at all sites."""
        if self.watch is not None:
            self.watch.look_at_all = True

    def wait_for_device(self) -> None:
        """Until the GPU has finished with the calls that used it."""
        for event in self.events.values():
            event.synchronize()
        self.events = {}
