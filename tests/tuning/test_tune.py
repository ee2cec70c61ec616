"""``python -m bench tune``: only right candidates are timed, winners win beyond noise, nothing finished is lost.

Most of it is shown with a kernel and an op that are not real, on a GPU that is not there; the real ones in a dry run.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the tuner runs kernels")

from bench import tune
from csrc_triton import tables
from csrc_triton.common import tuning
from csrc_triton.common.tuning import ALWAYS, Candidate
from peft_fast.ops import choice
from peft_fast.tuning import case as tune_case, measure, operators, table as tune_table, work
from peft_fast.tuning.case import Case, Setting
from peft_fast.tuning.kernels import Job
from peft_fast.tuning.table import Provenance

ROOT = Path(__file__).parents[2]
VERSION = work.triton_version()
GPU = torch.device("cuda", 0)
SIZES = [(1, 32, 48, 16), (16, 32, 48, 16), (64, 32, 48, 16)]
SETTING = Setting("Test GPU", torch.device("cpu"), torch.float32, "sm_90", 0, 0.0, 1, dry=False)
PROVENANCE = {"arch", "gpu", "torch", "triton", "date", "commit"}
WHERE = Provenance("sm_90", "Test GPU", torch.__version__, VERSION, "abc")


def candidate(n, **options):
    return Candidate(dict(BLOCK_N=n), 4, 2, itemsize=4, **options)


def times(middle, spread=0.01):
    return [middle * (1 + spread * i) for i in (-2, -1, 0, 1, 2)]


class Bench:
    """A kernel "fake" and an op "lora_linear" that record what runs; how long that takes is said by ``seconds``."""

    def __init__(self, folder):
        self.folder, self.ran, self.timed, self.wrong, self.broken = folder, [], [], set(), set()
        self.seconds = {}  # of a BLOCK_N or an implementation: 5 rounds
        self.interrupt = None  # (function's name, at which call)

    def launch(self, x, size):
        self.note(tuning.config_for("fake", x, *size)["BLOCK_N"])
        return self.result(x)

    def note(self, name):
        self.ran.append(name)
        if name in self.broken:
            raise RuntimeError("out of resources\nmore")

    def result(self, x):
        return x * (2.001 if self.ran[-1] in self.wrong else 2.0)

    def kernel_case(self, on, size):
        return Case(lambda: (on.draw(4, 4),), lambda x: self.launch(x, size), lambda D, x: x.to(D) * 2)

    def op_case(self, name):
        def run(x):
            self.note(name)
            return self.result(x)

        return Case(lambda: (SETTING.draw(4, 4),), run, lambda D, x: x.to(D) * 2)

    def timings(self, calls, count, setting, graph):
        found = {}
        for name, call in calls.items():
            call(0)
            self.timed.append(self.ran[-1])
            found[name] = self.seconds.get(self.ran[-1], times(2.0))
        self.tick("timings")
        return found

    def tick(self, where):
        if self.interrupt and self.interrupt[0] == where:
            self.interrupt = (where, self.interrupt[1] - 1)
            if self.interrupt[1] == 0:
                self.interrupt = None
                raise KeyboardInterrupt

    def tune(self, **options):
        defaults = dict(only=None, kernel=None, again=False, seconds=None, tables=self.folder, dry=False)
        return tune.run(argparse.Namespace(**(defaults | options)))

    def rows(self, name="configs.json"):
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else []


@pytest.fixture
def bench(tmp_path, monkeypatch):
    made = Bench(tmp_path)
    fakes = [candidate(16, default_to=ALWAYS), candidate(32), candidate(64), candidate(128, max_rank=8)]
    monkeypatch.setitem(tuning.CANDIDATES, "fake", fakes)
    monkeypatch.setattr(work, "jobs", lambda shapes: [Job("fake", made.kernel_case, SIZES)])
    monkeypatch.setattr(work, "choices_of", lambda shapes: [])
    monkeypatch.setattr(work.Work, "compile", lambda self, threads, seconds=None: None)
    monkeypatch.setattr(tune, "_setting", lambda dry: (SETTING, WHERE))
    monkeypatch.setattr(tune, "_cannot_run", lambda args: None)
    monkeypatch.setattr(tune_case, "timings", made.timings)
    monkeypatch.setattr(tables, "gpu_of", lambda device: tables.Gpu("sm_90", "Test GPU"))
    monkeypatch.setattr(tuning, "arch_of", lambda device: "sm_90")
    yield made
    monkeypatch.undo()
    work.forget()


def looked_up(folder, M, R=16, dtype=torch.float32):
    with tables.using(folder):
        work.forget()
        return tuning._lookup("fake", GPU, dtype, M, 32, 48, R)["BLOCK_N"]


def choices_of(bench, *sizes, names=("torch", "split", "one_launch"), uses=("forward", "training")):
    made, smaller = [], None
    for size in sizes:
        found = [operators.Use(use, bench.op_case, False) for use in uses]
        made.append(operators.Choice("lora_linear", False, size, names, smaller, lambda on, found=found: found))
        smaller = size[0]
    return lambda shapes: made


# ------------------------------------------------------------------------------------------------------ configurations
def test_the_fastest_is_written_and_then_found(bench, capsys):
    bench.seconds = {16: times(2.0), 32: times(1.0), 64: times(1.5), 128: times(0.1)}
    assert bench.tune() == 0
    assert [looked_up(bench.folder, M) for M in (1, 2, 64, 128)] == [32, 32, 32, 16]
    assert looked_up(bench.folder, 1, R=32) == 32 and looked_up(bench.folder, 1, R=64) == 16, "ranks that are near"
    row = bench.rows()[0]
    assert set(row) == PROVENANCE | {"kernel", "dtype", "M", "N", "K", "R", "config", "gain"}
    assert (row["kernel"], row["arch"], row["gpu"], row["triton"]) == ("fake", "sm_90", "Test GPU", VERSION)
    assert row["gain"] == 2.0
    assert row["torch"] == torch.__version__
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"tune: 3 of 3 shapes left for Test GPU, triton {VERSION}"
    assert (
        out[1] == "fake float32 M=1 N=32 K=48 R=16: 32-w4-s2 1000000.0 us, default 16-w4-s2 2000000.0 us, ratio 0.500"
    )
    assert out[-1] == "tune: 3 rows written, 3 of them with another than the default; 0 faults; 0 shapes left"
    assert 128 not in bench.ran, "its max_rank is 8"


def test_a_config_is_not_for_another_gpu(bench, monkeypatch):
    bench.seconds = {32: times(1.0)}
    bench.tune()
    monkeypatch.setattr(tables, "gpu_of", lambda device: tables.Gpu("sm_90", "Other GPU"))
    assert looked_up(bench.folder, 1) == 16, "in the user's own table"


def test_a_dry_row_is_for_no_gpu(bench, monkeypatch):
    dry = Provenance(tune.INTERPRETER, tune.INTERPRETER, torch.__version__, VERSION, "abc")
    monkeypatch.setattr(tune, "_setting", lambda dry_run: (SETTING, dry))
    bench.seconds = {32: times(1.0)}
    assert bench.tune() == 0 and len(bench.rows()) == 3
    assert looked_up(bench.folder, 1) == 16


@pytest.mark.parametrize(
    ("default", "other", "winner"),
    [
        (times(1.0, 0.0), times(0.99, 0.0), 32),
        (times(1.0, 0.02), times(0.99, 0.02), 16),
        (times(1.0, 0.02), times(0.95, 0.02), 32),
        (times(1.0, 0.02), times(1.05, 0.0), 16),
    ],
)
def test_another_wins_beyond_noise_only(bench, default, other, winner):
    bench.seconds = {16: default, 32: other, 64: times(3.0)}
    bench.tune()
    assert {row["config"]["BLOCK_N"] for row in bench.rows()} == {winner}


@pytest.mark.parametrize("fault", ["wrong", "broken"])
def test_a_faulty_candidate_is_reported_and_never_timed(bench, capsys, fault):
    setattr(bench, fault, {32})
    bench.seconds = {32: times(0.1), 64: times(1.0)}
    assert bench.tune() == 1
    assert 32 in bench.ran and 32 not in bench.timed
    assert {row["config"]["BLOCK_N"] for row in bench.rows()} == {64}
    out = capsys.readouterr().out
    expected = {"wrong": "32-w4-s2 wrong: ", "broken": "32-w4-s2 RuntimeError: out of resources\n"}[fault]
    assert f"fake float32 M=1 N=32 K=48 R=16: {expected}" in out
    assert "3 faults; 0 shapes left" in out


def test_without_a_right_default_nothing_is_written(bench, capsys):
    bench.wrong = {16}
    assert bench.tune() == 1
    assert bench.rows() == [] and bench.timed == []
    assert "3 shapes left, the same command goes on" in capsys.readouterr().out


def test_what_a_candidate_leaves_unwritten_is_wrong():
    """The memory it gets may hold a former candidate's right result."""
    case = Case(lambda: (torch.ones(64),), lambda x: torch.empty_like(x), lambda D, x: x.to(D))
    inputs = case.inputs()
    checker = tune_case.Checker(case, inputs, torch.float32)
    assert checker.fault(case, case.run, False) == "wrong: inf times the allowed error"
    assert checker.fault(case, lambda x: x[:5], False).startswith("wrong: inf")
    assert checker.fault(case, lambda x: x.clone(), False) is None
    assert torch.empty_like.__name__ != "made", "memory is poisoned for the check alone"


def test_a_call_may_write_to_its_inputs():
    case = Case(lambda: (torch.ones(8),), lambda x: x.add_(1), lambda D, x: x.to(D) + 1)
    inputs = case.inputs()
    checker = tune_case.Checker(case, inputs, torch.float32)
    assert [checker.fault(case, case.run, False) for _ in range(2)] == [None, None]


def test_a_launch_that_asks_for_another_size_writes_no_row(bench, capsys, monkeypatch):
    def case(on, size):
        return bench.kernel_case(on, (*size[:3], 64))

    monkeypatch.setattr(work, "jobs", lambda shapes: [Job("fake", case, SIZES[:1])])
    assert bench.tune() == 1 and bench.rows() == []
    assert "the launcher asks for [('float32', 1, 32, 48, 64)]" in capsys.readouterr().out


def test_trying_ends_and_leaves_the_lookup_alone(bench):
    x = torch.zeros(1)
    before = tuning.config_for("fake", x, 1, 32, 48, 16)
    with pytest.raises(KeyError), tuning.trying("fake", dict(BLOCK_N=99)) as asked:
        assert tuning.config_for("fake", x, 3, 32, 48, 16) == dict(BLOCK_N=99)
        assert asked == {("float32", 3, 32, 48, 16)}
        raise KeyError
    assert tuning.config_for("fake", x, 1, 32, 48, 16) == before


# ------------------------------------------------------------------------------------- interruptions, budget, selection
@pytest.mark.parametrize("when", [1, 2, 3])
@pytest.mark.parametrize("where", ["timings", "before the file is replaced", "after"])
def test_an_interruption_loses_nothing_that_is_finished(bench, monkeypatch, capsys, where, when):
    replace = os.replace

    def interrupted(source, target):
        bench.tick("before the file is replaced")
        replace(source, target)
        bench.tick("after")

    monkeypatch.setattr(tune_table.os, "replace", interrupted)
    bench.interrupt = (where, when)
    assert bench.tune() == 130
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("tune: interrupted; ") and last.endswith("the same command goes on")
    done = when if where == "after" else when - 1
    assert [row["M"] for row in bench.rows()] == [size[0] for size in SIZES[:done]]
    assert [path.name for path in bench.folder.iterdir()] == (["configs.json"] if done else []), "no half-written file"
    finished = list(bench.rows())
    bench.timed.clear()
    assert bench.tune() == 0
    assert len(bench.timed) == 3 * (3 - done), "what is there is not measured again"
    assert [row["M"] for row in bench.rows()] == [1, 16, 64]
    assert bench.rows()[:done] == finished


def test_a_budget_ends_cleanly(bench, monkeypatch, capsys):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(work, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert bench.tune(seconds=25.0) == 0
    assert [row["M"] for row in bench.rows()] == [1, 16]
    assert capsys.readouterr().out.splitlines()[-1].endswith("1 shapes left, the same command goes on")
    assert bench.tune(seconds=25.0) == 0 and len(bench.rows()) == 3
    assert bench.tune(seconds=0.0) == 0


def test_again_takes_the_oldest_first_and_keeps_the_others(bench, monkeypatch):
    bench.tune()
    path = bench.folder / "configs.json"
    rows = [row | {"date": f"2026-01-0{day}"} for row, day in zip(bench.rows(), (2, 1, 3), strict=True)]
    other = rows[1] | {"gpu": "Other GPU", "config": {}}
    path.write_text(json.dumps([other, rows[1] | {"triton": "3.0"}, *rows]))
    bench.seconds = {32: times(1.0)}
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(work, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert bench.tune(again=True, seconds=15.0) == 0
    here = [row for row in bench.rows() if (row["gpu"], row["triton"]) == ("Test GPU", VERSION)]
    assert {row["M"]: row["config"]["BLOCK_N"] for row in here} == {1: 16, 16: 32, 64: 16}
    assert other in bench.rows() and len(bench.rows()) == 5


def test_selection(bench, monkeypatch, capsys):
    monkeypatch.setattr(work, "choices_of", choices_of(bench, (1, 32, 48, 16)))
    assert bench.tune(only="choices") == 0 and bench.rows() == [] and len(bench.rows("choice.json")) == 1
    assert bench.tune(kernel=["fake"]) == 0 and len(bench.rows()) == 3
    assert bench.tune(kernel=["fake", "fakes"]) == 2
    assert "unknown fakes; known: fake, lora_linear" in capsys.readouterr().err
    assert bench.tune(only="choices", kernel=["fake"]) == 2


# -------------------------------------------------------------------------------------------------------------- choices
def test_a_choice_is_written_and_then_taken(bench, monkeypatch):
    monkeypatch.setattr(work, "choices_of", choices_of(bench, (16, 32, 48, 16), (64, 32, 48, 16)))
    bench.seconds = {"split": times(1.0), "one_launch": times(1.5)}
    assert bench.tune(only="choices") == 0
    rows = bench.rows("choice.json")
    assert set(rows[0]) == PROVENANCE | {"op", "dtype", "dropout", "M", "N", "K", "R", "implementation", "gain"}
    monkeypatch.setattr(tables, "user_folder", lambda: bench.folder)
    monkeypatch.setattr(choice, "triton_failure", lambda device: "")
    work.forget()
    names = [choice.choose("lora_linear", GPU, torch.float32, M, 32, 48, 16).name for M in (1, 16, 17, 64, 65)]
    assert names == ["split"] * 4 + ["torch"]


FAST, SAME, SLOW = ({"torch": times(2.0), "split": times(middle)} for middle in (1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    ("results", "winner"),
    [
        ([FAST], "split"),
        ([FAST, SAME], "split"),
        ([FAST, SLOW], "torch"),
        ([SAME, FAST], "torch"),
        ([SLOW, FAST], "torch"),
        ([{"torch": times(2.0, 0.05), "split": times(1.9, 0.05)}], "torch"),
    ],
)
def test_an_implementation_wins_in_the_first_use_and_loses_in_none(results, winner):
    assert measure.decide(results, "torch", ["split"]) == winner


def test_a_wrong_implementation_is_never_timed_nor_chosen(bench, monkeypatch):
    monkeypatch.setattr(work, "choices_of", choices_of(bench, (1, 32, 48, 16)))
    bench.wrong, bench.seconds = {"split"}, {"split": times(0.1), "one_launch": times(1.0)}
    assert bench.tune(only="choices") == 1
    assert "split" in bench.ran and "split" not in bench.timed
    assert [row["implementation"] for row in bench.rows("choice.json")] == ["one_launch"]


def test_a_row_does_not_speak_for_smaller_sizes_that_have_none(bench, monkeypatch, capsys):
    """The safe path fails at M=16, so that there is no row: one of M=64 would be taken there."""
    monkeypatch.setattr(work, "choices_of", choices_of(bench, (16, 32, 48, 16), (64, 32, 48, 16)))
    bench.broken = {"torch"}
    assert bench.tune(only="choices") == 1
    assert bench.rows("choice.json") == []
    assert "M=64 N=32 K=48 R=16: waits for the row of M=16" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- the command line
def command(*arguments, interpreter=False):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpreter else {})
    line = [sys.executable, "-m", "bench", "tune", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_dry_run(tmp_path):
    names = ["lora_shrink", "lora_one_launch", "fourbit", "dequantize_4bit", "lora_linear"]
    ran = command("--dry", "--tables", tmp_path, "--kernel", *names, interpreter=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = [row for name in tune.FILES.values() for row in json.loads((tmp_path / name).read_text())]
    assert {row["gpu"] for row in rows} == {"interpreter"} and len(rows) == 13
    assert ran.stdout.splitlines()[-1].startswith("tune: 13 rows written")
    again = command("--dry", "--tables", tmp_path, "--kernel", *names)
    assert again.returncode == 0 and "tune: 0 of 13 shapes left for interpreter" in again.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.run(argparse.Namespace(dry=False, tables=None)) == 2
    assert capsys.readouterr().err.splitlines() == [
        "python -m bench tune: needs a GPU, and torch sees none; --dry --tables DIR tries it in Triton's interpreter"
    ]


@pytest.mark.parametrize("tables", [None, tables.SHIPPED, tables.SHIPPED / ".." / "tables"])
def test_a_dry_run_does_not_write_into_the_repository(capsys, tables):
    assert tune.run(argparse.Namespace(dry=True, tables=tables)) == 2
    assert "another folder than csrc_triton/tables" in capsys.readouterr().err
