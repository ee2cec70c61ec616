"""The parent: phases in child processes that are killed at their deadlines, and one JSON that is whole at any moment.

It never touches the GPU, so that children can be forked from it with everything imported.
"""

import collections
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

COLUMNS: dict[str, Any] = {
    "phase": "", "op": "", "impl": "", "config": "", "dtype": "", "adapters": "", "mode": "", "M": 0, "N": 0, "K": 0,
    "R": 0, "dropout": 0.0, "graph": False, "us_median": None, "us_q1": None, "us_q3": None, "gbps": None,
    "tflops": None, "share_of_ceiling": None, "err_share": None, "ok": True, "note": "", "case": "",
}  # fmt: skip


@dataclass
class Document:
    """What was found so far: "about" the machine, "phases" done, "rows" of ``COLUMNS``. Written after every case."""

    path: Path
    about: dict[str, Any] = field(default_factory=dict)
    phases: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, phase: str, found: dict[str, Any]) -> None:
        """A row; what it has besides its columns is kept. "work" becomes rates and a share of the ceiling."""
        row = {**COLUMNS, **found, "phase": phase}
        work, us = row.pop("work", None), row["us_median"]
        if work and us:
            row["gbps"], row["tflops"] = work["bytes"] / us / 1e3, work["flops"] / us / 1e6
            if ceilings := self.about.get("ceilings"):
                products = ceilings.get(work["dtype"], ceilings["bf16"])
                row["share_of_ceiling"] = max(work["flops"] / products, work["bytes"] / ceilings["bytes"]) / us * 1e6
        self.rows.append({name: _rounded(value) for name, value in row.items()})

    def write(self) -> None:
        """Replace the file by a whole new one."""
        found = {"about": self.about, "phases": self.phases, "rows": self.rows}
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps(found, indent=0, allow_nan=True) + "\n")
        new.replace(self.path)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class Phase:
    """A step of the run.

    seconds: its share of the time: it ends when its own and those before it are over, so what they left is its.
    case_seconds: a case that takes longer is killed.    workers: at the same time; 0: one for each core but one.
    timed: whether right results are timed.
    """

    name: str
    seconds: float
    case_seconds: float = 60.0
    workers: int = 1
    timed: bool = True


@dataclass
class _Worker:
    process: Any
    connection: Connection
    number: int = -1  # of the case in work
    since: float = 0.0


class Runner:
    """Runs phases, one after the other, until ``seconds`` are over.

    main: a child's function; cases_of: the names of a phase's cases. options: what children are told, as ``Here``.
    """

    def __init__(
        self, document: Document, seconds: float, main: Callable[..., None],
        cases_of: Callable[[str], Sequence[str]], options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.document, self.seconds, self.main, self.cases_of = document, seconds, main, cases_of
        self.options = options
        self.start = time.time()
        self.log = document.path.with_name("log.txt")
        self.cores = 2 if options["rehearse"] else len(os.sched_getaffinity(0))
        self.method = "fork"

    def run(self, phases: Sequence[Phase]) -> None:
        """Every phase gets its share of the time that there is."""
        total, ends = sum(phase.seconds for phase in phases), 0.0
        for place, phase in enumerate(phases):
            ends += phase.seconds
            until = self.start + self.seconds * ends / total
            self.phase(phase, until)
            if place == 0 and not any(row["ok"] for row in self.document.rows) and time.time() < until - 10:
                self.method = "spawn"  # the first may have failed because the parent touched the GPU after all
                self.phase(phase, until)

    def phase(self, phase: Phase, until: float) -> None:
        """One phase, to its end or to ``until``."""
        names = self.cases_of(phase.name)
        todo, workers = collections.deque(range(len(names))), []
        record = {"phase": phase.name, "cases": len(names), "done": 0, "seconds": 0.0, "note": ""}
        self.document.phases.append(record)
        begin, count = time.time(), min(len(names), phase.workers or self.cores - 1)
        try:
            self._until(until, phase, names, todo, workers, count, record)
        finally:
            for worker in workers:  # all before the first is waited for
                self._kill(worker)
            for worker in workers:
                self._lost(worker, phase, names, "cut at the end of the phase")
            record["seconds"] = time.time() - begin
            record["note"] = f"{len(todo)} cases not begun" if todo else ""
            self.document.write()

    def _until(
        self, until: float, phase: Phase, names: Sequence[str], todo: collections.deque[int], workers: list[_Worker],
        count: int, record: dict[str, Any],
    ) -> None:  # fmt: skip
        while (todo or workers) and time.time() < until:
            while todo and len(workers) < count:
                workers.append(self._started(phase, until, todo.popleft()))
            limits = [worker.since + phase.case_seconds for worker in workers]
            pause = max(0.0, min(until, *limits) - time.time())
            ready = wait([worker.connection for worker in workers], timeout=pause)
            for worker in list(workers):
                if worker.connection in ready:
                    alive = self._heard(worker, phase, names, todo, record)
                else:
                    alive = time.time() - worker.since < phase.case_seconds
                    if not alive:
                        self._lost(worker, phase, names, f"killed after {phase.case_seconds:.0f} s")
                if not alive:
                    workers.remove(worker)

    def _started(self, phase: Phase, until: float, number: int) -> _Worker:
        context: Any = multiprocessing.get_context(self.method)
        ours, theirs = context.Pipe()
        options = {**self.options, "timed": phase.timed, "until": until}
        process = context.Process(target=self.main, args=(phase.name, options, str(self.log), theirs), daemon=False)
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._hand(worker, number)
        return worker

    def _hand(self, worker: _Worker, number: int) -> None:
        worker.number, worker.since = number, time.time()
        worker.connection.send(number)

    def _heard(
        self, worker: _Worker, phase: Phase, names: Sequence[str], todo: collections.deque[int], record: dict[str, Any]
    ) -> bool:
        """Take one message; whether the worker goes on."""
        try:
            kind, found = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(5)
            self._lost(worker, phase, names, f"its process ended with {worker.process.exitcode}: log.txt says more")
            return False
        if kind == "about":
            self.document.about |= found
        elif kind == "row":
            self.document.add(phase.name, found)
        else:
            record["done"] += 1
            worker.number = -1
            self.document.write()
            if not todo or not found:
                self._end(worker)
                return False
            self._hand(worker, todo.popleft())
        return True

    def _lost(self, worker: _Worker, phase: Phase, names: Sequence[str], why: str) -> None:
        if worker.number >= 0:
            self.document.add(phase.name, {"case": names[worker.number], "ok": False, "note": why})
            self.document.write()
        self._end(worker)

    def _end(self, worker: _Worker) -> None:
        self._kill(worker)
        worker.connection.close()
        worker.process.join(1)

    def _kill(self, worker: _Worker) -> None:
        """The child and what it started: its group is its own from its first line on."""
        try:
            os.killpg(worker.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            worker.process.kill()
