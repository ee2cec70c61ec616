"""`AdapterBank`: which adapters of a model can be used in a mixed batch, where they are, and who is using them.

An adapter is what PEFT knows: parameters in the model's layers. They are the truth; the bank never writes to them. It
hands out slots, small integers under which kernels find an adapter in `SlotTables`. Loading an adapter costs its own
size and time, however many are loaded.

`register` knows adapters by their directory or state dict and reads them when they are asked for. They wait in host
memory, at most `max_loaded` of them, and are copied to a GPU for as long as they have a slot. Those that nobody used
for longest make room: in the tables when all slots are taken, in memory when there are too many.
"""

import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..ops.functional import MixedSite
from .batch import BASE
from .record import AdapterRecord, BankStats
from .slot_tables import SlotTables
from .watch import AdapterWatch

__all__ = ["AdapterBank", "BankStats"]

_DEFAULT_MAX_RANK = 64
_NONE: set[str] = set()


class AdapterBank:
    """The adapters of one model for mixed batches. Made by the model when it is first needed: `model.adapter_bank`.

    All methods may be called from several threads.

    Args:
        tuner: has `peft_config` (adapter name -> config) and `mixed_layers()`, whose items have
            `mixed_entry(name) -> (a, b, scaling) | None`, `mixed_has(name)`, `mixed_dtype` and `mixed_device`.
    Attributes: max_loaded: registered adapters kept in memory. load: reads a source into the model as an adapter of a
        name. prefixes: names of the model's prefixes. changing: a lock, held while adapters are added, loaded or
        deleted.
    """

    def __init__(self, tuner: Any, capacity: int = 128, max_loaded: int = 1024) -> None:
        self._tuner = tuner
        self.max_loaded = max_loaded
        self.load: Callable[[Any, str], None] | None = None
        self.prefixes: Container[str] = ()
        self._tables = SlotTables(capacity, _DEFAULT_MAX_RANK)
        self.changing = threading.RLock()  # held while adapters are added, loaded or deleted
        self._free = threading.Condition(threading.RLock())  # guards everything below; notified when a use ends
        self._adapters: dict[str, AdapterRecord] = {}
        self._slots: list[str | None] = [None] * capacity
        self._odd: dict[int, set[str]] = {}
        self._tick = self._hits = self._loads = self._evictions = 0
        self.scan()

    # ------------------------------------------------------------------------------------------------------ adapters
    def configure(
        self, *, slots: int | None = None, max_loaded: int | None = None, max_rank: int | None = None
    ) -> None:
        """Set the limits: adapters with a slot at the same time, registered adapters in memory, largest rank.

        The largest rank grows by itself until slot ids are handed out, and is never lowered.
        Raises: ValueError for numbers below 1; RuntimeError for slots while adapters are in use, and for max_rank while
            slot ids are handed out: graphs that were made with them hold the tables.
        """
        given = {"slots": slots, "max_loaded": max_loaded, "max_rank": max_rank}
        if bad := {name: value for name, value in given.items() if value is not None and value < 1}:
            raise ValueError(f"AdapterBank.configure: expected numbers of at least 1, got {bad}")
        with self._free:
            if slots is not None and slots != self.capacity:
                self._resize(slots)
            self._grow(max_rank or 0)
            self.max_loaded = max_loaded or self.max_loaded

    def register(self, name: str, source: Any) -> None:
        """Know an adapter for mixed batches; it is read at its first use, and may be dropped and read again.

        Args:
            source: its directory, or (configuration, state dict with the names of a file), which is kept.
        Raises: ValueError if the name is taken. The source is checked when it is read.
        """
        with self._free:
            if name in self.prefixes:
                raise ValueError(
                    f"{name!r} is a prefix of this model: prefixes are always loaded, and never registered"
                )
            if name == BASE or name in self._adapters or name in self._tuner.peft_config:
                raise ValueError(f"Adapter with name '{name}' already exists.")
            self._adapters[name] = AdapterRecord(source=source)

    def unregister(self, name: str) -> None:
        """Forget a registered adapter, in memory or not. Raises: ValueError if it is not registered; as `leave`."""
        record = self._adapters.get(name)
        if record is None or record.source is None:
            raise ValueError(f"Adapter {name!r} is not registered. There are: {self.registered()}")
        if name in self._tuner.peft_config:
            self._tuner.delete_adapter(name)
        self.forget(name)

    def forget(self, name: str) -> None:
        """Do not read a deleted adapter again."""
        with self._free:
            if name not in self._tuner.peft_config:
                self._adapters.pop(name, None)

    def registered(self) -> list[str]:
        """Names of the registered adapters."""
        return [name for name, record in list(self._adapters.items()) if record.source is not None]

    def pin(self, *names: str) -> None:
        """Read these adapters now, and let them keep their place in memory and a slot until `unpin`.

        Raises: ValueError for an unknown name; RuntimeError if there are not enough slots.
        """
        with self.using(names):
            self.slots_of(names)
            for name in names:
                if name != BASE:
                    self._adapters[name].pinned = True

    def unpin(self, *names: str) -> None:
        """Let these adapters go when others need the room."""
        with self._free:
            for name in names:
                if name in self._adapters:
                    self._adapters[name].pinned = False

    def stats(self) -> BankStats:
        """What happened and what is held."""
        with self._free:
            served = {t.data_ptr(): t.nbytes for record in self._adapters.values() for t in record.served}
            return BankStats(
                hits=self._hits,
                loads=self._loads,
                evictions=self._evictions,
                slots=self.capacity,
                slots_used=sum(name is not None for name in self._slots),
                loaded=len(self._tuner.peft_config),
                registered=len(self.registered()),
                bytes_served=sum(served.values()),
                bytes_copied=sum(record.copied for record in self._adapters.values()),
            )

    # ---------------------------------------------------------------------------------------------------------- uses
    @contextmanager
    def using(self, names: Iterable[str]) -> Iterator[None]:
        """Hold adapters during a call: they are read if need be, and can be neither deleted nor evicted meanwhile.

        On CUDA the device counts too: an adapter is in use until the work queued here is done.
        Raises: ValueError for unknown names.
        """
        distinct = [name for name in dict.fromkeys(names) if name != BASE]
        me = threading.get_ident()
        held = self._hold(distinct, me)
        try:
            yield
        finally:
            with self._free:
                self._record_events(held)
                for record in held:
                    record.users.remove(me)
                    if not record.busy:
                        record.retired = []
                self._free.notify_all()

    def _check_known(self, names: Sequence[str]) -> None:
        known = self._tuner.peft_config
        unknown = [n for n in names if n not in known and (n not in self._adapters or self._adapters[n].source is None)]
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")

    def _hold(self, names: Sequence[str], user: int) -> list[AdapterRecord]:
        """Hold all of them or none; nothing is held while one is read, since a deletion may be waiting for it."""
        while True:
            self._check_known(names)
            for name in names:
                if name not in self._tuner.peft_config:
                    self._read(name, names)
            with self._free:
                records = [self._adapters.setdefault(name, AdapterRecord()) for name in names]
                # one that this thread holds already, in a call around this one, is waited for by who closed it
                closed = [record for record in records if record.closed and user not in record.users]
                if closed:
                    self._free.wait_for(lambda: not any(record.closed for record in closed))  # noqa: B023
                elif all(name in self._tuner.peft_config for name in names):
                    for record in records:
                        self._tick += 1
                        record.tick = self._tick
                        record.users.append(user)
                    self._hits += len(records)
                    return records

    def _read(self, name: str, wanted: Sequence[str]) -> None:
        """Load a registered adapter, dropping others than `wanted` where there are too many."""
        if self.load is None:
            raise RuntimeError(f"Adapter {name!r} is registered, but its bank belongs to no PeftModel that can load it")
        with self.changing:
            if name in self._tuner.peft_config:  # another thread was faster
                return
            self._make_room(wanted)
            with self.alone(name):
                self.load(self._adapters[name].source, name)
                self._move(name, to_host=True)
            self._loads += 1
            self._hits -= 1  # the use that follows found it not ready

    def bring_home(self, name: str) -> None:
        """Move a registered adapter that waits in host memory to its layers' devices: it is about to be set active."""
        record = self._adapters.get(name)
        if record is not None and record.source is not None:
            self._move(name, to_host=False)

    def _move(self, name: str, to_host: bool) -> None:
        for layer in self.layers:
            if layer.mixed_device.type != "cuda" or (entry := layer.mixed_entry(name)) is None:
                continue
            for matrix in entry[:2]:
                matrix.data = matrix.data.cpu().pin_memory() if to_host else matrix.data.to(layer.mixed_device)

    def _make_room(self, wanted: Sequence[str]) -> None:
        with self._free:
            loaded = [n for n in self.registered() if n in self._tuner.peft_config]
            records = self._adapters
            kept = {*wanted, *self._tuner.active_adapters}
            spare = [n for n in loaded if not (records[n].busy or records[n].pinned or n in kept)]
            spare.sort(key=lambda n: records[n].tick)
        for victim in spare[: max(0, len(loaded) + 1 - self.max_loaded)]:
            self._tuner.delete_adapter(victim)  # it stays registered
            self._evictions += 1

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Around a change of an adapter's weights: waits until no call uses it, and lets new calls wait.

        Raises: RuntimeError if this thread's own call uses it.
        """
        with self._free:
            record = self._adapters.setdefault(name, AdapterRecord())
            if threading.get_ident() in record.users:
                raise RuntimeError(f"Adapter {name} is used by the call that is running in this thread")
            record.closed += 1
            self._free.wait_for(lambda: not record.users)
        try:
            yield
        finally:
            with self._free:
                record.closed -= 1
                record.look_at_all()
                if not (record.closed or record.busy or record.source) and name not in self._tuner.peft_config:
                    self._adapters.pop(name, None)
                self._free.notify_all()

    @contextmanager
    def leave(self, name: str) -> Iterator[None]:
        """Around an adapter's deletion: as `alone`, and frees its slot. A registered one stays known; see `forget`.

        Raises: ValueError while its slot id is handed out; as `alone`.
        """
        with self.alone(name):
            with self._free:
                record = self._adapters[name]
                if record.handed_out:
                    raise ValueError(
                        f"Adapter {name} has its slot id {record.slot} handed out by adapter_slots: release_slots first"
                    )
            yield
            with self._free:
                self._take_slot(record)
                record.pinned, record.kept = False, None

    # --------------------------------------------------------------------------------------------------------- slots
    def hand_out(self, names: Sequence[str]) -> list[int]:
        """Slot ids of adapters, -1 for `BASE`; each stays the adapter's own until `take_back`.

        Raises: ValueError for unknown names; RuntimeError if there are not enough slots.
        """
        with self.using(names):
            ids = self.slots_of(names)
            with self._free:
                for name in names:
                    if name != BASE:
                        self._adapters[name].handed_out += 1
        return ids

    def take_back(self, ids: Iterable[int]) -> None:
        """Release ids, once per time they were handed out. On CUDA this waits for the device: replays of a graph are
        not seen from here. Raises: ValueError for an id that is not handed out."""
        ids = [i for i in ids if i >= 0]
        with self._free:
            records = [self._adapters.get(self._slots[i] or "") if i < self.capacity else None for i in ids]
            wanted: dict[int, int] = {}
            for i in ids:
                wanted[i] = wanted.get(i, 0) + 1
            for i, record in zip(ids, records, strict=True):
                if record is None or record.handed_out < wanted[i]:
                    raise ValueError(f"Slot id {i} is not handed out {wanted[i]} times")
            self._tables.synchronize()
            for record in records:
                record.handed_out -= 1  # type: ignore[union-attr]
            self._free.notify_all()

    def slots_of(self, names: Sequence[str]) -> list[int]:
        """Slot ids of adapters that the caller holds (`using`), -1 for `BASE`; the tables are right afterwards."""
        with self._free:
            found = {name: self._slot(name) for name in dict.fromkeys(names) if name != BASE}
        return [found.get(name, -1) for name in names]

    def slot_of(self, name: str) -> int | None:
        """The slot an adapter has now."""
        record = self._adapters.get(name)
        return None if record is None else record.slot

    def names_with_slots(self) -> list[str]:
        """The adapters that a slot id can mean now."""
        return [name for name in self._slots if name is not None]

    def odd_at(self, site: int) -> set[str]:
        """The adapters with a slot that have to run as modules at a site, since the tables cannot hold them."""
        return self._odd.get(site, _NONE)

    def names_of(self, ids: Sequence[int]) -> list[str]:
        """Adapter of each slot id, `BASE` for ids that have none."""
        slots = self._slots
        return [(slots[i] if 0 <= i < len(slots) else None) or BASE for i in ids]

    def kept(self, name: str, make: Callable[[list[Any], str], Any]) -> Any:
        """What layers on the host keep of an adapter from call to call: `make(layers, name)`, made anew when it is no
        longer current, and forgotten when the adapter goes."""
        record = self._adapters[name]
        if record.kept is None or not record.kept.is_current():
            record.kept = make(self.layers, name)
        return record.kept

    def refresh(self) -> None:
        """Bring the tables up to date with every adapter that has a slot, after its weights were written through
        `.data`, which nothing can notice, or a few of its sites by hand, which calls notice only after a while."""
        with self._free:
            for record in self._adapters.values():
                record.watch, record.kept = None, None
            for name in self.names_with_slots():
                self._slot(name)

    def check_handed_out(self) -> None:
        """Write the tables anew for adapters with a handed out id whose parameters moved or changed."""
        with self._free:
            for name in self.names_with_slots():
                if self._adapters[name].handed_out:
                    self._slot(name)

    def look_at_all(self) -> None:
        """Let the next call look at all sites of its adapters: something may have changed at any of them."""
        with self._free:
            for record in self._adapters.values():
                record.look_at_all()

    def _slot(self, name: str) -> int:
        record = self._adapters[name]
        copies_trained = bool(record.blocks) and record.watch is not None and record.watch.trained
        if record.slot is not None and record.watch is not None and not copies_trained:
            if record.watch.glance(self.layers, name):
                return record.slot
        entries = [layer.mixed_entry(name) for layer in self.layers]
        watch = AdapterWatch(entries)
        if record.slot is not None and record.watch is not None and record.watch.agrees(watch) and not copies_trained:
            record.watch = watch
            return record.slot
        self.follow()
        self._grow(max((e[0].shape[0] for e in entries if e is not None), default=0))
        if record.slot is None:
            slot = self._assign(name, record)
            self._loads += 1
        else:
            slot = record.slot
            self._tables.synchronize()  # the device may still read what the tables point at now
        for site, (layer, entry) in enumerate(zip(self.layers, entries, strict=True)):
            if entry is None and layer.mixed_has(name):
                self._odd.setdefault(site, set()).add(name)
            elif site in self._odd:
                self._odd[site].discard(name)
        served = self._tables.write(slot, entries, record.blocks)
        if record.busy and [t.data_ptr() for t in served] != [t.data_ptr() for t in record.served]:
            record.retired += record.served
        record.served, record.watch = served, watch
        return slot

    def _assign(self, name: str, record: AdapterRecord) -> int:
        if None not in self._slots:
            idle = [r for r in self._adapters.values() if r.slot is not None and not r.busy and not r.pinned]
            if not idle:
                raise RuntimeError(
                    f"Adapter {name} needs a slot and all {self.capacity} are in use or pinned: use fewer adapters at "
                    "the same time, release_slots, unpin, or adapter_bank.configure(slots=...)"
                )
            self._take_slot(min(idle, key=lambda r: r.tick))
            self._evictions += 1
        record.slot = self._slots.index(None)
        self._slots[record.slot] = name
        return record.slot

    def _take_slot(self, record: AdapterRecord) -> None:
        """Free an adapter's slot once the device has finished with it; until another has it, it means no adapter."""
        record.wait_for_device()
        if record.slot is not None:
            for names in self._odd.values():
                names.discard(self._slots[record.slot] or "")
            self._tables.clear(record.slot)
            self._slots[record.slot] = None
        record.slot, record.served, record.blocks, record.watch = None, [], {}, None

    # -------------------------------------------------------------------------------------------------------- layers
    @property
    def layers(self) -> list[Any]:
        """The model's adapter layers, by site."""
        return self._tables.layers

    @property
    def sites(self) -> list[MixedSite]:
        """The tables of each site. To be read after slots were asked for, which may exchange them."""
        return self._tables.sites

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        return self._tables.capacity

    @property
    def max_rank(self) -> int:
        """The largest rank of an adapter with a slot; grows by itself, see `configure`."""
        return self._tables.max_rank

    def scan(self) -> None:
        """Take in the layers that the model has got; to be called after each change of its layers."""
        with self._free:
            if self._tables.add(self._tuner.mixed_layers()):
                for record in self._adapters.values():
                    record.watch = None  # they may have weights at the new sites

    def follow(self) -> None:
        """Make the tables anew where layers changed their device or dtype, and write the adapters that have slots."""
        with self._free:
            if self._tables.outdated():
                self._tables.renew(self.capacity)
                self.refresh()

    def _grow(self, max_rank: int) -> None:
        if max_rank <= self.max_rank:
            return
        if handed := [name for name, record in self._adapters.items() if record.handed_out]:
            raise RuntimeError(
                f"The bank is for ranks up to {self.max_rank} and needs to be for ranks up to {max_rank}, which graphs "
                f"made with the slot ids that are handed out, of {sorted(handed)}, would not know. Call "
                "adapter_bank.configure(max_rank=...) before adapter_slots"
            )
        self._tables.grow(max_rank)

    def _resize(self, capacity: int) -> None:
        if busy := [name for name, record in self._adapters.items() if record.busy]:
            raise RuntimeError(
                f"The bank cannot get {capacity} slots while some of its {self.capacity} are used or handed out, by "
                f"{sorted(busy)}: call adapter_bank.configure(slots=...) before"
            )
        for record in self._adapters.values():
            self._take_slot(record)
        self._slots = [None] * capacity
        self._tables.renew(capacity)

    def _record_events(self, records: Iterable[AdapterRecord]) -> None:
        for device in self._tables.devices:
            if not torch.cuda.is_current_stream_capturing():
                stream = torch.cuda.current_stream(device)
                event = stream.record_event()
                for record in records:
                    record.events[stream.cuda_stream] = event
