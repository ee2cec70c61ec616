"""Whole tensors from those that are sharded over processes (DTensor): every process has to take part."""

import os
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

TIMEOUT_VARIABLE = "PEFT_FAST_GATHER_TIMEOUT"

# how often each group of ranks has gathered, the same number on all of them
_gathers: Counter[tuple[int, ...]] = Counter()


def roll_call(tensors: Iterable[Any], adapter_name: str) -> None:
    """Wait until all ranks that have a part of these tensors are here; without it one rank alone would hang.

    Does nothing for tensors that are whole, and where torch's store of this job is not to be had.
    Raises: RuntimeError naming the ranks that did not come in PEFT_FAST_GATHER_TIMEOUT seconds (300).
    """
    sharded = next((tensor for tensor in tensors if hasattr(tensor, "device_mesh")), None)
    if sharded is None:
        return
    ranks = tuple(sharded.device_mesh.mesh.flatten().tolist())
    try:
        store = dist.distributed_c10d._get_default_store()
    except (AttributeError, ValueError):
        return
    if len(ranks) == 1:
        return
    keys = {rank: f"peft_fast/gather/{ranks}/{_gathers[ranks]}/{rank}" for rank in ranks}
    store.set(keys[dist.get_rank()], "here")
    seconds = float(os.environ.get(TIMEOUT_VARIABLE) or 300)
    try:
        store.wait(list(keys.values()), timedelta(seconds=seconds))
    except RuntimeError as error:  # the store's errors are of this class
        absent = [rank for rank, key in keys.items() if not store.check([key])]
        raise RuntimeError(
            f"adapter {adapter_name!r} is sharded over ranks {list(ranks)}, and rank {dist.get_rank()} waited "
            f"{seconds:g} s for {absent}: call this on all ranks (save_pretrained with is_main_process=rank == 0, "
            f"where only the first is to write). {TIMEOUT_VARIABLE} sets another time."
        ) from error
    _gathers[ranks] += 1


def gathered(name: str, value: Any, adapter_name: str) -> Any:
    """The whole tensor where `value` is sharded over processes; `value` itself otherwise.

    Raises: RuntimeError if another rank broke off.
    """
    if not hasattr(value, "full_tensor"):
        return value
    try:
        return value.full_tensor()
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"adapter {adapter_name!r}: tensor {name!r} is sharded over several processes and cannot be gathered: "
            f"call this on all ranks (every rank has to take part), or pass a gathered state_dict. Got: {error}"
        ) from error
