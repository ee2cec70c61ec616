"""Which adapter each row of a call uses: data of the call, never a choice made on a module.

A call enters `use(MixedBatch(...))`; the layers of the model read `current()`. The field is the thread's own, so calls
in two threads cannot mix, and an exception leaves nothing behind.

Rows belong to units in order. A unit is a row of the batch, or a token where several sequences are packed into one row.
A layer that sees `count` rows gives `count / units` consecutive ones to each unit: one for pooled states, all tokens of
a sequence whether or not they were flattened, all beams or returned sequences of a prompt (transformers repeats
prompts in place).
"""

import itertools
import math
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.choice import requested, triton_failure
from ..ops.functional import MixedPlan, mixed_plan

BASE = "__base__"  # PEFT's name for "no adapter"

# the arguments of a forward or generate that have the rows of the batch as their first dimension
_ROWS = (
    *("input_ids", "inputs_embeds", "inputs", "input_features", "input_values", "encoder_outputs"),
    *("decoder_input_ids", "decoder_inputs_embeds", "pixel_values"),
)
# From this many rows to a unit on, products of each run of rows are faster than bringing an adapter's rows together
# (one thread, 64 rows a run, fp32: 7 ms against 2 to 4; 16 bits: equal).
_LONG_RUN = 32


class Groups(NamedTuple):
    """The rows of a site by adapter. order: the permutation that makes each adapter's rows neighbours, None if they
    are already, or form long runs; groups: (adapter, slice of the rows in that order), of which an adapter may have
    several. Rows without an adapter are in no group."""

    order: Tensor | None
    groups: list[tuple[str, slice]]


class MixedBatch:
    """The adapters of one call, one per unit.

    Args:
        names: adapter of each unit, `BASE` for none; known on the host. Or:
        slots: (units,) int32, slot ids of `bank`; an id that is no slot of it means no adapter.
        bank: where slots and tables come from; None where only layers called one by one use this batch.
        packed: units are the tokens of one row, which holds several sequences.
        beside: names of adapters of another method: layers treat their rows as `BASE`, modules that run whole do not.
    """

    def __init__(
        self,
        names: Sequence[str] | None = None,
        slots: Tensor | None = None,
        bank: Any = None,
        packed: bool = False,
        beside: Container[str] = (),
    ) -> None:
        if names is None and slots is None:
            raise ValueError("MixedBatch needs names or slots, got neither")
        self._names = None if names is None else list(names)
        self._slots = slots
        self.bank = bank
        self.packed = packed
        self._beside = beside
        self.of_one_call = False  # entered by a call of the model, and so not meant for calls inside of it
        self.units = len(names) if names is not None else slots.shape[0]  # type: ignore[union-attr]
        self.peft_arithmetic = requested("lora_linear", None) == "peft"
        self.implementation = requested("lora_mixed", None)
        self._groups: dict[int, Groups] = {}
        self._of_sites: dict[tuple[int, int], Any] = {}
        self._kept: dict[str, Any] = {}
        self._plans: list[tuple[int, torch.device, MixedPlan]] = []  # a dict would make graphs for each number of rows
        self._slots_on: dict[torch.device, Tensor] = {}

    # ---------------------------------------------------------------------------------------------- on the host
    def on_host(self, x: Tensor, wants_grad: Callable[[str], bool]) -> bool:
        """Whether layers loop over adapters on the host: on a CPU, and where a gradient is wanted, of x or of an
        adapter of which `wants_grad` says so.

        Everywhere else, and in a compiled graph, the slots stay on the device and nothing depends on what they hold.
        """
        if torch.compiler.is_compiling():
            return False
        if self.bank is None or self.peft_arithmetic:
            return True
        if self.implementation in ("auto", "torch") and (x.device.type != "cuda" or triton_failure(x.device)):
            return True
        if not torch.is_grad_enabled() or self._names is None:
            return False
        return x.requires_grad or any(wants_grad(name) for name in set(self._of_layers()) if name != BASE)

    @property
    def names(self) -> list[str]:
        """Adapter of each unit, `BASE` for none. Reads the slots if names were not given: a GPU is waited for."""
        if self._names is None:
            self._names = self.bank.names_of(self._slots.tolist())  # type: ignore[union-attr]
        return self._names

    def _of_layers(self) -> list[str]:
        """The names as adapter layers see them."""
        return [BASE if name in self._beside else name for name in self.names] if self._beside else self.names

    def groups(self, count: int) -> Groups:
        """The rows of each adapter at a site of `count` rows, made once per call."""
        each = count // self.units
        found = self._groups.get(each)
        if found is None:
            found = self._groups[each] = _groups(self._of_layers(), each)
        return found

    def of_site(self, layer: Any, count: int, find: Callable[[list[tuple[str, slice]]], Any]) -> Any:
        """What `find` makes of the groups at a layer of `count` rows, kept until the call ends: no adapter that it uses
        can go before."""
        key = (id(layer), count)
        found = self._of_sites.get(key)
        if found is None:
            found = self._of_sites[key] = find(self.groups(count).groups)
        return found

    def kept(self, name: str, make: Callable[[list[Any], str], Any]) -> Any:
        """What the bank keeps of an adapter for layers on the host, looked at once per call."""
        found = self._kept.get(name)
        if found is None:
            found = self._kept[name] = self.bank.kept(name, make)
        return found

    def count_rows(self, sizes: Sequence[int]) -> int:
        """How many rows a site has whose input has these leading sizes.

        Raises: ValueError if they are not the batch's rows, each as often as the others: its input is something else
            (positions, experts' tokens, patches of images), and whose it is cannot be told.
        """
        first = math.prod(sizes) if self.packed else sizes[0] if sizes else 1
        if self.units == 0 or first % self.units != 0:
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {self.units} and "
                f"{first} respectively, at a layer that an adapter adapts. A layer whose input is something else than "
                "the rows of the batch and their tokens cannot take part in a mixed batch"
            )
        return math.prod(sizes)

    # -------------------------------------------------------------------------------------------- on the device
    def slots(self, device: torch.device) -> Tensor:
        """(units,) int32 on `device`."""
        found = self._slots_on.get(device)
        if found is None:
            if self._slots is None:
                self._slots = torch.tensor(self.bank.slots_of(self._of_layers()), dtype=torch.int32)
            found = self._slots_on[device] = self._slots.to(device, torch.int32, non_blocking=True)
        return found

    def row_slots(self, count: int, device: torch.device) -> Tensor:
        """(count,) int32: the slot of every row of a site."""
        slots = self.slots(device)
        return slots[:, None].expand(-1, count // self.units).reshape(-1)

    def plan(self, count: int, device: torch.device) -> MixedPlan:
        """What kernels need to know of the rows, made once per call and number of rows, not once per layer."""
        for rows, where, plan in self._plans:
            if rows == count and where == device:
                return plan
        slots = self.row_slots(count, device)
        plan = mixed_plan(slots, self.bank.capacity, len(self.bank.layers))
        self._plans.append((count, device, plan))
        return plan

    # ----------------------------------------------------------------------------------- modules that run whole
    def _host_knows(self) -> bool:
        if torch.compiler.is_compiling():
            return False
        return self._names is not None or not self._slots.is_cuda  # type: ignore[union-attr]

    def candidates(self, present: Container[str]) -> list[str]:
        """Which of a module's adapters have to run: those in use, or, where only the device knows, all with a slot."""
        names = dict.fromkeys(self.names) if self._host_knows() else self.bank.names_with_slots()
        return [name for name in names if name in present]

    def mask(self, name: str, count: int, device: torch.device) -> Tensor:
        """(count,) bool: which rows of a module's output belong to an adapter."""
        if not self._host_knows():
            mask: Tensor = self.row_slots(count, device) == self.bank.slot_of(name)
            return mask
        units = torch.tensor([other == name for other in self.names], device=device)
        return units[:, None].expand(-1, count // self.units).reshape(-1)

    def select(self, outputs: dict[str, Any], base: Any) -> Any:
        """`base` with the rows of each adapter taken from its output; tuples and mappings of tensors entry by entry.

        The first dimension (or the first two, of packed sequences) counts rows.
        """
        if isinstance(base, Tensor):
            # packed: (1, tokens, ...), or (tokens, ...) once flattened
            sizes = base.shape[:2] if self.packed and base.shape[0] == 1 else base.shape[:1]
            count, result = self.count_rows(sizes), base
            for name, output in outputs.items():
                mask = self.mask(name, count, base.device)
                result = torch.where(mask.view(*sizes, *[1] * (base.ndim - len(sizes))), output.to(base.dtype), result)
            return result
        if isinstance(base, tuple | list):
            parts = [self.select({n: o[i] for n, o in outputs.items()}, entry) for i, entry in enumerate(base)]
            return type(base)(*parts) if hasattr(base, "_fields") else type(base)(parts)
        if isinstance(base, dict):  # transformers' ModelOutput is one
            return type(base)(**{k: self.select({n: o[k] for n, o in outputs.items()}, v) for k, v in base.items()})
        return base


def _groups(names: Sequence[str], each: int) -> Groups:
    units: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if name != BASE:
            units.setdefault(name, []).append(index)
    if each >= _LONG_RUN or all(found[-1] - found[0] == len(found) - 1 for found in units.values()):
        runs = [list(run) for _, run in itertools.groupby(range(len(names)), lambda index: names[index])]
        spans = [(names[run[0]], slice(run[0] * each, (run[-1] + 1) * each)) for run in runs]
        return Groups(None, [span for span in spans if span[0] != BASE])
    order = torch.tensor([index for found in units.values() for index in found])
    order = (order[:, None] * each + torch.arange(each)).reshape(-1)
    spans, start = [], 0
    for name, found in units.items():
        spans.append((name, slice(start, start + len(found) * each)))
        start += len(found) * each
    return Groups(order, spans)


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.batch: MixedBatch | None = None


_STATE = _ThreadState()


def current() -> MixedBatch | None:
    """The mixed batch that this thread's call is about, or None."""
    return _STATE.batch


@contextmanager
def use(batch: MixedBatch | None) -> Iterator[None]:
    """Let the layers that this thread calls inside the `with` take adapters from `batch`; None: those set on them."""
    before = _STATE.batch
    _STATE.batch = batch
    try:
        yield
    finally:
        _STATE.batch = before


def check_names(names: Any) -> None:
    """Raises: TypeError for adapter names that are no list."""
    if not isinstance(names, list | tuple):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")


def number_of_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Rows of a call, from the first of its arguments that has them; None if none has."""
    known = [*args[:1], *(kwargs.get(name) for name in _ROWS)]
    others = [value for name, value in kwargs.items() if name != "adapter_ids"]  # a model with names of its own
    for value in (*known, *others):
        if isinstance(value, Tensor) and value.ndim > 0:
            return value.shape[0]
        if value is not None and hasattr(value, "last_hidden_state"):
            return int(value.last_hidden_state.shape[0])
    return None


def wrong_length(given: int, rows: int) -> ValueError:
    """PEFT's error for another number of names than of rows."""
    return ValueError(
        "Length of `adapter_names` should be the same as the number of inputs, but got "
        f"{given} and {rows} respectively."
    )


def sequence_lengths(position_ids: Tensor) -> list[int]:
    """Lengths of the sequences packed into one row, whose (1, T) positions start anew at each. Waits for a GPU."""
    positions = position_ids.reshape(-1).tolist()
    starts = [i for i, p in enumerate(positions) if i == 0 or p != positions[i - 1] + 1] + [len(positions)]
    return [end - start for start, end in itertools.pairwise(starts)]
