"""Which implementation an op takes, and why: argument, environment variable, measured table, safe path, in this order."""

import os
from typing import NamedTuple

import torch

IMPLEMENTATIONS = ("auto", "torch", "one_launch", "split", "peft")


class Choice(NamedTuple):
    """An implementation's name and the reason for taking it, for people."""

    name: str
    reason: str


def requested(op: str, implementation: str | None) -> str:
    """Return what the caller or the environment asks for, checked; "auto" when neither does."""
    name = implementation or os.environ.get("PEFT_FAST_LORA") or "auto"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation must be one of {IMPLEMENTATIONS}, got {name!r}")
    return name


def choose(
    op: str, device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, R: int,
    *, needs_grad: bool = False, p: float = 0.0, implementation: str | None = None,
) -> Choice:  # fmt: skip
    """Return the implementation for one call of ``op``."""
    name = requested(op, implementation)
    if name != "auto":
        return Choice(name, "forced")
    return Choice("torch", "no measured entry")
