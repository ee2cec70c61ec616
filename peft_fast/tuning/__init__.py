"""Measuring on a GPU which configuration and which implementation is fastest: ``peft_fast.tune``, docs/tuning.md."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .. import __version__
from ..ops.choice import triton_failure
from . import model as models
from .work import Work, gpu_setting, provenance, tasks

__all__ = ["Tuning", "tune"]

_SECONDS, _MIN_ROUNDS = 0.03, 7  # of one comparison: a model's owner waits for it
_SHARE_OF_COMPILING = 0.6


@dataclass(frozen=True)
class Tuning:
    """What ``tune`` did; printed, it says so.

    folder: where the rows are.    written: rows of this run.    changed: those of them that change what runs.
    left: rows that are still to be measured; the same call goes on with them.    faults: results that were wrong or
    calls that failed, none of which was timed.    planned: all rows that this model needs, a line each.
    why_not: why nothing was measured, or "".
    """

    folder: Path
    planned: tuple[str, ...]
    written: int = 0
    changed: int = 0
    left: int = 0
    faults: tuple[str, ...] = ()
    why_not: str = ""

    def __str__(self) -> str:
        if self.why_not:
            return self.why_not
        left = f"; {self.left} are left: the same call goes on with them" if self.left else ""
        wrong = "".join(f"\nnot taken: {fault}" for fault in self.faults)
        return f"{self.written} rows written to {self.folder}, {self.changed} of them change what runs{left}{wrong}"


def tune(
    model: nn.Module, tokens: Sequence[int] = (1, 16, 2048), *,
    seconds: float | None = 30.0, again: bool = False, dry: bool = False, progress: bool = True,
) -> Tuning:  # fmt: skip
    """Measure what is fastest for the adapted layers of a model, and use it from now on, here and in later processes.

    For each size of the model's linear layers with LoRA, plain or quantized by bitsandbytes, and for each number of
    rows: which configuration of each kernel, and which implementation of the operator, in inference, in mixed batches
    and, from 256 rows on, in training; for a prefix the configurations of its attention. It runs on the model's own
    weights and random inputs, and changes nothing in the model. A result is compared with fp64 before it is timed; one
    that is further off than twice plain torch's error is reported and never taken. Another than the safe path is taken
    only where it wins beyond noise.

    Rows go to ``$PEFT_FAST_CACHE/tables``, by default ``~/.cache/peft_fast/tables``, each as soon as it is finished:
    after Ctrl-C, or when the time is over, the same call goes on with what is missing for this GPU and triton.

    Args:
        model: a PeftModel, or a model with LoRA layers, on an NVIDIA or AMD GPU.
        tokens: rows of a call, as tokens of a batch: 1 for the decoding of one sequence, 2048 for a prompt or a
            training step. Counted up to the next power of two; a row speaks for all numbers from the next smaller one.
        seconds: start nothing after this time; None: go on until all is measured.
        again: measure also what has a row, the oldest first.
        dry: measure nothing, only say what would be.
        progress: show a bar.
    Returns: what was done; on a CPU, with the reason why nothing was.
    Raises: ValueError for a model without such layers, tokens that are no positive numbers, or a model in pieces on
        several devices; RuntimeError where Triton cannot run on the GPU.
    """
    from csrc_triton import tables

    if not tokens or not all(isinstance(M, int) and M > 0 for M in tokens):
        raise ValueError(f"tune: tokens must be positive whole numbers, such as (1, 16, 2048), got {tokens!r}")
    shapes, dtype, device = models.shapes_of(model, tokens), models.dtype_of(model), models.device_of(model)
    todo = tasks(shapes, str(dtype).removeprefix("torch."))
    if not todo:
        raise ValueError(
            f"tune: this {type(model).__name__} has no linear layer with LoRA and no prefix, so there is nothing to "
            "tune: add an adapter first (get_peft_model, or PeftModel.from_pretrained)"
        )
    folder, planned = tables.user_folder(), tuple(task.name for task in todo)
    if dry:
        return Tuning(folder, planned, why_not=f"{len(planned)} rows would be measured and written to {folder}")
    if device.type != "cuda":
        return Tuning(folder, planned, why_not=f"plain torch runs on {device}, where the model is: nothing to tune")
    if failure := triton_failure(device):
        raise RuntimeError(f"tune: {failure}")
    setting = gpu_setting(
        device, dtype, _SECONDS, _MIN_ROUNDS, own=models.own_weights(model), heads=shapes.heads,
        adapter_dtype=models.adapter_dtype_of(model),
    )  # fmt: skip
    work = Work(setting, folder, provenance(device, f"peft_fast {__version__}"), todo, again)
    _run(work, seconds, progress)
    left = len(work.todo) - work.written
    return Tuning(folder, planned, work.written, work.changed, left, tuple(work.faults))


def _run(work: Work, seconds: float | None, progress: bool) -> None:
    from tqdm.auto import tqdm

    start = time.perf_counter()
    with tqdm(total=len(work.todo), desc="tune: compiling", unit="row", disable=not progress) as bar:
        work.compile(os.cpu_count() or 1, None if seconds is None else _SHARE_OF_COMPILING * seconds)
        bar.set_description("tune")
        work.ended = bar.update
        work.go_on(None if seconds is None else max(0.0, seconds - (time.perf_counter() - start)))
