"""`peft-fast train --adapter`: an adapter that was trained is trained on, in a directory of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
from train_jobs import Job, labelled, save_llama, texts

from peft_fast import load_peft_weights

MORE = ("--max-steps", "4", "--lr", "0.02")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def further(job: Job) -> Job:
    """A job that goes on from another's adapter; its arguments need --adapter."""
    other = Job(job.model, job.data.parent)
    other.out = job.out.with_name("further")
    return other


OF_METHODS: dict[str, list[str]] = {
    "lora": ["--r", "3", "--lora-alpha", "5", "--lora-dropout", "0", "--target-modules", "q_proj", "up_proj"],
    "prefix": ["--method", "prefix", "--num-virtual-tokens", "5"],
    "prompt": ["--method", "prompt", "--num-virtual-tokens", "5"],
}


@pytest.mark.parametrize("method", OF_METHODS)
def test_goes_on_with_the_numbers_of_the_adapter(method: str, llama: Path, tmp_path: Path) -> None:
    job = Job(llama, tmp_path)
    job.write(texts())
    assert job.run(*MORE, *OF_METHODS[method], "--eval-data", str(job.data)) == 0
    before = (job.out / "adapter_model.safetensors").read_bytes()
    other = further(job)
    assert other.run(*MORE, "--adapter", str(job.out), "--eval-data", str(job.data)) == 0
    first, last = (json.loads((out / "adapter_config.json").read_text()) for out in (job.out, other.out))
    assert first == last, "its settings are those that it had"
    reached = job.results()["evaluations"][-1]["eval_loss"]
    found = other.results()
    assert found["evaluations"][0]["eval_loss"] == pytest.approx(reached, rel=1e-5)
    assert found["evaluations"][-1]["eval_loss"] < reached
    assert found["settings"]["--method"] == method and found["trainable_parameters"] > 0
    assert (job.out / "adapter_model.safetensors").read_bytes() == before


def test_a_classifier_has_the_labels_that_it_had(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(llama, tmp_path)
    job.write(labelled())
    classify = ("--task", "seq-cls", "--eval-data", str(job.data))
    assert job.run(*MORE, *classify) == 0
    other = further(job)
    assert other.run(*MORE, *classify, "--adapter", str(job.out)) == 0
    reached = job.results()["evaluations"][-1]["eval_loss"]
    assert other.results()["evaluations"][0]["eval_loss"] == pytest.approx(reached, rel=1e-5), "its head too"
    third = further(other)
    third.out = tmp_path / "third"
    third.write([{**line, "label": {"good": "a", "bad": "b"}[line["label"]]} for line in labelled()])
    assert third.run(*MORE, *classify, "--adapter", str(job.out)) == 2
    assert "its labels are ['bad', 'good'], those of --data ['a', 'b']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        (["--r", "4"], {}, "--r: --adapter stays what it is; leave --r out"),
        (["--method", "lora"], {}, "--method: --adapter stays what it is"),
        (["--task", "seq-cls"], {}, "made for --task causal-lm, not for seq-cls"),
        ([], {"peft_type": "P_TUNING"}, "what its network made, not the network"),
        ([], {"prefix_projection": True}, "what its network made, not the network"),
        ([], {"peft_type": "IA3"}, "its method is 'IA3'; expected LORA"),
        ([], {"target_modules": ["qkv"]}, "--adapter "),
    ],
)
def test_an_adapter_that_cannot_be_trained_on(
    options: list[str],
    changes: dict[str, Any],
    said: str,
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = Job(llama, tmp_path)
    job.write(labelled() if "seq-cls" in options else texts())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], **changes}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert job.run(*options, "--adapter", str(adapter)) == 2 and not job.out.exists()
    assert said in capsys.readouterr().err


def test_what_is_no_adapter(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(llama, tmp_path)
    job.write(texts())
    assert job.run("--adapter", str(tmp_path)) == 2
    assert "expected the directory of an adapter, with adapter_config.json" in capsys.readouterr().err


def test_more_epochs(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run is left as it is, and what is said shows how to go on."""
    job = Job(llama, tmp_path)
    job.write(texts())
    assert job.run(*MORE) == 0
    assert job.run("--max-steps", "8", "--lr", "0.02") == 2
    assert f"to train what is there further, add --adapter {job.out}" in capsys.readouterr().err
    other = further(job)
    assert other.run(*MORE, "--adapter", str(job.out)) == 0
    saved = [load_peft_weights(str(one.out)) for one in (job, other)]
    assert not all(saved[0][name].equal(saved[1][name]) for name in saved[0])
    assert other.run(*MORE) == 2 and "--adapter was given then" in capsys.readouterr().err
