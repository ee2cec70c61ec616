"""First contact with a GPU, without one: a rehearsal, what a phase cannot do to the next, what the JSON is for."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the cases run kernels")

from bench.first_contact import child, machine, phases, runner, tables
from bench.first_contact.here import Here, measure_subject, poisoned
from bench.first_contact.runner import COLUMNS, Document, Phase, Runner
from bench.subjects.subject import Subject
from csrc_triton.tables import Sizes, nearest

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------------------------------------------- the whole of it
@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-m", "bench.first_contact", "--rehearse", "--out", str(out), "--seconds", "400"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COMMIT": "abc1234"})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return {"out": out, "printed": ran.stdout, **tables.read(out / "gpu.json")}


def test_every_phase_runs_without_a_gpu(rehearsal: dict[str, Any]) -> None:
    log = (rehearsal["out"] / "log.txt").read_text()
    wrong = [row for row in rehearsal["rows"] if not row["ok"]]
    assert not wrong, (wrong, log[-3000:])
    assert [p["phase"] for p in rehearsal["phases"]] == [phase.name for phase in phases.PHASES]
    assert all(p["done"] == p["cases"] > 0 for p in rehearsal["phases"])
    assert all(COLUMNS.keys() <= row.keys() for row in rehearsal["rows"])
    assert rehearsal["about"]["rehearsal"] and rehearsal["about"]["commit"] == "abc1234"
    assert rehearsal["about"]["tests"]["tests"] > 0
    assert "phases: machine 3/3" in rehearsal["printed"]


def test_every_kernel_is_compared_before_it_is_timed(rehearsal: dict[str, Any]) -> None:
    checked = {(r["op"], r["impl"]) for r in rehearsal["rows"] if r["phase"] == "check" and r["err_share"] is not None}
    timed = {(r["op"], r["impl"]) for r in rehearsal["rows"] if r["us_median"] is not None and "peft_fast" in r["impl"]}
    whole = ("host", "decode step", "training step")
    assert {pair for pair in timed if pair[0] not in whole} <= checked
    for op, names in {"lora_linear": ("addmm", "split", "one_launch"), "lora_mixed": ("grouped", "split", "one_launch"),
                      "prefix_attention": ("kernel", "flash"), "lora_linear_4bit": ("kernel",),
                      "lora_linear_int8": ("kernel",), "dequantize_4bit": ("kernel",)}.items():  # fmt: skip
        assert {(op, f"peft_fast:{name}") for name in names} <= timed
    modes = {row["mode"] for row in rehearsal["rows"]}
    assert {"fwd", "train", "dropout", "decode", "race", "graph"} <= modes


def test_tables_read_what_first_contact_writes(rehearsal: dict[str, Any], tmp_path: Path) -> None:
    measured = tables.measured_rows(rehearsal)
    assert {row["op"] for row in measured} == set(tables.SAFE)
    assert all(row["gain"] is not None for row in measured if row["op"] not in ("lora_linear_4bit", "lora_linear_int8"))
    assert "decode step" in tables.sentence(rehearsal) and "peft over peft_fast" in tables.table(rehearsal)
    with pytest.raises(SystemExit, match="rehearsal"):
        tables.run(argparse.Namespace(file=rehearsal["out"] / "gpu.json", root=tmp_path))


def test_the_second_run_profiles_and_repeats_what_failed(rehearsal: dict[str, Any], tmp_path: Path) -> None:
    first = {name: rehearsal[name] for name in ("about", "phases", "rows")}
    failed = ["tests/interpreter/test_kernels.py::test_without_bias"]
    first["about"] = {**first["about"], "tests": {"failed": failed}}
    (tmp_path / "first.json").write_text(json.dumps(first))
    command = [sys.executable, "-m", "bench.first_contact", "--rehearse", "--out", str(tmp_path), "--seconds", "200"]
    command += ["--second-run", str(tmp_path / "first.json"), "--only", "failed tests"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (row,) = tables.read(tmp_path / "second.json")["rows"]
    assert row["ok"] and row["note"].startswith("tests 1")


# ------------------------------------------------------------------------------------------- phases cannot harm others
def row(name: str) -> dict[str, Any]:
    return {"op": "lora_linear", "impl": name, "us_median": 1.0}


def one(here: Here) -> Iterator[dict[str, Any]]:
    yield row("one")


def hangs(here: Here) -> Iterator[dict[str, Any]]:
    yield row("before")
    time.sleep(1000)


def raises(here: Here) -> Iterator[dict[str, Any]]:
    yield row("before")
    raise RuntimeError("an illegal memory access")


def dies(here: Here) -> Iterator[dict[str, Any]]:
    yield row("before")
    os.kill(os.getpid(), signal.SIGKILL)


def starts_a_program(pid_file: Path, here: Here) -> Iterator[dict[str, Any]]:
    program = subprocess.Popen(["sleep", "1000"])
    pid_file.write_text(str(program.pid))
    yield row("before")
    program.wait()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Document]:
    """run(seconds, (phase, its cases' functions), ...): a run of these, in forked children that know them."""

    def run(seconds: float, *plan: tuple[Phase, list[Callable[[Here], Iterator[dict[str, Any]]]]]) -> Document:
        known = {
            phase.name: [phases.Case(f"case {i}", "test", function) for i, function in enumerate(functions)]
            for phase, functions in plan
        }
        monkeypatch.setattr(phases, "cases_of", lambda phase, here: known[phase])
        monkeypatch.setattr(child, "_here", lambda options: Here(torch.device("cpu"), **options))
        document = Document(tmp_path / "gpu.json")
        names = lambda phase: [case.name for case in known[phase]]  # noqa: E731
        Runner(document, seconds, child.main, names, {"rehearse": True}).run([phase for phase, _ in plan])
        written = json.loads((tmp_path / "gpu.json").read_text())
        assert written == {"about": document.about, "phases": document.phases, "rows": document.rows}
        return document

    return run


def found(document: Document) -> list[tuple[str, str, bool]]:
    return [(row["phase"], row["impl"], row["ok"]) for row in document.rows]


def test_a_case_that_hangs_is_killed_and_the_next_runs(run: Callable[..., Document]) -> None:
    document = run(60, (Phase("a", 1, case_seconds=2.0), [one, hangs, one]), (Phase("b", 1), [one]))
    assert found(document) == [
        ("a", "one", True), ("a", "before", True), ("a", "", False), ("a", "one", True), ("b", "one", True),
    ]  # fmt: skip
    assert document.rows[2]["note"] == "killed after 2 s" and document.rows[2]["case"] == "case 1"


def test_a_phase_ends_at_its_deadline_and_the_next_runs(run: Callable[..., Document]) -> None:
    start = time.time()
    document = run(9, (Phase("a", 1), [hangs, one]), (Phase("b", 2), [one]))
    assert found(document) == [("a", "before", True), ("a", "", False), ("b", "one", True)]
    assert document.phases[0]["note"] == "1 cases not begun" and document.phases[1]["done"] == 1
    assert time.time() - start < 9


@pytest.mark.parametrize("fault", [raises, dies])
def test_a_crash_keeps_the_rows_before_it(fault: Any, run: Callable[..., Document]) -> None:
    document = run(60, (Phase("a", 1), [one, fault, one]), (Phase("b", 1), [one]))
    assert found(document) == [
        ("a", "one", True), ("a", "before", True), ("a", "", False), ("a", "one", True), ("b", "one", True),
    ]  # fmt: skip
    note = document.rows[2]["note"]
    assert "an illegal memory access" in note if fault is raises else f"ended with {-signal.SIGKILL}" in note


def test_after_a_fault_of_a_kernel_the_next_case_has_a_new_process(
    run: Callable[..., Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(here: Here) -> Iterator[dict[str, Any]]:
        monkeypatch.setattr(Here, "synchronize", broken)
        yield row("before")

    def broken(here: Here) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    document = run(60, (Phase("a", 1), [fault, one, one]))
    assert found(document) == [("a", "before", True), ("a", "", False), ("a", "one", True), ("a", "one", True)]


def test_what_a_case_started_is_killed_with_it(run: Callable[..., Document], tmp_path: Path) -> None:
    run(60, (Phase("a", 1, case_seconds=3.0), [partial(starts_a_program, tmp_path / "pid")]))
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the program that a case started still runs")


def test_cases_run_side_by_side(run: Callable[..., Document], tmp_path: Path) -> None:
    """Each waits for the three others: one after another none would end."""

    def meets(number: int, here: Here) -> Iterator[dict[str, Any]]:
        (tmp_path / f"here-{number}").touch()
        for _ in range(300):
            if len(list(tmp_path.glob("here-*"))) == 4:
                yield row("met")
                return
            time.sleep(0.1)

    document = run(60, (Phase("a", 1, workers=4), [partial(meets, number) for number in range(4)]))
    assert document.phases[0]["done"] == 4 and found(document) == [("a", "met", True)] * 4


def test_the_json_is_whole_whenever_the_run_is_killed(tmp_path: Path) -> None:
    program = f"""
import torch
from pathlib import Path
from bench.first_contact import child, phases
from bench.first_contact.here import Here
from bench.first_contact.runner import Document, Phase, Runner
def rows(here):
    for i in range(20):
        yield dict(op="lora_linear", impl=str(i), note="x" * 1000)
cases = [phases.Case(str(i), "test", rows) for i in range(1000)]
phases.cases_of = lambda phase, here: cases
child._here = lambda options: Here(torch.device("cpu"), **options)
names = [case.name for case in cases]
document = Document(Path({str(tmp_path / "gpu.json")!r}))
Runner(document, 60, child.main, lambda phase: names, dict(rehearse=True)).run([Phase("a", 1)])
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        while not (tmp_path / "gpu.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        seen = 0
        for _ in range(20):
            time.sleep(0.02)
            seen = max(seen, len(json.loads((tmp_path / "gpu.json").read_text())["rows"]))
    finally:
        process.kill()
        process.wait()
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert len(rows) >= seen > 0 and len(rows) % 20 == 0


# ---------------------------------------------------------------------------------------------------------- its parts
class Doubled(Subject):
    """Providers of 2 x, one of which is wrong, one of which leaves an element unwritten."""

    @classmethod
    def providers(cls, case: Any, device: torch.device) -> list[str]:
        return ["right", "wrong", "unwritten", "missing"]

    def compared(self, name: str) -> Any:
        x = torch.arange(1.0, 5.0)
        if name == "missing":
            raise ModuleNotFoundError("No module named 'missing'")
        out = torch.empty(4)
        out[: 3 if name == "unwritten" else 4] = (x * (3 if name == "wrong" else 2))[: 3 if name == "unwritten" else 4]
        return [out], [2 * x], [2 * x.double()]

    def runner(self, name: str) -> Any:
        return lambda i: None


def test_a_wrong_result_is_recorded_and_not_timed() -> None:
    here = Here(torch.device("cpu"), rehearse=True)
    session: Any = here
    rows = {row["impl"]: row for row in measure_subject(Doubled(None, session), here, {"op": "lora_linear"})}
    assert rows["right"]["ok"] and "us_median" in rows["right"]
    assert not rows["wrong"]["ok"] and "us_median" not in rows["wrong"]
    assert not rows["unwritten"]["ok"] and rows["unwritten"]["err_share"] == float("inf")
    assert rows["missing"].get("ok", True) and rows["missing"]["note"].startswith("takes no part: No module")


def test_new_memory_is_poisoned_inside_only() -> None:
    with poisoned():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(2).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == 127).all()
    assert torch.empty is not None and "poison" not in torch.empty.__qualname__


def test_rates_and_shares_come_from_the_ceilings(tmp_path: Path) -> None:
    document = Document(tmp_path / "x.json", about={"ceilings": {"bytes": 1e12, "bf16": 1e14}})
    document.add("lora", {**row("x"), "us_median": 10.0, "work": {"flops": 1e8, "bytes": 5e6, "dtype": "bf16"}})
    (got,) = document.rows
    assert (got["gbps"], got["tflops"], got["share_of_ceiling"]) == (500.0, 10.0, 0.5)


def document_of(*rows: dict[str, Any]) -> dict[str, Any]:
    about = dict(device="NVIDIA H200", arch="sm_90", date="2026-01-01", commit="abc1234", rehearsal=False)
    about |= {"versions": {"torch": "2.11.0", "triton": "3.6.0"}}
    sizes = dict(op="lora_linear", mode="fwd", dtype="bfloat16", adapters="bfloat16", M=1, N=4096, K=4096, R=16)
    return {"about": about, "phases": [], "rows": [{**COLUMNS, **sizes, **row} for row in rows]}


def test_what_ships_won_by_a_tenth_over_the_safe_path() -> None:
    document = document_of(
        dict(impl="base", us_median=9.0), dict(impl="peft", us_median=40.0), dict(impl="peft_fast", us_median=13.0),
        dict(impl="peft_fast:torch", us_median=12.0), dict(impl="peft_fast:split", us_median=11.5),
        dict(impl="peft_fast:one_launch", us_median=10.5),
        dict(impl="peft_fast:one_launch", us_median=10.0, config="16x16x128-w4-s5"),
        dict(impl="peft_fast:split", us_median=1.0, ok=False),
        # with dropout the safe path is another
        dict(impl="peft_fast:torch", us_median=90.0, mode="train", dropout=0.05),
        dict(impl="peft_fast:addmm", us_median=30.0, mode="train", dropout=0.05),
        dict(impl="peft_fast:split", us_median=29.0, mode="train", dropout=0.05),
    )  # fmt: skip
    (shipped,) = tables.shipped_rows(document)
    assert (shipped["implementation"], shipped["config"], shipped["gain"]) == ("one_launch", "16x16x128-w4-s5", 1.2)
    assert (shipped["kernel"], shipped["arch"], shipped["triton"]) == ("lora_one_launch", "sm_90", "3.6")
    gains = {(r["implementation"], r["dropout"], r["config"]): r["gain"] for r in tables.measured_rows(document)}
    assert gains["split", 0.05, ""] == 1.0345 and gains["split", 0.0, ""] == 1.0435


def test_replays_of_graphs_count_where_there_are_any() -> None:
    document = document_of(
        dict(impl="peft_fast:torch", us_median=60.0), dict(impl="peft_fast:one_launch", us_median=80.0),
        dict(impl="peft_fast:torch", us_median=12.0, graph=True),
        dict(impl="peft_fast:one_launch", us_median=10.0, graph=True),
    )  # fmt: skip
    (shipped,) = tables.shipped_rows(document)
    assert shipped["graph"] and shipped["gain"] == 1.2


def test_rows_of_the_table_end_where_something_won_last(tmp_path: Path) -> None:
    times = {
        1: (12.0, 8.0, 13.0),
        16: (12.0, 9.0, 10.0),
        64: (12.0, 13.0, 9.0),
        256: (12.0, 20.0, 8.0),
        2048: (50.0, 90.0, 51.0),
    }
    document = document_of(
        *(
            dict(impl=f"peft_fast:{name}", us_median=us, M=M)
            for M, found in times.items()
            for name, us in zip(("torch", "one_launch", "split"), found, strict=True)
        ),
        dict(impl="peft_fast:addmm", us_median=30.0, mode="train", dropout=0.05, M=256),
        dict(impl="peft_fast:split", us_median=20.0, mode="train", dropout=0.05, M=256),
    )
    rows = tables.table_rows(document)
    found = {(row["dropout"], row["M"]): (row["implementation"], row["gain"]) for row in rows}
    assert found == {
        (False, 1): ("one_launch", 1.5),
        (False, 16): ("one_launch", 1.3333),
        (False, 64): ("split", 1.3333),  # at 16 it did not lose
        (False, 256): ("split", 1.5),
        (True, 256): ("split", 1.5),
    }
    choices = tmp_path / "choice.json"
    choices.write_text(json.dumps([row | {"gpu": "Other"} for row in rows[:1]] + [row | {"M": 9} for row in rows]))
    assert tables.ship(document, tmp_path) == 5
    written = json.loads(choices.read_text())
    assert len(written) == 6 and written[0]["gpu"] == "Other" and written[1:] == rows
    where = dict(op="lora_linear", dtype="bfloat16", dropout=False)
    looked_up = nearest(written, where, Sizes(2048, 4096, 4096, 16))
    assert looked_up is None and nearest(written, where, Sizes(100, 5000, 4096, 8))["implementation"] == "split"


def test_what_won_at_one_end_only_is_not_said_to_win_between() -> None:
    document = document_of(
        dict(impl="peft_fast:torch", us_median=10.0), dict(impl="peft_fast:split", us_median=12.0),
        dict(impl="peft_fast:torch", us_median=10.0, M=16), dict(impl="peft_fast:split", us_median=5.0, M=16),
        dict(impl="peft_fast:torch", us_median=10.0, M=64), dict(impl="peft_fast:split", us_median=5.0, M=64),
    )  # fmt: skip
    rows = tables.table_rows(document)
    assert [(row["M"], row["implementation"]) for row in rows] == [(1, "torch"), (16, "torch"), (64, "split")]


def test_readme_and_docs_get_their_sections(tmp_path: Path) -> None:
    document = document_of(
        dict(impl="base", us_median=9.0), dict(impl="peft", us_median=40.0), dict(impl="peft_fast", us_median=10.0),
        dict(impl="base", us_median=3600.0, op="decode step"), dict(impl="peft", us_median=9000.0, op="decode step"),
        dict(impl="peft_fast", us_median=4500.0, op="decode step"),
    )  # fmt: skip
    (tmp_path / "gpu.json").write_text(json.dumps(document))
    (tmp_path / "docs").mkdir()
    readme, docs = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    readme.write_text("before <!-- gpu -->old<!-- /gpu --> after")
    docs.write_text("before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n")
    (tmp_path / "csrc_triton" / "tables").mkdir(parents=True)
    args = argparse.Namespace(file=tmp_path / "gpu.json", root=tmp_path)
    for _ in range(2):
        assert tables.run(args) == 0
        text = readme.read_text()
        assert text.startswith("before <!-- gpu -->One NVIDIA H200") and text.endswith("<!-- /gpu --> after")
        assert "decode step, M = 1: 4.5 ms (1.25x of the base, 0.50x of peft)" in text
        assert "| 9.0 us | 40.0 us | 10.0 us | - | 4.00x |" in docs.read_text() and "old" not in docs.read_text()
    readme.write_text("nothing to replace")
    with pytest.raises(SystemExit, match="expected one section"):
        tables.run(args)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"expected the gpu\.json"):
        tables.read(tmp_path / "other.json")


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_the_sections_are_there(name: str) -> None:
    text = (ROOT / name).read_text()
    assert all(text.count(mark) == 1 for mark in tables.MARKS)


def test_failed_tests_are_named_as_pytest_takes_them(tmp_path: Path) -> None:
    (tmp_path / "x.xml").write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="1">'
        '<testcase classname="tests.interpreter.test_int8.TestGemm" name="test_a[1-2]"><failure/></testcase>'
        '<testcase classname="tests.interpreter.test_mixed" name="test_b"><error/></testcase>'
        '<testcase classname="tests.interpreter.test_mixed" name="test_c"/></testsuite></testsuites>'
    )
    counts, failed = machine.in_junit(tmp_path / "x.xml")
    assert counts == {"tests": 3, "failures": 1, "errors": 1}
    assert failed == [
        "tests/interpreter/test_int8.py::TestGemm::test_a[1-2]", "tests/interpreter/test_mixed.py::test_b",
    ]  # fmt: skip


def test_the_parent_imports_nothing_that_looks_at_the_gpu() -> None:
    """Its children are forked from it: a GPU that it had looked at would be closed to them."""
    program = (
        "import sys, torch, bench.first_contact.phases, bench.first_contact.command, bench.first_contact.tables\n"
        "assert not torch.cuda.is_initialized()\n"
        "print([name for name in ('transformers', 'peft', 'bitsandbytes') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr


def test_bench_knows_the_commands() -> None:
    for command in ("first-contact", "tables"):
        ran = subprocess.run([sys.executable, "-m", "bench", command, "--help"], cwd=ROOT, capture_output=True)
        assert ran.returncode == 0


def test_the_phases_fit_into_ten_minutes() -> None:
    assert sum(phase.seconds for phase in phases.PHASES) == 580
    assert sum(phase.seconds for phase in phases.SECOND) <= 145
    here = Here(torch.device("cuda"))
    for phase in (*phases.PHASES, *phases.SECOND):
        names = [case.name for case in phases.cases_of(phase.name, here)]
        assert names and len(set(names)) == len(names), phase.name
    assert runner.COLUMNS.keys() >= {"phase", "op", "impl", "config", "err_share", "ok", "note"}
