"""What a case sees of the machine, and how a case that compares several calls is checked and timed."""

import functools
import importlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .. import measure
from ..subjects.subject import Call, Subject, TakesNoPart

Row = dict[str, Any]
_POISON = 127  # of integers; floats are NaN


@dataclass
class Here:
    """A child's machine.

    rehearse: CPU tensors, tiny sizes and Triton's interpreter.    timed: whether right results are timed as well.
    until: when the phase ends (``time.time()``).    seconds: how long to time the calls of a case.
    folder: where the JSON is.    first: the JSON of the first run, in a second.
    """

    device: torch.device
    rehearse: bool = False
    timed: bool = True
    until: float = float("inf")
    seconds: float = 0.3
    folder: str = "."
    first: str = ""
    tiny_models: bool = field(init=False)

    def __post_init__(self) -> None:
        self.tiny_models = self.rehearse

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def cache_bytes(self) -> int:
        """What a repeated call may find in the cache; 0 where nothing is timed: one copy of the weights will do."""
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.on_gpu and self.timed else 0

    @property
    def left(self) -> float:
        """Seconds until the phase ends."""
        return self.until - time.time()

    def times(self, functions: dict[str, Call]) -> dict[str, list[float]]:
        """Seconds per call of each function, an entry per round."""
        if self.rehearse:
            return {name: [measure.sample(function, 1, self.device)] for name, function in functions.items()}
        return measure.interleaved(functions, self.device, self.seconds)

    def graphed(self, function: Call, calls: int) -> Call:
        """As ``measure.graphed``; without a GPU the calls themselves."""
        return measure.graphed(function, calls) if self.on_gpu else lambda i: [function(j) for j in range(calls)][-1]

    def synchronize(self) -> None:
        """Raises: RuntimeError when a kernel failed; nothing works in the process from then on."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, new memory holds NaN (integers 127): an element that no kernel writes, or one read too early, shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else _POISON)

        return made

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty)),
    ):
        yield


def configured(kernel: str, config: dict[str, int], call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` with ``kernel`` run by ``config`` instead of its default."""
    from csrc_triton.common.tuning import trying

    @functools.wraps(call)
    def with_config(*args: Any) -> Any:
        with trying(kernel, config):
            return call(*args)

    return with_config


def configs(
    kernel: str, device: torch.device, rank: int, most: int, itemsize: int = 2, rows: int = 0
) -> dict[str, dict[str, int]]:
    """Up to ``most`` candidates of a kernel on this device, by label. rows: of x, where a program has to hold all."""
    for module in ("lora.linear", "mixed.linear", "quantized.fourbit_linear", "prefix.attention_bwd"):
        importlib.import_module(f"csrc_triton.{module}")  # each names its candidates
    from csrc_triton.common.tuning import arch_of, block_r, candidates_for

    found = [c for c in candidates_for(kernel, arch_of(device), itemsize) if block_r(rank) <= c.max_rank]
    return {c.label: c.config for c in [c for c in found if c.blocks["BLOCK_M"] >= rows][:most]}


def measure_subject(subject: Subject, here: Here, about: Row) -> Iterator[Row]:
    """The rows of a case: who is right, and if asked, how long they take, eager and as replays of a CUDA graph.

    A provider is named IMPL or IMPL@CONFIG. Who cannot run here gets a row that says why; who is wrong is not timed.
    """
    functions: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    for name in subject.providers(subject.case, subject.device):
        impl, _, config = name.partition("@")
        row = rows[name] = {**about, "impl": impl, "config": config}
        try:
            with poisoned():
                _, share = subject.error(name)
            row |= {"err_share": share, "ok": share <= 1}
            if not row["ok"]:
                yield {**row, "note": "wrong"}
            elif here.timed:
                functions[name] = subject.runner(name)
            else:
                yield row
        except (TakesNoPart, ImportError) as reason:
            yield {**row, "note": f"takes no part: {reason}"}
        except Exception as error:  # the others of this case are measured all the same
            here.synchronize()
            yield {**row, "ok": False, "note": in_short(error)}
    subject.checked()
    if functions:
        yield from timings(subject, here, rows, functions)
    subject.close()


def timings(subject: Subject, here: Here, rows: dict[str, Row], functions: dict[str, Call]) -> Iterator[Row]:
    """The rows of calls that are right, with their times."""
    for name, times in here.times(functions).items():
        yield {**rows[name], **in_us(times), **work_of(subject, name)}
    graphs: dict[str, Call] = {}
    counts = {name: min(subject.capturable(name), 1 if here.rehearse else 64) for name in functions}
    for name, count in counts.items():
        if not count:
            continue
        try:
            eager = functions[name](count - 1)
            graphs[name] = here.graphed(subject.captured_runner(name), count)
            if isinstance(eager, Tensor) and not torch.equal(graphs[name](0), eager):
                share = measure.error_over_budget([graphs[name](0)], [eager], [eager.double()])[1]
                if share > 1:
                    raise RuntimeError("the replay of the graph gives something else than the call captured")
        except Exception as error:
            graphs.pop(name, None)
            here.synchronize()
            yield {**rows[name], "graph": True, "ok": False, "note": in_short(error)}
    for name, times in here.times(graphs).items() if graphs else ():
        yield {**rows[name], "graph": True, **in_us([t / counts[name] for t in times]), **work_of(subject, name)}


def work_of(subject: Subject, name: str) -> Row:
    """What the parent makes GB/s, TFLOP/s and a share of the ceiling of."""
    work = subject.work(name.partition("@")[0])
    return {} if work is None else {"work": {"flops": work.flops, "bytes": work.bytes, "dtype": work.dtype}}


def in_us(times: list[float]) -> Row:
    """Median and quartiles of seconds, in us."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"us_median": middle * 1e6, "us_q1": low * 1e6, "us_q3": high * 1e6}


def in_short(error: BaseException) -> str:
    """An error in a line, with the place it comes from."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error).strip()[:300]} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
