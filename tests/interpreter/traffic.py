"""Which bytes kernels ask for: every load, store and atomic of every launch, counted in Triton's interpreter.

    with counting() as launches:
        functional.lora_linear(x, w, a, b, 2.0, implementation="split")
    launches[0].kernel           "lora_shrink"
    launches[0].loaded           {"x": ..., "a": ...}: bytes asked for, repeats included: what passes through the caches
    launches[0].unique_loaded    the same without repeats: what has to come from memory

Only what a mask lets through counts. A byte belongs to the argument whose element lies there, named without "_ptr"; one
that belongs to none counts as ELSEWHERE. A tensor that is passed twice has the name of the first argument.

On a GPU launches are recorded, and no bytes: nothing there sees an address.
"""

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.jit import KernelInterface

ELSEWHERE = "elsewhere"
COUNTED = not torch.cuda.is_available()


class Launch:
    """One launch: ``launch["M"]`` is an argument, tensors without their "_ptr"; the counts are bytes by name."""

    def __init__(self, kernel: str, grid: tuple[int, ...], arguments: dict[str, Any], more: dict[str, list[Tensor]]):
        self.kernel, self.grid = kernel, grid
        self.arguments = {name.removesuffix("_ptr"): value for name, value in arguments.items()}
        self.loaded, self.unique_loaded = Counter[str](), Counter[str]()
        self.stored, self.unique_stored = Counter[str](), Counter[str]()
        self.atomic, self.unique_atomic = Counter[str](), Counter[str]()
        self.itemsize = {n: value.element_size() for n, value in self.arguments.items() if isinstance(value, Tensor)}
        self.itemsize |= {name: tensors[0].element_size() for name, tensors in more.items()}
        if COUNTED:
            self._map(more)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def _map(self, more: dict[str, list[Tensor]]) -> None:
        """Make the table of all elements: their addresses, sorted, and whose they are."""
        owned = [(name, [value]) for name, value in self.arguments.items() if isinstance(value, Tensor)]
        owned += list(more.items())
        self._names = [name for name, _ in owned]
        of_name = [np.concatenate([addresses_of(t) for t in tensors]) for _, tensors in owned]
        owner = np.repeat(np.arange(len(owned)), [len(addresses) for addresses in of_name])
        self._addresses, first = np.unique(np.concatenate(of_name), return_index=True)
        self._owner = owner[first]
        self._touched = {kind: np.zeros(len(self._addresses), bool) for kind in ("loaded", "stored", "atomic")}
        self._elsewhere: dict[str, set[int]] = {kind: set() for kind in self._touched}

    def count(self, kind: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        """Take one access into the counts."""
        addresses = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)].ravel().astype(np.int64)
        at = np.minimum(np.searchsorted(self._addresses, addresses), len(self._addresses) - 1)
        known = self._addresses[at] == addresses
        self._touched[kind][at[known]] = True
        total = getattr(self, kind)
        elements = np.bincount(self._owner[at[known]], minlength=len(self._names))
        for name, number in zip(self._names, elements.tolist(), strict=True):
            if number:
                assert self.itemsize[name] == itemsize, f"{self.kernel}: {name} is taken in pieces of {itemsize} bytes"
                total[name] += number * itemsize
        if not known.all():
            total[ELSEWHERE] += int((~known).sum()) * itemsize
            starts = addresses[~known].tolist()
            self._elsewhere[kind].update(byte for start in starts for byte in range(start, start + itemsize))

    def finish(self) -> None:
        """Fill in the counts without repeats."""
        for kind, touched in self._touched.items():
            elements = np.bincount(self._owner[touched], minlength=len(self._names)).tolist()
            unique = getattr(self, f"unique_{kind}")
            unique |= {name: n * self.itemsize[name] for name, n in zip(self._names, elements, strict=True) if n}
            if self._elsewhere[kind]:
                unique[ELSEWHERE] = len(self._elsewhere[kind])

    @property
    def must_move(self) -> int:
        """Bytes that pass between memory and chip at least, if nothing is cached before the launch."""
        return sum(self.unique_loaded.values()) + sum(self.unique_stored.values())


def addresses_of(tensor: Tensor) -> np.ndarray:
    """Where the elements of a tensor are, each address once."""
    if tensor.numel() == 0:
        return np.zeros(0, np.int64)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    offsets = torch.arange(span).as_strided(tensor.shape, tensor.stride()).flatten().numpy()
    return np.unique(tensor.data_ptr() + offsets * tensor.element_size())


@contextmanager
def counting(**more: list[Tensor]) -> Iterator[list[Launch]]:
    """Record the launches of a block. more: tensors that kernels reach by an address in a table, under their name."""
    launches: list[Launch] = []
    running: list[Launch] = []
    select = KernelInterface.__getitem__

    def recorded(kernel: Any, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            named = {name: value for name, value in options.items() if name in kernel.arg_names}
            arguments = inspect.signature(kernel.fn).bind(*args, **named).arguments
            name = kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")
            launch = Launch(name, grid, arguments, more)
            launches.append(launch)
            running.append(launch)
            select(kernel, grid)(*args, **options)
            running.pop()
            if COUNTED:
                launch.finish()

        return run

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(KernelInterface, "__getitem__", recorded))
        if COUNTED:
            stack.enter_context(mock.patch.object(interpreter, "_interpreter", _watched(running)))
        yield launches


def _watched(running: list[Launch]) -> SimpleNamespace:
    """The functions of the interpreter that touch memory, all of them, counting for the launch that runs."""
    real = interpreter._interpreter

    def load(pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        running[-1].count("loaded", pointers, mask, np.dtype(dtype).itemsize)
        return real.load(pointers, mask, other, dtype)

    def store(pointers: Any, value: Any, mask: Any) -> Any:
        running[-1].count("stored", pointers, mask, value.dtype.itemsize)
        return real.store(pointers, value, mask)

    def atomic_rmw(operation: Any, pointers: Any, value: Any, mask: Any, order: Any) -> Any:
        running[-1].count("atomic", pointers, mask, value.dtype.itemsize)
        return real.atomic_rmw(operation, pointers, value, mask, order)

    def atomic_cas(pointers: Any, expected: Any, value: Any, order: Any) -> Any:
        running[-1].count("atomic", pointers, np.ones_like(pointers, bool), value.dtype.itemsize)
        return real.atomic_cas(pointers, expected, value, order)

    names = {name: getattr(real, name) for name in dir(real)}
    watched = dict(load=load, store=store, atomic_rmw=atomic_rmw, atomic_cas=atomic_cas)
    return SimpleNamespace(**names | watched)
