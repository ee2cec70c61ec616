"""`peft-fast train`, stopped with Ctrl-C, killed, killed in a save: the same command goes on to the same result."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from train_jobs import Job, labelled, save_llama, texts

from peft_fast import LoraConfig
from peft_fast.training import out as train_out, rows as train_rows

MORE = ("--epochs", "4", "--batch-size", "3", "--lr", "0.02", "--r", "4", "--lora-dropout", "0.3", "--save-steps", "3")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run without a stop: 12 steps, 3 in each of 4 epochs."""
    job = Job(llama, tmp_path_factory.mktemp("whole"))
    job.write(texts())
    assert job.run(*MORE) == 0 and job.results()["steps"] == 12 and len(set(job.losses())) == 12
    config = LoraConfig.from_pretrained(job.out)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 32, 0.3)
    return job


@pytest.fixture
def job(llama: Path, tmp_path: Path) -> Job:
    job = Job(llama, tmp_path)
    job.write(texts())
    return job


def same(job: Job, whole: Job, *, evaluations: bool = True) -> None:
    """Losses and evaluations, and every byte of the adapter."""
    assert job.results()["losses"] == whole.results()["losses"]
    assert not evaluations or job.results()["evaluations"] == whole.results()["evaluations"]
    weights = "adapter_model.safetensors"
    assert (job.out / weights).read_bytes() == (whole.out / weights).read_bytes()


def after_rows(count: int, monkeypatch: pytest.MonkeyPatch, *signals: int) -> None:
    """Send the signals to this process when so many rows have been asked for."""
    get = train_rows.Rows.__getitem__
    left = [count]

    def spy(rows: Any, index: int) -> Any:
        left[0] -= 1
        if left[0] == 0:
            for number in signals:
                os.kill(os.getpid(), number)
        return get(rows, index)

    monkeypatch.setattr(train_rows.Rows, "__getitem__", spy)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_between_checkpoints(
    number: int, code: int, job: Job, whole: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        after_rows(25, patched, number)  # in the third epoch
        assert job.run(*MORE) == code
    said = capsys.readouterr().err
    match = re.search(r"stopped after step (\d+) of 12, saved in (.*): the same command goes on from there", said)
    assert match and int(match[1]) not in (3, 6, 9, 12) and Path(match[2]).name == f"checkpoint-{match[1]}"
    assert not (job.out / "adapter_config.json").exists(), "the adapter comes at the end"
    assert signal.getsignal(number) is before
    assert job.run(*MORE, "--resume") == 0
    assert f"going on after step {match[1]} of 12" in capsys.readouterr().out
    same(job, whole)
    assert job.results()["steps_before"] == int(match[1])


def test_a_second_signal_stops_at_once(job: Job, whole: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        after_rows(25, patched, signal.SIGINT, signal.SIGINT)
        assert job.run(*MORE) == 130
    assert {path.name for path in job.out.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    assert job.run(*MORE) == 0
    same(job, whole)


def test_stopped_in_an_evaluation(job: Job, whole: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step before it is saved; before the first step there is nothing to save."""
    with monkeypatch.context() as patched:
        after_rows(1, patched, signal.SIGINT)
        assert job.run(*MORE) == 130
    assert not list(job.out.glob("checkpoint-*"))
    with monkeypatch.context() as patched:
        # an evaluation asks for a row, 3 steps for 9 (and what is read ahead): the next evaluation begins with the 11th
        after_rows(11, patched, signal.SIGINT)
        assert job.run(*MORE) == 130
    assert [path.name for path in job.out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert job.run(*MORE) == 0
    same(job, whole, evaluations=False)


def test_killed_in_a_save(job: Job, whole: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was half written is not gone on with."""
    from transformers import TrainerState

    save = TrainerState.save_to_json

    def dies(state: Any, path: str) -> None:
        if state.global_step == 6:
            Path(path).write_text('{"global_step": 6,')
            raise OSError("no space left")
        save(state, path)

    with monkeypatch.context() as patched:
        patched.setattr(TrainerState, "save_to_json", dies)
        assert job.run(*MORE) == 1
    assert (job.out / "checkpoint-6" / "adapter_model.safetensors").exists()
    assert job.run(*MORE) == 0
    assert job.results()["steps_before"] == 3
    same(job, whole)


def test_killed_before_the_adapter_is_saved(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps are done, in the middle of an epoch: none is made again, and none more."""
    more = (*MORE[2:], "--max-steps", "11")
    with monkeypatch.context() as patched:
        patched.setattr("peft_fast.training.report.results", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert job.run(*more) == 130
    assert job.run(*more) == 0
    assert job.results()["steps_before"] == job.results()["steps"] == len(job.losses()) == 11
    weights = "adapter_model.safetensors"
    assert (job.out / weights).read_bytes() == (job.out / "checkpoint-11" / weights).read_bytes()


def test_from_outside(job: Job, whole: Job) -> None:
    """A process that is killed, one that gets Ctrl-C, and one that finishes."""
    # longer, so that a signal comes before the end on any machine
    more = ("--epochs", "400", *MORE[2:-1], "1")

    def start() -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "peft_fast", *job.arguments(*more)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def steps() -> int:
        return max((int(path.parent.name[11:]) for path in job.out.glob(f"checkpoint-*/{train_out.STATE}")), default=0)

    def wait_for(step: int, process: "subprocess.Popen[str]") -> None:
        while steps() < step and process.poll() is None:
            time.sleep(0.02)

    with start() as process:
        wait_for(4, process)
        process.kill()
    reached = steps()
    assert process.returncode == -signal.SIGKILL and reached >= 4
    with start() as process:
        wait_for(reached + 2, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "going on after step" in out, err
    assert "stopping after this step, with a checkpoint" in err and "Traceback" not in err
    match = re.search(r"stopped after step (\d+) of 1200", err)
    assert match and (job.out / f"checkpoint-{match[1]}").is_dir()


@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning"])
def test_learned_tokens_are_gone_on_with(
    method: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of p-tuning the adapter's file has what comes out of its network only: a checkpoint has the network too."""
    results = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        job = Job(llama, tmp_path / name)
        job.write(texts())
        more = ("--method", method, "--max-steps", "6", "--batch-size", "5", "--lr", "0.02", "--keep-best")
        if name == "stopped":
            with monkeypatch.context() as patched:
                after_rows(24, patched, signal.SIGINT)
                assert job.run(*more) == 130
        assert job.run(*more) == 0
        results.append(job)
    same(results[1], results[0])


# ------------------------------------------------------------------------------------------------ other runs
def test_a_run_with_other_settings_is_left_alone(
    whole: Job, job: Job, capsys: pytest.CaptureFixture[str], llama: Path
) -> None:
    left = {path: path.stat().st_mtime_ns for path in whole.out.rglob("*")}

    def refused(*more: str) -> str:
        capsys.readouterr()
        assert whole.run(*more) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and "holds a run with other settings: " in err
        assert left == {path: path.stat().st_mtime_ns for path in whole.out.rglob("*")}
        return err

    assert "--lr was 0.02, is 0.5. Name another" in refused(*MORE, "--lr", "0.5")
    assert '--method was "lora", is "prefix"' in refused("--method", "prefix")
    assert "--seed was 0, is 1" in refused(*MORE, "--seed", "1")
    assert "--eval-data was not given then" in refused(*MORE, "--eval-data", str(whole.data))
    data = whole.data.read_bytes()
    whole.write(texts()[1:])
    assert "--data has other content now" in refused(*MORE)
    whole.data.write_bytes(data)
    whole.model = save_llama(job.data.parent / "other")
    (whole.model / "more.json").write_text("{}")
    assert "--model has other content now" in refused(*MORE)
    whole.model = llama
    assert whole.run(*MORE) == 0 and "kept" in capsys.readouterr().out


def test_a_run_that_is_stopped_keeps_its_settings(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        after_rows(5, patched, signal.SIGINT)
        assert job.run(*MORE) == 130
    assert job.run(*MORE, "--seed", "5") == 2
    (job.out / "run.json").write_text("[")
    assert job.run(*MORE) == 2


def test_two_runs_do_not_write_the_same_directory(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    with train_out.locked(job.out):
        assert job.run(*MORE) == 1
    assert "another run is writing it" in capsys.readouterr().err
    assert [path.name for path in job.out.iterdir()] == [".lock"]


def test_classes_are_those_of_all_lines(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a classifier is trained and gone on with too."""
    results = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        job = Job(llama, tmp_path / name)
        job.write(labelled())
        more = ("--task", "seq-cls", "--max-steps", "6", "--lr", "0.02")
        if name == "stopped":
            with monkeypatch.context() as patched:
                after_rows(20, patched, signal.SIGINT)
                assert job.run(*more) == 130
        assert job.run(*more) == 0
        results.append(job)
    same(results[1], results[0])
