"""Fill csrc_triton's tables on this GPU: the fastest configuration of each kernel, then the implementation of each op.

Every finished row is written at once; the same command goes on with what is missing for this GPU and triton.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import tune_case
from .measure import commit
from .tune_case import Case, Checker, Setting, Times
from .tune_table import Provenance, Row, Table

TABLES = Path(__file__).parent.parent / "csrc_triton" / "tables"
CONFIGS, CHOICES = "configs.json", "choice.json"
FILES = {"configs": CONFIGS, "choices": CHOICES}
INTERPRETER = "interpreter"  # the GPU's name in a dry run's rows


class Outcome(NamedTuple):
    """values: what the row gets beside its key, None where there is none to write.    text: for the line.

    faults: what was wrong, one line each.    default_won: nothing was faster beyond noise.
    """

    values: Row | None
    text: str
    faults: list[str]
    default_won: bool = True


@dataclass(frozen=True)
class Task:
    """One row to be: of which file, its key, how to come by it, and the key of a row that has to be there before."""

    file: str
    key: Row
    measure: Callable[[Setting], Outcome]
    after: Row | None = None

    @property
    def of(self) -> str:
        """Kernel or op."""
        return str(self.key.get("kernel") or self.key["op"])

    @property
    def name(self) -> str:
        """Kernel or op, and sizes, as the lines show them."""
        sizes = " ".join(f"{name}={self.key[name]}" for name in "MNKR" if self.key[name])
        return f"{self.of} {self.key['dtype']} {sizes}{' dropout' if self.key.get('dropout') else ''}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m bench tune``."""
    parser.epilog = (
        "Every finished row is written at once, and the same command goes on with what is missing for this GPU and "
        "triton. Exit status: 0, also when the time was over; 1: a result was wrong; 2: it cannot run; 130: Ctrl-C."
    )
    parser.add_argument("--only", choices=tuple(FILES), help="only this table; default: configs, then choices")
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="only these kernels and ops, such as lora_gemm")
    parser.add_argument("--again", action="store_true", help="measure also what is there, the oldest rows first")
    parser.add_argument(
        "--seconds", type=float, metavar="BUDGET", help="start nothing after this time; the same command goes on"
    )
    parser.add_argument(
        "--tables", type=Path, metavar="DIR", help="read and write the tables here; default: csrc_triton/tables"
    )
    parser.add_argument(
        "--dry", action="store_true", help="try it without a GPU: tiny sizes in Triton's interpreter; needs --tables"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0; 1 if a result was wrong; 2 if it cannot run; 130 after Ctrl-C. What was finished is in the tables."""
    problem = _cannot_run(args)
    if problem:
        print(f"python -m bench tune: {problem}", file=sys.stderr)
        return 2
    import triton

    setting = _setting(args.dry)
    version = ".".join(triton.__version__.split(".")[:2])
    where = Provenance(setting.gpu, torch.__version__, version, commit())
    folder = args.tables or TABLES
    tables = {name: Table(folder / name, where) for name in (CONFIGS, CHOICES)}
    tasks = [task for task in _tasks(setting) if args.only is None or task.file == FILES[args.only]]
    known = list(dict.fromkeys(task.of for task in tasks))
    if unknown := sorted(set(args.kernel or ()) - set(known)):
        print(f"python -m bench tune: unknown {', '.join(unknown)}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    tasks = [task for task in tasks if not args.kernel or task.of in args.kernel]
    todo = _todo(tasks, tables, args.again)
    print(f"tune: {len(todo)} of {len(tasks)} shapes left for {setting.gpu}, triton {version}", flush=True)
    work = Work(setting, tables, todo)
    try:
        work.go_on(args.seconds)
    except KeyboardInterrupt:
        print(f"tune: interrupted; {work.summary()}", flush=True)
        return 130
    print(f"tune: {work.summary()}")
    return 1 if work.faults else 0


@dataclass
class Work:
    """The tasks of one run and how far it got."""

    setting: Setting
    tables: dict[str, Table]
    todo: list[Task]
    written: int = 0
    changed: int = 0
    faults: int = 0

    def go_on(self, seconds: float | None) -> None:
        """Do the tasks in order until none is left, or ``seconds`` are over."""
        from csrc_triton.common import tuning

        start = time.perf_counter()
        for task in self.todo:
            if seconds is not None and time.perf_counter() - start >= seconds:
                break
            table = self.tables[task.file]
            # without the row below, this one would speak for what it did not measure
            if task.after is not None and table.find(task.after) is None:
                print(f"{task.name}: waits for the row of M={task.after['M']}", flush=True)
                continue
            if task.file == CHOICES and self.tables[CONFIGS].path.exists():
                tuning.use_table(self.tables[CONFIGS].path)  # kernels run as they will
            try:
                outcome = task.measure(self.setting)
            except Exception as error:  # of this shape alone, such as too little memory
                outcome = Outcome(None, "no row", [tune_case.in_one_line(error)])
            if outcome.values is not None:
                table.put(task.key, outcome.values)
                self.written += 1
                self.changed += not outcome.default_won
            self.faults += len(outcome.faults)
            for line in [*outcome.faults, outcome.text]:
                print(f"{task.name}: {line}", flush=True)

    def summary(self) -> str:
        """In one line."""
        left = len(self.todo) - self.written
        return (
            f"{self.written} rows written, {self.changed} of them with another than the default; "
            f"{self.faults} faults; {left} shapes left" + (", the same command goes on" if left else "")
        )


def _cannot_run(args: argparse.Namespace) -> str | None:
    if args.dry and (args.tables is None or args.tables.resolve() == TABLES.resolve()):
        return "--dry writes rows of no use: give it --tables DIR, another folder than csrc_triton/tables"
    if args.dry and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton
    except ImportError:
        return "needs triton: pip install triton"
    if args.dry and not triton.knobs.runtime.interpret:
        return "--dry needs Triton's interpreter: set TRITON_INTERPRET=1"
    if not args.dry and not torch.cuda.is_available():
        return "needs a GPU, and torch sees none; --dry --tables DIR tries it in Triton's interpreter"
    return None


def _setting(dry: bool) -> Setting:
    from csrc_triton.common.tuning import arch_of

    if dry:
        device = torch.device("cpu")
        # its tl.dot multiplies the bit patterns of bf16
        return Setting(INTERPRETER, device, torch.float16, arch_of(device), 0, 0.0, 2, dry=True)
    device = torch.device("cuda", torch.cuda.current_device())
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return Setting(
        torch.cuda.get_device_name(device), device, torch.bfloat16, arch_of(device), cache, 0.2, 11, dry=False
    )


def _tasks(setting: Setting) -> list[Task]:
    from .tune_choices import choices
    from .tune_jobs import JOBS

    tasks = []
    for kernel, job in JOBS.items():
        for size in job.tiny if setting.dry else job.sizes:
            key = dict(kernel=kernel, dtype=setting.dtype_name, **dict(zip("MNKR", size, strict=True)))
            tasks.append(Task(CONFIGS, key, lambda on, kernel=kernel, size=size: measure_configs(on, kernel, size)))
    for choice in choices(setting.dry):
        M, N, K, R = choice.size
        key = dict(op=choice.op, dtype=setting.dtype_name, dropout=choice.dropout, M=M, N=N, K=K, R=R)
        after = None if choice.smaller is None else key | dict(M=choice.smaller)
        tasks.append(Task(CHOICES, key, lambda on, choice=choice: measure_choice(on, choice), after))
    return tasks


def _todo(tasks: list[Task], tables: dict[str, Table], again: bool) -> list[Task]:
    """What has no row; again: all, what has none first, then the oldest, so that a run cut short is no loss."""
    dates = [(row or {}).get("date", "") for row in (tables[task.file].find(task.key) for task in tasks)]
    if not again:
        return [task for task, date in zip(tasks, dates, strict=True) if not date]
    return [tasks[i] for i in sorted(range(len(tasks)), key=lambda i: dates[i])]


def measure_configs(setting: Setting, kernel: str, size: tuple[int, int, int, int]) -> Outcome:
    """The fastest right configuration of a kernel at a size: the default unless another is faster beyond noise."""
    from csrc_triton.common import tuning

    from .tune_jobs import JOBS

    job, (M, *_, R) = JOBS[kernel], size
    case = job.case(setting, size)
    default = tuning.default_config(kernel, setting.arch, setting.dtype, M, tuning.block_r(R))
    inputs = tune_case.copies(case, setting)
    with tuning.trying(kernel, default) as asked:
        case.run(*tune_case.cloned(inputs[0]))
    expected = (setting.dtype_name, *size)
    if asked != {expected}:
        return Outcome(None, "no row", [f"the launcher asks for {sorted(asked)}, and the job is of {expected}"])
    offered = [default, *(config for config in _offered(setting, kernel, size, job.all_rows) if config != default)]
    calls: dict[str, Callable[..., Any]] = {
        str(i): _trying(kernel, config, case.run) for i, config in enumerate(offered[: 2 if setting.dry else None])
    }
    labels = {name: _label(offered[int(name)]) for name in calls}
    right, faults = _right(case, inputs[0], setting, calls, labels)
    if "0" not in right:
        return Outcome(None, "no row", faults)
    times = _times(inputs, right, setting, graph=True)
    best = _best(times, "0")
    text = f"{labels[best]} {_us(times, best)}, default {labels['0']} {_us(times, '0')}, {_ratio(times, best, '0')}"
    return Outcome(dict(config=offered[int(best)]), text, faults, best == "0")


def _offered(setting: Setting, kernel: str, size: tuple[int, int, int, int], all_rows: bool) -> list[dict[str, int]]:
    from csrc_triton.common import tuning

    M, _, _, R = size
    return [
        candidate.config
        for candidate in tuning.candidates_for(kernel, setting.arch, setting.dtype.itemsize)
        if tuning.block_r(R) <= candidate.max_rank and (not all_rows or candidate.blocks["BLOCK_M"] >= M)
    ]


def _trying(kernel: str, config: dict[str, int], run: Callable[..., Any]) -> Callable[..., Any]:
    from csrc_triton.common import tuning

    def tried(*inputs: Any) -> Any:
        with tuning.trying(kernel, config):
            return run(*inputs)

    return tried


def _label(config: dict[str, int]) -> str:
    from csrc_triton.common.tuning import Candidate

    blocks = {name: value for name, value in config.items() if name not in ("num_warps", "num_stages")}
    return Candidate(blocks, config["num_warps"], config["num_stages"]).label


def measure_choice(setting: Setting, choice: Any) -> Outcome:
    """The implementation that wins in an op's first use and loses in none, else the safe path."""
    safe, *others = choice.names
    results, faults = [], []
    for use in choice.uses(setting):
        cases = {name: use.case(name) for name in (safe, *others)}
        inputs = tune_case.copies(cases[safe], setting)
        calls = {name: case.run for name, case in cases.items()}
        trusted = {safe} if choice.library else set()
        right, found = _right(cases[safe], inputs[0], setting, calls, {name: name for name in calls}, trusted)
        faults += [f"{use.what}: {fault}" for fault in found]
        others = [name for name in others if name in right]
        if safe not in right:
            return Outcome(None, "no row", faults)
        results.append(_times(inputs, {name: right[name] for name in (safe, *others)}, setting, use.graph))
    first = results[0]
    best = decide(results, safe, others)
    rest = ", ".join(f"{name} {_us(first, name)}" for name in (safe, *others) if name != best)
    text = f"{best} {_us(first, best)}, safe path {safe} {_us(first, safe)}, {_ratio(first, best, safe)} ({rest})"
    return Outcome(dict(implementation=best), text, faults, best == safe)


def decide(results: Sequence[Times], safe: str, others: Sequence[str]) -> str:
    """The fastest in the first of the results among those that win there and lose in none, beyond noise; or safe."""
    first = results[0]
    wins = [
        name
        for name in others
        if tune_case.beats(first, name, safe) and not any(tune_case.beats(times, safe, name) for times in results)
    ]
    return min(wins, key=lambda name: tune_case.median(first, name), default=safe)


def _right(
    case: Case, inputs: tuple[Any, ...], setting: Setting, calls: dict[str, Callable[..., Any]],
    labels: dict[str, str], trusted: Set[str] = frozenset(),
) -> tuple[dict[str, Callable[..., Any]], list[str]]:  # fmt: skip
    """The calls whose results are right, and what was wrong with the others."""
    checker = Checker(case, inputs, setting.dtype)
    found = {name: checker.fault(case, call, name in trusted) for name, call in calls.items()}
    right = {name: call for name, call in calls.items() if found[name] is None}
    return right, [f"{labels[name]} {fault}" for name, fault in found.items() if fault is not None]


def _times(inputs: list[tuple[Any, ...]], calls: dict[str, Callable[..., Any]], setting: Setting, graph: bool) -> Times:
    count = len(inputs)
    rotating = {name: lambda i, call=call: call(*inputs[i % count]) for name, call in calls.items()}
    return tune_case.timings(rotating, count, setting, graph)


def _best(times: Times, default: str) -> str:
    faster = [name for name in times if tune_case.beats(times, name, default)]
    return min(faster, key=lambda name: tune_case.median(times, name), default=default)


def _us(times: Times, name: str) -> str:
    return f"{1e6 * tune_case.median(times, name):.1f} us"


def _ratio(times: Times, name: str, to: str) -> str:
    return f"ratio {tune_case.median(times, name) / tune_case.median(times, to):.3f}"
