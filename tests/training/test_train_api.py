"""`peft_fast.training.train`: what the command does, from Python."""

import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from train_jobs import Job, save_llama, texts

from peft_fast.jobs.errors import JobError, Stopped, UsageError
from peft_fast.training import train
from peft_fast.training.options import Options, complete


@pytest.fixture
def job(tmp_path: Path) -> Job:
    job = Job(save_llama(tmp_path / "base"), tmp_path)
    job.write(texts())
    return job


GIVEN: dict[str, Any] = {"model": "m", "data": "d.jsonl", "out": "o"}


def test_it_does_what_the_command_does(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.run("--max-steps", "2", "--batch-size", "4", "--r", "2", "--target-modules", "q_proj", "v_proj") == 0
    printed, lines = capsys.readouterr().out, []
    options: dict[str, Any] = dict(max_steps=2, batch_size=4, r=2, target_modules=["q_proj", "v_proj"])
    found = train(job.model, str(job.data), tmp_path / "again", say=lines.append, **options)
    assert found["losses"] == job.results()["losses"] and found["settings"] == job.results()["settings"]
    theirs, ours = (load_file(out / "adapter_model.safetensors") for out in (job.out, tmp_path / "again"))
    assert theirs.keys() == ours.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    assert "\n".join(lines).count("\n") == printed.strip().count("\n") and not capsys.readouterr().out
    again = train(job.model, job.data, tmp_path / "again", **options)
    assert again == found, "finished: kept as it is"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=4), "there is no option 'rank'"),
        (dict(target_module=["q"]), "did you mean 'target_modules'"),
        (dict(r=0), "--r must be a whole number, 1 or more, got 0"),
        (dict(r=True), "--r must be a whole number"),
        (dict(lr="fast"), "--lr must be a number above 0, got 'fast'"),
        (dict(lora_dropout=1.0), "from 0 to below 1"),
        (dict(task="poetry"), "--task must be one of causal-lm, seq-cls, seq2seq"),
        (dict(target_modules="q_proj"), "--target-modules must be a list of names"),
        (dict(bf16=1), "--bf16 must be True or False"),
        (dict(model=3), "--model must be a path"),
        (dict(method="prefix", r=4), "--r is for --method lora, not for prefix"),
        (dict(packing=True, task="seq2seq"), "--packing is for"),
        (dict(out=None), "--out is needed"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        complete({**GIVEN, **options})
    assert isinstance(raised.value, UsageError)


def test_defaults_are_those_of_the_method() -> None:
    lora, prefix = complete(GIVEN), complete({**GIVEN, "method": "prefix", "early_stopping": 2})
    assert (lora.r, lora.lora_alpha, lora.target_modules, lora.lr, lora.num_virtual_tokens) == (
        16, 32, ["all-linear"], 2e-4, None,
    )  # fmt: skip
    assert (prefix.r, prefix.num_virtual_tokens, prefix.lr, prefix.keep_best) == (None, 20, 1e-2, True)
    assert complete(lora._asdict()) == lora and lora.model == Path("m")
    assert set(Options._field_defaults) == set(Options._fields) - {"model", "data", "out", "method", "lr"}


def test_stopped_it_raises_and_goes_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_fast.training import loop

    options: dict[str, Any] = dict(max_steps=4, batch_size=4, eval_split=0.0)
    with monkeypatch.context() as patched:
        step = loop.Stop.__enter__

        def stops(self: Any) -> Any:
            found = step(self)
            found.signal = signal.SIGTERM
            return found

        patched.setattr(loop.Stop, "__enter__", stops)
        with pytest.raises(Stopped, match="the same command goes on from there") as raised:
            train(job.model, job.data, job.out, **options)
    assert raised.value.exit_code == 143 and isinstance(raised.value, KeyboardInterrupt)
    assert train(job.model, job.data, job.out, **options)["steps"] == 4


def test_a_job_that_cannot_be_done(job: Job) -> None:
    (job.model / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(JobError):
        train(job.model, job.data, job.out, max_steps=1)
