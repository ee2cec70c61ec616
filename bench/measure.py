"""Ratios, ceilings, errors, memory; the clock itself is ``peft_fast.tuning.clock``."""

import gc
import math
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_fast.tuning.clock import graphed, interleaved, sample

__all__ = [
    "PeakMemory", "ceilings", "commit", "error_over_budget", "graphed", "interleaved", "ratio", "sample", "saved_bytes",
]  # fmt: skip


def ratio(samples: dict[str, list[float]], name: str, to: str) -> dict[str, float]:
    """Median over the rounds of name's time over to's in the same round, with the quartiles."""
    values = sorted(a / b for a, b in zip(samples[name], samples[to], strict=True))
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def ceilings(device: torch.device, tiny: bool = False) -> dict[str, float]:
    """bytes/s of a copy, flop/s of a square product per dtype, as torch gets them here and now, on random data.

    "call": seconds of a tiny product, which is what it costs to call one.
    """
    cuda = device.type == "cuda"
    size = 64 if tiny else 8192 if cuda else 1024
    source = torch.randn(1 << (12 if tiny else 28 if cuda else 25), device=device)
    target = torch.empty_like(source)
    found = {"bytes": 2 * source.nbytes / _best(lambda i: target.copy_(source), device)}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * size**3 / _best(lambda i, x=x, y=y: x @ y, device)
    small = torch.randn(16, 16, device=device)
    found["call"] = min(sample(lambda i: small @ small, 1000, device) for _ in range(5))
    return found


def _best(function: Callable[[int], Any], device: torch.device) -> float:
    function(0)
    return min(sample(function, 1, device) for _ in range(9))


def error_over_budget(
    out: Sequence[Tensor], same: Sequence[Tensor], exact: Sequence[Tensor], norm: float = float("inf")
) -> tuple[float, float]:
    """(largest relative error, largest share of the error budget used); a share above 1 is wrong.

    A tensor's budget: twice the error of plain torch in the same dtype (``same``), plus one rounding of the result.
    Errors are measured in ``norm``: the largest element for one op, the Euclidean norm after many layers.
    """
    if [t.shape for t in out] != [t.shape for t in exact]:
        return float("inf"), float("inf")
    worst_error = worst_share = 0.0
    for ours, plain, truth in zip(out, same, exact, strict=True):
        size, error, plain_error = (
            torch.linalg.vector_norm(t.double(), norm).item()
            for t in (truth, ours.double() - truth, plain.double() - truth)
        )
        share = error / (2 * plain_error + torch.finfo(ours.dtype).eps * size)
        if not math.isfinite(share):
            return float("inf"), float("inf")
        worst_error, worst_share = max(worst_error, error / size), max(worst_share, share)
    return worst_error, worst_share


class PeakMemory:
    """Context: bytes of tensors alive at the worst moment, above what was alive at the start."""

    bytes = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
            return
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        alive = 0
        for _, change in changes:
            alive += change
            self.bytes = max(self.bytes, alive)


def saved_bytes(function: Callable[[], Any], but: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of ``function``; a storage counts once, those of ``but`` not."""
    known = {t.untyped_storage().data_ptr() for t in but}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    del result
    return sum(kept.values())


def commit() -> str:
    """The checkout's commit, with "+" if the library has changes that are not in it."""
    here = Path(__file__).parent
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        paths = ["../peft_fast", "../csrc_triton", ":!../csrc_triton/tables"]  # which a tuner is just filling
        dirty = subprocess.run(["git", "status", "--porcelain", "--", *paths], cwd=here, capture_output=True,
                               text=True, check=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if dirty.stdout.strip() else "")
