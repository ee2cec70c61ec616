"""What one token costs the host in a LoRA layer on a GPU, measured without one.

The GPU's path runs on tensors so small that an operator costs about what launching a kernel does: layers take the steps
that they take for a GPU on which nothing was measured, and nothing else of it is here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from ..cases.kinds import HostCase
from .lora_sites import LoraSite
from .subject import Call, Compared, Work


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let peft_fast take the path of a GPU, by its own choice, for tensors that are on the CPU."""
    from csrc_triton import tables
    from peft_fast.ops import choice, functional
    from peft_fast.reference import lora as reference

    gpu, choose = torch.device("cuda", 0), functional.choose

    def choose_for_a_gpu(op: str, device: torch.device, *args: Any, **options: Any) -> choice.Choice:
        return choose(op, gpu, *args, **options)

    choice.forget()
    with (
        mock.patch.object(tables, "gpu_of", lambda device: tables.Gpu("sm_0", "a GPU without a table")),
        mock.patch.object(functional, "choose", choose_for_a_gpu),
        mock.patch.object(functional, "_on_cpu", lambda x: False),
        mock.patch.object(reference, "_in_fp32", lambda x: False),
    ):
        yield
    choice.forget()


class HostLayer(LoraSite):
    """A ``HostCase``: peft's layer is the rival, called as a model calls it."""

    group = "host time on a GPU"
    rivals = ("peft",)

    @classmethod
    def providers(cls, case: HostCase, device: torch.device) -> Sequence[str]:
        return ("base", "plain torch", "peft", "peft_fast")

    def compared(self, name: str) -> Compared:
        with as_on_a_gpu():
            return super().compared(name)

    def timed(self, functions: dict[str, Call], seconds: float) -> dict[str, list[float]]:
        with as_on_a_gpu(), torch.no_grad():
            return super().timed(functions, seconds)

    def runner(self, name: str) -> Callable[[int], Any]:
        with as_on_a_gpu():
            return super().runner(name)

    def work(self, name: str) -> Work | None:  # type: ignore[override]  # of a host's steps there is no roofline
        return None

    def tokens(self) -> int:
        return 0
