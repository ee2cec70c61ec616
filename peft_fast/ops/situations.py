"""What would run in typical situations on this machine's devices, and why: the lines of `peft-fast info`."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .choice import Choice, choose, dtype_name, gpu_name
from .operators import OPERATORS
from .prefix_choice import choose_prefix

_SIZE: dict[str, Any] = dict(N=4096, K=4096, R=16)
_DTYPE, _HEAD = torch.bfloat16, 128


class Situation(NamedTuple):
    """A line of `peft-fast info`."""

    op: str
    situation: str
    choice: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op:<16} {self.situation:<48} {self.choice:<11} {self.reason}"

    def in_site(self) -> str:
        """A line below the name of what it is about."""
        return f"{self.op:<23}{self.situation:<35}{self.choice:<11}{self.reason}"


def answer(ask: Callable[[], Choice]) -> Choice:
    """What is chosen, or the error that there is instead."""
    try:
        return ask()
    except (RuntimeError, ValueError, TypeError) as error:
        return Choice("an error", str(error))


def typical() -> list[Situation]:
    """A line for each situation on each device; never raises."""
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [line for device in devices for line in _on(device)]


def _on(device: torch.device) -> Iterator[Situation]:
    where = "cpu" if device.type == "cpu" else f"{device} {gpu_name(device)}"
    sizes = f"{_SIZE['N']}x{_SIZE['K']} {dtype_name(_DTYPE).replace('bfloat', 'bf')} r{_SIZE['R']}"
    for op in OPERATORS.values():
        for what, arguments in op.typical:
            ask = functools.partial(choose, op.name, device, _DTYPE, **_SIZE, **arguments)
            yield Situation(op.name, f"{where}, {sizes}, {what}", *answer(ask))
    for what, training in (("", False), (", training", True)):
        ask = functools.partial(choose_prefix, device, _DTYPE, _HEAD, training=training)
        yield Situation("prefix_attention", f"{where}, bf16, heads of {_HEAD}{what}", *answer(ask))
