"""All rows of a run: which there are, in what order, and how far it got. A finished row is written at once."""

import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..ops import choice as choices
from . import case as cases
from .case import Setting
from .kernels import Job, jobs
from .measure import Outcome, measure_choice, measure_configs, offered_configs, trying
from .operators import Choice, choices as choices_of
from .shapes import Shapes
from .table import Provenance, Row, Table

CONFIGS, CHOICES = "configs.json", "choice.json"
_COMPILERS = 32  # threads at most


@dataclass(frozen=True)
class Task:
    """One row to be: of which file, its key, how to come by it, and the key of a row that has to be there before.

    compile: makes the calls whose kernels it needs.
    """

    file: str
    key: Row
    measure: Callable[[Setting], Outcome]
    compile: Callable[[Setting], None]
    after: Row | None = None

    @property
    def of(self) -> str:
        """Kernel or operator."""
        return str(self.key.get("kernel") or self.key["op"])

    @property
    def name(self) -> str:
        """Kernel or operator, and sizes, as the lines show them."""
        sizes = " ".join(f"{name}={self.key[name]}" for name in "MNKR" if self.key[name])
        return f"{self.of} {self.key['dtype']} {sizes}{' dropout' if self.key.get('dropout') else ''}"


def tasks(shapes: Shapes, dtype_name: str) -> list[Task]:
    """All rows for these shapes: few tokens first, and what an operator's row is measured with before it."""
    found = []
    for job in jobs(shapes):
        for size in job.sizes:
            key = dict(kernel=job.kernel, dtype=dtype_name, **dict(zip("MNKR", size, strict=True)))
            found.append(_kernel_task(job, size, key))
    for choice in choices_of(shapes):
        M, N, K, R = choice.size
        key = dict(op=choice.op, dtype=dtype_name, dropout=choice.dropout, M=M, N=N, K=K, R=R)
        after = None if choice.smaller is None else key | dict(M=choice.smaller)
        found.append(_operator_task(choice, key, after))
    return sorted(found, key=lambda task: (task.key["M"], task.file == CHOICES))


def _kernel_task(job: Job, size: tuple[int, int, int, int], key: Row) -> Task:
    def compile(on: Setting) -> None:
        made = job.case(on, size)
        inputs = made.inputs()
        for config in offered_configs(on, job, size):
            trying(job.kernel, config, made.run)(*inputs)

    return Task(CONFIGS, key, lambda on: measure_configs(on, job, size), compile)


def _operator_task(choice: Choice, key: Row, after: Row | None) -> Task:
    def compile(on: Setting) -> None:
        for use in choice.uses(on):
            inputs = use.case(choice.names[0]).inputs()
            for name in choice.names:
                use.case(name).run(*inputs)

    return Task(CHOICES, key, lambda on: measure_choice(on, choice), compile, after)


@dataclass
class Work:
    """The tasks of one run and how far it got.

    say: gets a line for every finished row.    ended: called after every task.
    """

    setting: Setting
    folder: Path
    provenance: Provenance
    tasks: Sequence[Task]
    again: bool = False
    say: Callable[[str], None] = lambda line: None
    ended: Callable[[], None] = lambda: None
    written: int = 0
    changed: int = 0
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tasks = [task for task in self.tasks if self._is_offered(task)]
        self.tables = {name: Table(self.folder / name, self.provenance) for name in (CONFIGS, CHOICES)}
        self.todo = self._todo()

    def _is_offered(self, task: Task) -> bool:
        """Whether the GPU's architecture has the kernel at all."""
        from csrc_triton.common import aot, tuning

        aot.kernel_modules()  # which name their candidates when they are imported
        return task.file == CHOICES or any(
            tuning.candidates_for(task.of, self.setting.arch, self.setting.dtype.itemsize)
        )

    def _todo(self) -> list[Task]:
        """What has no row; again: all, what has none first, then the oldest, so that a run cut short is no loss."""
        dates = [(self.tables[task.file].find(task.key) or {}).get("date", "") for task in self.tasks]
        if not self.again:
            return [task for task, date in zip(self.tasks, dates, strict=True) if not date]
        return [self.tasks[i] for i in sorted(range(len(dates)), key=lambda i: dates[i])]

    def compile(self, threads: int, seconds: float | None = None) -> None:
        """Compile what the tasks will launch, several kernels at a time; tasks that begin after ``seconds`` do it
        themselves."""
        from csrc_triton.common import launch

        start = time.perf_counter()
        with launch.compile_only(min(threads, _COMPILERS)):
            for task in self.todo:
                if seconds is not None and time.perf_counter() - start >= seconds:
                    break
                try:
                    task.compile(self.setting)
                except Exception as error:  # it will say so again when it is measured
                    cases.in_one_line(error)

    def go_on(self, seconds: float | None = None) -> None:
        """Do the tasks in order until none is left, or ``seconds`` are over. Kernels run as the rows so far say."""
        from csrc_triton import tables

        start = time.perf_counter()
        with tables.using(self.folder):
            forget()
            for task in self.todo:
                if seconds is not None and time.perf_counter() - start >= seconds:
                    break
                self._do(task)
                self.ended()
        forget()

    def _do(self, task: Task) -> None:
        table = self.tables[task.file]
        # without the row below, this one would speak for what it did not measure
        if task.after is not None and table.find(task.after) is None:
            self.say(f"{task.name}: waits for the row of M={task.after['M']}")
            return
        try:
            outcome = task.measure(self.setting)
        except Exception as error:  # of this shape alone, such as too little memory
            outcome = Outcome(None, "no row", [cases.in_one_line(error)])
        if outcome.values is not None:
            table.put(task.key, outcome.values)
            forget()
            self.written += 1
            self.changed += not outcome.default_won
        self.faults += [f"{task.name}: {fault}" for fault in outcome.faults]
        for line in [*outcome.faults, outcome.text]:
            self.say(f"{task.name}: {line}")

    def summary(self) -> str:
        """In one line."""
        left = len(self.todo) - self.written
        return (
            f"{self.written} rows written, {self.changed} of them with another than the default; "
            f"{len(self.faults)} faults; {left} shapes left" + (", the same command goes on" if left else "")
        )


def forget() -> None:
    """Rows have changed: look them up again, in a model that is running too."""
    from csrc_triton.common import tuning

    tuning.forget()
    choices.forget()


def gpu_setting(device: torch.device, dtype: torch.dtype, seconds: float, min_rounds: int, **own: Any) -> Setting:
    """How to measure on a GPU; ``own``: of a model, see Setting."""
    from csrc_triton.common.tuning import arch_of

    properties = torch.cuda.get_device_properties(device)
    cache: int = properties.L2_cache_size
    return Setting(properties.name, device, dtype, arch_of(device), cache, seconds, min_rounds, dry=False, **own)


def provenance(device: torch.device, commit: str) -> Provenance:
    """Of rows that are measured on this GPU."""
    from csrc_triton import tables

    gpu = tables.gpu_of(device)
    return Provenance(gpu.arch, gpu.name, torch.__version__, triton_version(), commit)


def triton_version() -> str:
    """As tables have it: "3.9" of 3.9.0."""
    return ".".join(importlib.metadata.version("triton").split(".")[:2])
