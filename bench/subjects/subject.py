"""A case made ready to be measured, and what all kinds of cases have in common when they are.

Everyone who takes part is compared with fp64 first; those that are right are timed in interleaved rounds. A wrong
result is never timed.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import measure

if TYPE_CHECKING:
    from ..session import Session

Call = Callable[[int], Any]
PEFT_FAST = "peft_fast"


class TakesNoPart(Exception):
    """A provider cannot run this case here; the message says why."""


class Work(NamedTuple):
    """What a call has to do at least: the roofline's numbers.

    dtype: of its products, "bf16" or "fp32".    launches: operators that are called, for the prediction of its time.
    """

    flops: float
    bytes: float
    dtype: str
    launches: int = 1


class Compared(NamedTuple):
    """What a provider gives, what plain torch (or peft) gives in the same dtype, and fp64."""

    out: Sequence[Tensor]
    same: Sequence[Tensor]
    exact: Sequence[Tensor]


class Subject:
    """One case: who takes part, what is right, what to call. A kind of cases is a subclass.

    group: the kind, in words.    norm: in which errors are measured (``measure.error_over_budget``).
    base: whose time the others' are multiples of, if it takes part.    rivals: among whom the strongest is looked for.
    seconds, min_rounds: how long to measure.    memory: whether a call's memory is measured on a CPU too.
    """

    group: str
    norm = math.inf
    base = "base"
    rivals: tuple[str, ...] = ("plain torch", "plain torch compiled", "peft", "peft compiled")
    seconds = 2.5
    min_rounds = 7
    memory = False

    def __init__(self, case: Any, session: "Session") -> None:
        self.case, self.device = case, session.device

    @classmethod
    def providers(cls, case: Any, device: torch.device) -> Sequence[str]:
        """Who takes part, before anything is made."""
        raise NotImplementedError

    def compared(self, name: str) -> Compared:
        """What a provider gives beside what is right. Raises: TakesNoPart."""
        raise NotImplementedError

    def error(self, name: str) -> tuple[float, float]:
        """(relative error, share of the error budget); a share above 1 is wrong. Raises: TakesNoPart."""
        return measure.error_over_budget(*self.compared(name), norm=self.norm)

    def checked(self) -> None:
        """All providers were compared: what was made for that may go."""

    def runner(self, name: str) -> Call:
        """The function to time; call i uses copy i of what should not be found in the cache."""
        raise NotImplementedError

    def work(self, name: str) -> Work | None:
        """None where it is not counted."""
        return None

    def loss(self, name: str) -> tuple[Callable[[], Any], Sequence[Tensor]] | None:
        """(a forward that keeps what the backward needs, tensors that are there anyway); None: not measured."""
        return None

    def capturable(self, name: str) -> int:
        """How many calls to capture in one CUDA graph; 0: it cannot be, or would say nothing."""
        return 0

    def captured_runner(self, name: str) -> Call:
        """What is captured."""
        return self.runner(name)

    def tokens(self) -> int:
        """Tokens that a call computes or makes; 0: no rate is told."""
        return 0

    def facts(self, name: str) -> dict[str, Any]:
        """What the file should say besides."""
        return {}

    def timed(self, functions: dict[str, Call], seconds: float) -> dict[str, list[float]]:
        """Seconds per call of each, an entry per round."""
        return measure.interleaved(functions, self.device, seconds, self.min_rounds)

    def close(self) -> None:
        """Measured."""


@dataclass
class Measured:
    """Everything known about a case: per provider its samples and what the file should say beside them."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    info: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # provider -> why

    def add_ratios(self, base: str) -> None:
        """Per provider but the base: its time over the base's and over peft's in the same round."""
        for name in self.samples.keys() - {base}:
            for to, key in ((base, "ratio_to_base"), ("peft", "ratio_to_peft")):
                if to in self.samples and to != name:
                    self.info[name][key] = measure.ratio(self.samples, name, to)

    def add_strongest(self, rivals: Sequence[str]) -> None:
        """Of peft_fast: its time over that of the rival with the least median, in the same round."""
        found = [name for name in rivals if name in self.samples]
        if PEFT_FAST in self.samples and found:
            best = min(found, key=lambda name: statistics.median(self.samples[name]))
            ratio = measure.ratio(self.samples, PEFT_FAST, best)
            self.info[PEFT_FAST] |= {"strongest": best, "ratio_to_strongest": ratio}


def measure_case(subject: Subject, session: "Session") -> Measured:
    """Compare, then time, all who take part in a case. Wrong ones are noted in ``session.wrong`` too."""
    result, functions = Measured(), {}
    about = {"case": str(subject.case), "words": subject.case.words, "group": subject.group}
    about |= {"sweeps": session.sweeps_of(subject.case), **_targets(subject.case)}
    for name in subject.providers(subject.case, subject.device):
        try:
            error, share = subject.error(name)
            function = subject.runner(name)
        except TakesNoPart as reason:
            result.absent[name] = str(reason)
            continue
        told = {"provider": name, "error": error, "error_over_budget": share}
        result.info[name] = {**about, **told, **subject.facts(name)}
        if share > 1:
            session.wrong.append(result.info[name])
        else:
            functions[name] = function
    subject.checked()
    for name in functions:
        _add_memory(subject, name, functions[name], result)
    result.samples = subject.timed(functions, session.budget(subject.seconds))
    for name, times in result.samples.items():
        _add_rates(subject, name, statistics.median(times), session.ceilings(), result.info[name])
    result.add_ratios(subject.base)
    result.add_strongest(subject.rivals)
    if session.device.type == "cuda":
        _add_graphs(subject, list(functions), result, session)
    subject.close()
    return result


def _targets(case: Any) -> dict[str, float]:
    """What a case should reach: "aim", its time over the base's; "must", peft's over its."""
    found = {name: getattr(case, name, None) for name in ("aim", "must")}
    return {name: value for name, value in found.items() if value is not None}


def _add_rates(subject: Subject, name: str, seconds: float, ceilings: dict[str, float], info: dict[str, Any]) -> None:
    work = subject.work(name)
    if work is not None:
        floor = max(work.flops / ceilings[work.dtype], work.bytes / ceilings["bytes"])
        info |= {**work._asdict(), "roofline_seconds": floor, "share_of_roofline": floor / seconds}
    if tokens := subject.tokens():
        info["tokens_per_second"] = round(tokens / seconds, 1)


def _add_memory(subject: Subject, name: str, function: Call, result: Measured) -> None:
    """Growth of memory over a call: at its peak, and what autograd keeps between forward and backward."""
    if not subject.memory and subject.device.type != "cuda":
        return
    function(0)
    with measure.PeakMemory(subject.device) as memory:
        function(0)
    info, base = result.info[name], result.info.get(subject.base, {})
    info["peak_bytes"] = memory.bytes
    if (loss := subject.loss(name)) is not None:
        info["saved_bytes"] = measure.saved_bytes(*loss)
    for what in ("peak_bytes", "saved_bytes"):
        if base.get(what) and what in info:
            info[f"{what}_to_base"] = round(info[what] / base[what], 4)


def _add_graphs(subject: Subject, names: Sequence[str], result: Measured, session: "Session") -> None:
    """The time of a call when a CUDA graph is replayed. Raises: RuntimeError if a replay gives something else."""
    counts, graphs = {name: subject.capturable(name) for name in names}, {}
    for name, count in counts.items():
        if count:
            function = subject.captured_runner(name)
            graphs[name] = measure.graphed(function, count)
            _check_replay(name, graphs[name](0), function(count - 1))
    if not graphs:
        return
    samples = measure.interleaved(graphs, subject.device, session.budget(subject.seconds), subject.min_rounds)
    samples = {name: [t / counts[name] for t in times] for name, times in samples.items()}
    replayed = Measured(samples, {name: {} for name in samples})
    replayed.add_ratios(subject.base)
    for name, times in samples.items():
        low, middle, high = statistics.quantiles(times, n=4)
        result.info[name]["graph"] = {"median": middle, "low": low, "high": high, **replayed.info[name]}


def _check_replay(name: str, replayed: Any, eager: Any) -> None:
    if isinstance(eager, Tensor):
        share = measure.error_over_budget([replayed], [eager], [eager.double()], norm=2)[1]
        if share > 1:
            raise RuntimeError(f"{name}: the replay of a CUDA graph gives something else than the call captured")
