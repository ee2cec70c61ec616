"""Kernels whose programs wait for each other, with more programs than fit; graphs replayed with other adapters."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import measure
from ..cases.kinds import MixedOpCase
from ..subjects import mixed_sites
from .here import Here, Row, in_short, poisoned
from .quantized import four_bit, plain

_LAUNCHES = 3000
_ROWS = 32


def _case(here: Here, N: int) -> MixedOpCase:
    case = MixedOpCase("up", 4096, N, _ROWS, _ROWS)
    return replace(case, K=64, N=64, M=3, adapters=3) if here.rehearse else case


def _about(case: MixedOpCase, op: str, impl: str, mode: str) -> Row:
    sizes = dict(M=case.M, N=case.N, K=case.K, R=max(case.ranks))
    return dict(op=op, impl=impl, mode=mode, dtype="bfloat16", adapters=f"{case.adapters} bfloat16", **sizes)


def race_rows(op: str, N: int, here: Here) -> Iterator[Row]:
    """The same call thousands of times beside copies on another stream, in memory full of NaN: always the same bits."""
    from peft_fast.ops.fourbit_linear import linear_mixed_4bit
    from peft_fast.ops.functional import lora_linear_mixed, mixed_plan

    case, device = _case(here, N), here.device
    site = mixed_sites.make_site(case, device, 0)
    weights, x = site.copies[0], site.x
    table = mixed_sites._table(weights, device)
    plan = mixed_plan(torch.tensor(case.slots, dtype=torch.int32, device=device), case.adapters, 1)
    if op == "lora_linear_mixed_4bit":
        packed = four_bit(case.N, case.K, device)
        weights.w = plain(packed, x.dtype)

        def call() -> Tensor:
            return linear_mixed_4bit(x, *packed[:-1], None, *table, *plan, "kernel")
    else:

        def call() -> Tensor:
            return lora_linear_mixed(x, weights.w, table, plan, implementation="one_launch")

    row = _about(case, op, "peft_fast:one_launch", "race")
    with torch.no_grad(), poisoned():
        first = call().clone()
        truth, same = mixed_sites.exact(site, True), mixed_sites.plain(site)
        share = measure.error_over_budget([first], [same], [truth])[1]
        launches, different = _repeated(call, first, here)
    note = f"{launches} launches, {different} with other bits"
    yield {**row, "err_share": share, "ok": share <= 1 and different == 0, "note": note}


def _repeated(call: Callable[[], Tensor], first: Tensor, here: Here) -> tuple[int, int]:
    """(launches, how many gave something else)."""
    different = torch.zeros((), dtype=torch.int64, device=here.device)
    source = torch.zeros(1 << (10 if here.rehearse else 24), device=here.device)
    target = torch.zeros_like(source)
    beside = torch.cuda.Stream() if here.on_gpu else None
    launches = 0
    while launches < (2 if here.rehearse else _LAUNCHES) and here.left > 5:
        if beside is not None:
            with torch.cuda.stream(beside):
                target.copy_(source)
        different += (call() != first).any()
        launches += 1
        if launches % 100 == 0:
            here.synchronize()
    here.synchronize()
    return launches, int(different)


def graph_rows(here: Here) -> Iterator[Row]:
    """A graph captured while all rows have one adapter, replayed with one for each row, and with none."""
    from peft_fast.ops.functional import lora_linear_mixed, mixed_plan

    case, device = _case(here, 4096), here.device
    site = mixed_sites.make_site(case, device, 0)
    weights, x = site.copies[0], site.x
    table = mixed_sites._table(weights, device)
    slots = torch.zeros(case.M, dtype=torch.int32, device=device)
    mixes = {"all": torch.tensor(case.slots, dtype=torch.int32), "none": torch.full((case.M,), -1), "one": slots.cpu()}

    for impl in ("grouped", "split", "one_launch"):

        def step(i: int, impl: str = impl) -> Tensor:
            plan = mixed_plan(slots, case.adapters, 1)
            return lora_linear_mixed(x, weights.w, table, plan, implementation=impl)

        row = {**_about(case, "lora_mixed", f"peft_fast:{impl}", "graph"), "graph": True}
        try:
            with torch.no_grad():
                slots.zero_()
                replay = here.graphed(step, 1)
                for name, mix in mixes.items():
                    slots.copy_(mix)
                    replayed = replay(0).clone()
                    groups = {slot: (mix == slot).nonzero()[:, 0].to(device) for slot in set(mix.tolist()) - {-1}}
                    truth = mixed_sites.by_formula(x.double(), weights, groups)
                    same = mixed_sites.by_formula(x, weights, groups)
                    share = measure.error_over_budget([replayed], [same], [truth])[1]
                    yield {**row, "err_share": share, "ok": share <= 1, "note": f"replayed with {name}"}
        except Exception as error:
            here.synchronize()
            yield {**row, "ok": False, "note": in_short(error)}


RACES: dict[str, Any] = {
    "one launch, 28672 columns": ("lora_mixed", 28672),
    "one launch, 4096 columns": ("lora_mixed", 4096),
    "4 bits, 28672 columns": ("lora_linear_mixed_4bit", 28672),
}
