"""`peft-fast train`: when it evaluates, what it keeps, when it stops, its rates, packing, and what it prints."""

import json
import math
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from test_train_resume import after_rows
from train_jobs import Job, pairs, save_llama, texts

from peft_fast import load_peft_weights
from peft_fast.cli.main import main

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def job(llama: Path, tmp_path: Path) -> Job:
    job = Job(llama, tmp_path)
    job.write(texts())
    return job


def getting_worse(job: Job) -> tuple[str, ...]:
    """Learned until the loss of other texts rises."""
    other = job.write([{"text": "def g(y): return None"}, {"text": "Return 77"}], job.data.with_name("other.jsonl"))
    return ("--eval-data", str(other), "--lr", "0.05", "--batch-size", "5", "--epochs", "20", "--r", "8")


# ------------------------------------------------------------------------------------------------ evaluations
def test_small_files_are_evaluated_and_saved_every_epoch(job: Job) -> None:
    assert job.run("--batch-size", "5", "--epochs", "3", "--eval-data", str(job.data)) == 0
    assert [entry["step"] for entry in job.results()["evaluations"]] == [0, 2, 4, 6]
    assert {path.name for path in job.out.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}


def test_the_best_checkpoint_is_kept(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.run(*getting_worse(job), "--keep-best") == 0
    found = job.results()
    losses = {entry["step"]: entry["eval_loss"] for entry in found["evaluations"] if entry["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert found["best_step"] == best < found["steps"] == 40
    assert f"kept: the adapter of step {best}, with the least loss held out" in capsys.readouterr().out
    saved, kept = load_peft_weights(str(job.out)), load_peft_weights(str(job.out / f"checkpoint-{best}"))
    assert all(saved[name].equal(kept[name]) for name in kept) and saved.keys() == kept.keys()
    last = load_peft_weights(str(job.out / "checkpoint-40"))
    assert not all(saved[name].equal(last[name]) for name in last)


def test_early_stopping_is_gone_on_with(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by hand in an epoch and in an evaluation, and killed when only the adapter was still to be saved."""
    more = (*getting_worse(job), "--early-stopping", "3")
    assert job.run(*more) == 0
    found = job.results()
    assert found["steps"] == found["best_step"] + 3 * 2 < 40
    (tmp_path / "other").mkdir()
    again = Job(job.model, tmp_path / "other")
    again.data = job.data
    for rows in (40, 24):
        with monkeypatch.context() as patched:
            after_rows(rows, patched, signal.SIGINT)
            assert again.run(*more) == 130
    with monkeypatch.context() as patched:
        patched.setattr("peft_fast.training.report.results", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert again.run(*more) == 130
    assert again.run(*more) == 0
    assert again.results()["losses"] == found["losses"] and again.results()["best_step"] == found["best_step"]
    assert (again.out / WEIGHTS).read_bytes() == (job.out / WEIGHTS).read_bytes()


@pytest.mark.parametrize("option", [["--keep-best"], ["--early-stopping", "2"]])
def test_the_best_needs_rows_held_out(option: list[str], job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.run(*option, "--eval-split", "0") == 2 and not job.out.exists()
    assert "compare losses of held-out lines, and none are held out" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ rates
RATES = {
    "linear": [0.5, 1.0] + [(9 - step) / 7 for step in range(3, 9)],
    "cosine": [0.5, 1.0] + [(1 + math.cos(math.pi * (step - 2) / 7)) / 2 for step in range(3, 9)],
    "constant": [0.5] + [1.0] * 7,
}


@pytest.mark.parametrize("schedule", RATES)
def test_schedules(schedule: str, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps of warming up, and none at a rate of 0; of each step a line, as this is no terminal."""
    more = ("--max-steps", "8", "--lr", "1", "--r", "1", "--warmup", "0.25", "--schedule", schedule)
    assert job.run(*more, "--eval-split", "0", "--save-steps", "100") == 0
    said = capsys.readouterr().err
    lines = re.findall(r"^step (\d+) of 8: loss ([\d.]+), rate ([\d.e-]+)$", said, re.MULTILINE)
    assert [int(step) for step, _, _ in lines] == list(range(1, 9)) and "\r" not in said
    assert [float(rate) for _, _, rate in lines] == pytest.approx(RATES[schedule], abs=1e-3)
    assert [float(loss) for _, loss, _ in lines] == pytest.approx(job.losses(), rel=1e-3)


def test_weight_decay(job: Job) -> None:
    """A rate times a decay of 1 takes everything away but the step itself."""
    assert job.run("--max-steps", "1", "--lr", "0.01", "--weight-decay", "100") == 0
    weights = load_peft_weights(str(job.out))
    assert max(float(value.abs().max()) for value in weights.values()) <= 0.0101


# ------------------------------------------------------------------------------------------------ packing
@pytest.mark.parametrize("lines", [texts(), pairs()], ids=["text", "pair"])
def test_packed_rows_have_the_same_losses(lines: Any, llama: Path, tmp_path: Path) -> None:
    results = []
    for name, option in (("padded", ()), ("packed", ("--packing",))):
        (tmp_path / name).mkdir()
        job = Job(llama, tmp_path / name)
        job.write(lines)
        more = ("--max-steps", "6", "--batch-size", "4", "--lr", "0.02", "--lora-dropout", "0", *option)
        assert job.run(*more, "--eval-data", str(job.data)) == 0
        results.append(job)
    assert results[0].losses() == pytest.approx(results[1].losses(), rel=1e-3)
    held_out = [[entry["eval_loss"] for entry in job.results()["evaluations"]] for job in results]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-3)


def test_packing_where_it_cannot_be(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.run("--packing", "--method", "prefix") == 2
    assert "--packing is for --method lora and --task causal-lm" in capsys.readouterr().err
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    assert job.run("--packing") == 1
    assert "LlamaForCausalLM does not keep rows apart that are packed" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ what is printed
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_the_line_that_generates(method: str, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.out = job.out.with_name("my adapter, (1)")
    assert job.run("--max-steps", "1", "--method", method) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("use it: "))
    name = re.search(r'"adapter": "(.*)"', line)
    assert name
    command = shlex.split(line.removeprefix("use it: peft-fast ").partition(", a request")[0])
    requests, results = job.data.with_name("requests.jsonl"), job.data.with_name("results.jsonl")
    job.write([{"prompt": "Return", "adapter": name[1], "max_new_tokens": 3}], requests)
    command = [{"requests.jsonl": str(requests), "results.jsonl": str(results)}.get(word, word) for word in command]
    assert main(command) == 0
    assert json.loads(results.read_text())["new_tokens"] > 0


@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_no_line_where_generate_cannot(method: str, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.run("--max-steps", "1", "--method", method) == 0
    said = capsys.readouterr().out
    assert "load it: " in said and "use it: " not in said
