"""Ahead-of-time check of every kernel in every candidate configuration, for GPUs that need not be there.

A row per kernel, configuration and architecture: registers, spilled bytes, shared memory, tensor-core instructions,
lines of machine code. What a row must not show is in ``problems``. Rows are kept in bench/aot/rows, keyed by a hash of
all they depend on, so that only what changed is compiled again.
"""

import argparse
import dataclasses
import functools
import hashlib
import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
ROWS = Path(__file__).parent / "rows"
# Change it when what is measured, or how, changes: it is part of every key.
MEASURE_VERSION = 1
# What over-limit kernels were seen to compile to, without an error: 4 registers and 16 lines (8 on gfx942).
_STUB_REGISTERS, _STUB_LINES, _STUB_LINES_AMD = 4, 16, 8
# Kernels whose main loop has to keep several products in flight: there "wgmma serialized" costs a fifth of the time and
# more. The gradients of A and B wait for memory instead; of prefix attention's backward the rows show it.
_IN_FLIGHT = ("gemm", "one_launch")
COLUMNS = ("kernel", "arch", "config", "registers", "spill_bytes", "shared_bytes", "mma_count", "sass_lines", "matmul")


@dataclass(frozen=True)
class Job:
    """One row to be: where its case stands, for a worker process to find it again, and what identifies it."""

    module: str
    index: int
    arch: str
    kernel: str
    config: str
    matmul: bool
    key: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m bench aot``."""
    parser.add_argument("--arch", default=",".join(ARCHS), help="comma-separated, default: %(default)s")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a list of objects")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile side by side, default: %(default)s")
    parser.add_argument("--all", action="store_true", help="compile everything again, whatever rows are kept")
    parser.add_argument(
        "--rows", type=Path, default=ROWS, metavar="DIR", help="where rows are kept, default: bench/aot/rows"
    )
    parser.add_argument(
        "--module", action="append", help="module with aot_cases(); default: all of csrc_triton that have it"
    )


def run(args: argparse.Namespace) -> int:
    """Compile what changed, print every row, return 1 if one shows a problem."""
    try:
        import triton
    except ImportError:
        print("python -m bench aot needs triton: pip install triton", file=sys.stderr)
        return 2
    archs = args.arch.split(",")
    unknown = sorted(set(archs) - set(ARCHS))
    if unknown:
        print(f"python -m bench aot: unknown --arch {unknown}, known: {list(ARCHS)}", file=sys.stderr)
        return 2
    jobs = [job for job in find_jobs(args.module or kernel_modules(), archs) if (args.kernel or "") in job.kernel]
    if not jobs:
        print("python -m bench aot: no kernel found, so nothing was checked", file=sys.stderr)
        return 2
    store = args.rows / f"triton-{triton.__version__}.json"
    kept = read_rows(store)
    missing = [job for job in jobs if args.all or job.key not in kept]
    start = time.perf_counter()
    measured = {} if args.all else {job.key: kept[job.key] for job in jobs if job.key in kept}
    complete = not args.kernel and not args.module and set(archs) == set(ARCHS)
    try:
        compile_all(missing, args.jobs, measured)
    finally:  # an interrupted run keeps what it has; a complete one drops rows of what is no more
        finished = complete and all(job.key in measured for job in jobs)
        write_rows(store, {**({} if finished else kept), **_worth_keeping(jobs, measured)})
    rows = [{**_identity(job), **measured[job.key]} for job in jobs]
    if args.json:
        args.json.write_text(json.dumps([{name: row.get(name) for name in COLUMNS} for row in rows], indent=1) + "\n")
    seconds = time.perf_counter() - start
    reused = len(jobs) - len(missing)
    return report(rows, f"triton {triton.__version__}: {len(missing)} compiled in {seconds:.0f} s, {reused} rows kept")


def kernel_modules() -> list[str]:
    """Names of the modules of csrc_triton that offer ``aot_cases()``, found by looking, so that none is forgotten."""
    from csrc_triton.common import aot

    return [module.__name__ for module in aot.kernel_modules()]


def find_jobs(modules: Iterable[str], archs: Sequence[str]) -> list[Job]:
    """One job per case (csrc_triton.common.aot.AotCase) and each of its architectures among ``archs``."""
    jobs = []
    for module in modules:
        for index, case in enumerate(_cases(module)):
            for arch in (arch for arch in archs if arch in case.archs):
                jobs.append(Job(module, index, arch, case.name, case.label, case.matmul, row_key(case, arch)))
    return jobs


def row_key(case: Any, arch: str) -> str:
    """Hash of what decides a row: source of the kernel and the functions it calls, configuration, triton, chip."""
    import triton

    from .measure import source_hash, specialized

    constexprs = {k: source_hash(v) if hasattr(v, "src") else repr(v) for k, v in case.constexprs.items()}
    parts = [
        source_hash(case.kernel),
        case.signature,
        specialized(case),
        constexprs,
        case.options,
        triton.__version__,
        arch,
        MEASURE_VERSION,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:32]


def compile_all(jobs: Sequence[Job], processes: int, measured: dict[str, dict[str, Any]]) -> None:
    """Add a row to ``measured`` for every job as they come; one that does not compile gets a row with an ``error``."""
    if processes <= 1 or len(jobs) <= 1:
        _gather(jobs, map(_compile_one, jobs), measured)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        _gather(jobs, pool.map(_compile_one, jobs), measured)


def _gather(jobs: Sequence[Job], rows: Iterable[dict[str, Any]], measured: dict[str, dict[str, Any]]) -> None:
    for count, (job, row) in enumerate(zip(jobs, rows, strict=True), 1):
        measured[job.key] = row
        if count % 20 == 0 or count == len(jobs):
            print(f"aot: {count}/{len(jobs)}", file=sys.stderr, flush=True)


def problems(row: dict[str, Any]) -> list[str]:
    """Say what is wrong with a row; an empty list is a pass."""
    from .measure import CHIPS

    if row.get("error"):
        return [f"does not compile: {row['error']}"]
    chip = CHIPS[row["arch"]]
    amd = chip.target.backend == "hip"
    found = []
    if row["sass_lines"] <= (_STUB_LINES_AMD if amd else _STUB_LINES) or (
        row["registers"] <= _STUB_REGISTERS and not amd
    ):
        found.append("a stub: the compiler gave up without saying so")
    if row["spill_bytes"] > 0:
        found.append(f"spills {row['spill_bytes']} bytes")
    if row["shared_bytes"] > chip.shared_bytes:
        found.append(f"shared memory {row['shared_bytes']} > {chip.shared_bytes}")
    if row["matmul"] and row["mma_count"] == 0:
        found.append("a matmul without tensor-core instructions")
    if row["registers"] * row["threads"] > chip.register_file:
        found.append(f"{row['registers']} registers x {row['threads']} threads > {chip.register_file}")
    if row.get("note") and row["kernel"].endswith(_IN_FLIGHT):
        found.append(row["note"])
    return found


def report(rows: list[dict[str, Any]], summary: str) -> int:
    """Print one line per row, then the failures, then a summary."""
    width = {name: max(len(name), *(len(str(row.get(name, "-"))) for row in rows)) for name in COLUMNS}
    print("  ".join(name.ljust(width[name]) for name in COLUMNS))
    failures = 0
    for row in rows:
        found = problems(row)
        failures += bool(found)
        cells = [str(row.get(name, "-")) for name in COLUMNS]
        line = "  ".join(cell.ljust(width[name]) for name, cell in zip(COLUMNS, cells, strict=True))
        print(line, "FAIL " + "; ".join(found) if found else row.get("note", ""))
    print(f"{summary}; {failures} of {len(rows)} rows fail")
    return 1 if failures else 0


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by key; none if the file is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_rows(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """One row per line, sorted by what people look for, so that a change reads well in a diff."""
    order = sorted(rows, key=lambda key: (rows[key]["kernel"], rows[key]["config"], rows[key]["arch"], key))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(rows[key])}" for key in order) + "\n}\n")


def _worth_keeping(jobs: Sequence[Job], measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """All but failed compiles: those are tried again next time."""
    return {
        job.key: {**_identity(job), **measured[job.key]}
        for job in jobs
        if job.key in measured and not measured[job.key].get("error")
    }


def _identity(job: Job) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(job).items() if name in COLUMNS}


@functools.cache
def _cases(module: str) -> list[Any]:
    return list(importlib.import_module(module).aot_cases())


def _compile_one(job: Job) -> dict[str, Any]:
    from .measure import compile_and_measure

    try:
        case = _cases(job.module)[job.index]
        if row_key(case, job.arch) != job.key:
            raise RuntimeError("the source changed while this ran; run it again")
        return compile_and_measure(case, job.arch)
    except Exception as error:  # whatever a compiler raises is this row's result, and it fails the run
        text = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {text[0]}"[:200]}
