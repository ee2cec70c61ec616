"""What peft_fast.planning.plan predicts beside what was measured: is the model of costs to be believed?

A layer's time is predicted from its flops and bytes; a whole model's step from its configuration alone, as
``peft-fast plan`` does, called eagerly. The machine is the one measured: its ceilings, and the time of a tiny product
as the cost of a launch.
"""

import dataclasses
import statistics
from typing import Any, NamedTuple

from peft_fast.planning import plan

from .rows import Files, all_rows, time_in_words, words_of

SPEAKS_FOR = ("base", "peft_fast")  # what the model of costs describes


class Prediction(NamedTuple):
    """A row, its time predicted and measured in seconds, and what bounds it."""

    group: str
    words: str
    provider: str
    predicted: float
    measured: float
    bound: str

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured; negative: it was too fast."""
        return self.predicted / self.measured - 1


def predictions(files: Files) -> list[Prediction]:
    """Of every row of the base and of peft_fast whose work is known."""
    return [
        Prediction(info["group"], words_of(info), info["provider"], *found)
        for result in files.values()
        if "bytes" in result["peft_fast"].get("ceilings", {})
        for info in all_rows(result)
        if info["provider"] in SPEAKS_FOR and not info.get("wrong")
        and (found := _predicted(info, _machine(result["peft_fast"]))) is not None
    ]  # fmt: skip


def _machine(about: dict[str, Any]) -> plan.Machine:
    return plan.Machine.measured(about["device"], about["ceilings"])


def _predicted(info: dict[str, Any], machine: plan.Machine) -> tuple[float, float, str] | None:
    """(predicted, measured, bound)."""
    if "plan" in info:
        model = plan.Model.from_config(info["plan"]["config"])
        if info["dtype"] == "fp32":  # the plan's models are in bf16: twice its bytes, at the other rate
            rates = {"bf16": machine.flops_per_second["fp32"]}
            machine = dataclasses.replace(
                machine, bytes_per_second=machine.bytes_per_second / 2, flops_per_second=rates
            )
        step = plan.step(model, plan.Workload(**info["plan"]["workload"], graph=False), machine)
        return step.total, info["median"], step.bound
    if {"flops", "bytes", "dtype"} <= info.keys() and info["dtype"] in machine.flops_per_second:
        seconds, bound = plan.predicted_seconds(
            info["flops"], info["bytes"], machine, info["dtype"], info.get("launches", 1)
        )
        return seconds, info["median"], bound
    return None


def summary(found: list[Prediction]) -> list[tuple[str, ...]]:
    """Cells by group and provider: how many, the median error, the quartiles of it."""
    groups: dict[tuple[str, str], list[float]] = {}
    for p in found:
        groups.setdefault((p.group, p.provider), []).append(p.error)
    rows = []
    for (group, provider), errors in groups.items():
        low, middle, high = statistics.quantiles(errors, n=4) if len(errors) > 1 else errors * 3
        rows.append((group, provider, str(len(errors)), f"{middle:+.0%}", f"{low:+.0%} to {high:+.0%}"))
    return rows


def lines(found: list[Prediction]) -> list[str]:
    """A table of all, then of the groups."""
    width = max((len(p.words) for p in found), default=0)
    text = [
        f"{'predicted by peft_fast.planning':<{width}} {'':<10} {'predicted':>10} {'measured':>10} {'error':>6}  bound"
    ]
    text += [
        f"{p.words:<{width}} {p.provider:<10} {time_in_words(p.predicted):>10} {time_in_words(p.measured):>10} "
        f"{p.error:>+6.0%}  {p.bound}" for p in found
    ]  # fmt: skip
    text += ["", f"{'error of the predictions':<26} {'':<10} {'rows':>5} {'median':>7}  quartiles"]
    text += [f"{row[0]:<26} {row[1]:<10} {row[2]:>5} {row[3]:>7}  {row[4]}" for row in summary(found)]
    return text
